"""Which step is being done, and on what: told where a run fails at one step, again and again.

    <directory>/attempt.json    while a step is done: its number, how often it was begun, its work

Of several processes the first keeps the file, of its own part of the work.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax

from npr_jax.base.distributed import is_main
from npr_jax.base.files import json_text, write_atomically, writing
from npr_jax.base.parts import part
from npr_jax.runs import sigterm

NAME = "attempt.json"
_SHOWN = 6  # of the longest, in a message
_log = logging.getLogger(__name__)

Work = Mapping[str, Sequence[int]]  # what is trained on, by its name: tokens of each answer


class Attempts:
    """Counts how often a step is begun, in `directory`.

    `remedies(training)`: which keys would make a step smaller that trains, or that samples.
    """

    def __init__(self, directory: Path, remedies: Callable[[bool], str]):
        self.directory, self._remedies = directory, remedies
        self._found: dict = {}
        self._quiet = False

    def tell(self, work: Work) -> None:
        """From here on the step trains on this."""
        self._found |= {"work": {name: list(map(int, tokens)) for name, tokens in work.items()}}
        self._write()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step. Raises OSError for one for which a device has no room."""
        last = self._read()
        # What is known of a step that failed stays while those before it are done again.
        self._quiet = not is_main() or last.get("step", 0) > number
        times = last["attempts"] if last.get("step") == number else 0
        if times and is_main():
            again = "once before" if times == 1 else f"{times} times before"
            _log.warning(
                "step %d was begun %s and not finished. %s", number, again, self._said(last)
            )
        self._found = {"step": number, "attempts": times + 1}
        self._write()
        try:
            yield
        except sigterm.Preempted:  # in order, so it does not count
            if times:
                self._found["attempts"] = times
                self._write()
            else:
                self._remove()
            raise
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                said = str(error).strip().partition("\n")[0]
                raise OSError(
                    f"step {number}: there is no room in memory. {self._said(self._found)} What "
                    f"was said: {said}"
                ) from error
            raise
        self._remove()

    def _said(self, found: Mapping) -> str:
        """What was at work, and what would help."""
        work = found.get("work")
        if work is None:
            what = "Answers were being sampled."
        else:
            longest = sorted(work.items(), key=lambda item: -max(item[1], default=0))
            shown = "; ".join(
                f"{name}: {', '.join(f'{n:,}' for n in tokens)} tokens"
                for name, tokens in longest[:_SHOWN]
            )
            more = f"; and {len(longest) - _SHOWN} more" if len(longest) > _SHOWN else ""
            what = f"It trained on {shown}{more} ({self.directory / NAME})."
        return f"{what} Where memory ran out: {self._remedies(work is not None)}."

    def _read(self) -> dict:
        try:
            found = json.loads((self.directory / NAME).read_text(encoding="utf-8"))
            return found if isinstance(found["step"] + found["attempts"], int) else {}
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return {}  # none, or of no use

    def _write(self) -> None:
        if not self._quiet:
            with part("keep"), writing(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
                text = json_text(self._found, indent=0)
                write_atomically(self.directory / NAME, text.encode())

    def _remove(self) -> None:
        if not self._quiet:
            with part("keep"), writing(self.directory):
                (self.directory / NAME).unlink(missing_ok=True)
