"""Whose directory it is: a run goes on only with the config that it was begun with.

What changes no number may change, and the number of steps; a model or a file of problems may move,
where its content is known from before (`inputs.yaml`). A key changes no number if a run without any
rounding would have the same metrics and parameters with every value of it: it says where something
lies, what is kept, or in which order and shapes sums are formed. Sums in another order differ by
rounding, and where two tokens were as good as equal, by which of them is drawn: as on another mesh.
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from npr_jax.base.distributed import is_main, wait
from npr_jax.base.files import alone, describe, is_url, read_text, write_atomically, writing

_log = logging.getLogger(__name__)

# Ends of dotted keys that may change. Where a run lies, what is saved of it, when it gives up:
_FREE = (
    "output",
    "checkpoints",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_best",
    "max_nonfinite",
    "gap_warn",
    "gap_stop",
    "patience",
)
# Sizes of a stage, which change how it computes and what it can hold, and its numbers by rounding
# alone, as the mesh does.
SIZES = (
    "train.micro_rows",
    "train.row_lengths",
    "train.remat",
    *(
        f"engine.{name}"
        for name in (
            "lanes",
            "pages",
            "page_size",
            "table_pages",
            "steps",
            "header_rows",
            "header_chunk",
            "prefill_rows",
            "prefill_chunk",
            "max_stops",
            "attention",
        )
    ),
)
ROW = "train.row_len"  # whole key: that of Beta, below `fit`, says which answers are accepted
LENGTHS = ("steps", "epochs", "fit.steps", "fit.epochs")  # of a run: whole keys
INPUTS = (
    "model",
    "sampler_model",
    "problems",
    "evaluate.problems",
)  # whole keys of what has a content of its own
# Whole keys that came after 0.1.0: a run from before has its config without them, and goes on.
LATER: tuple[str, ...] = (
    "engine.exact",
    "engine.max_logprobs",
    "engine.max_logit_bias",
    "engine.max_blocks",
    *(f"engine.rules.{name}" for name in ("join", "fork", "positions", "marker")),
    *("engine.rules.trial", "engine.rules.failure"),
    "train.exact",
    "fit.train.exact",
    *(
        f"{train}.optimizer.{name}"
        for train in ("train", "fit.train")
        for name in ("name", "moments")
    ),
    "start",
    "checker",
    *("curriculum", "curriculum.problems", "curriculum.mixed"),
    "task",  # of the demo
    "kl",
    "carry",
    "staleness",
    "importance_bound",
    "oversample",
    "refill",
    *("acceleration_until", "parallel_bonus", "acceleration_bonus", "schedule", "schedule_until"),
    *("branch_credit", "branch_labels", "step_words"),
    "train.lora",
    "fit.train.lora",
    *(f"evaluate.{name}" for name in ("every", "problems", "samples")),
)
# Why others may not change: of the first pattern that is found in the key.
_WHY = (
    (r"^inputs\.", "it holds something else"),
    (r"^(model|sampler_model|problems|evaluate\.problems)$", "what it held was not written down"),
    (r"^start$", "its state and its place among the problems came from there"),
    (r"(^|\.)seed$", "all that is random comes from it"),
    (r"(^|\.)exact$", "a run is exact from its first step on, or it is not"),
    (r"^evaluate", "evaluations are compared with those before"),
    (r"optimizer\.", "the updates so far were made with it"),
    (r"(^|\.)lora(\.|$)", "what is trained depends on it"),
    (r"compute_dtype$|cache_dtype$", "numbers of another dtype are others"),
    (r"^engine\.|(^|\.)(max_tokens|temperature|top_p)$", "what is sampled depends on it"),
    (
        r"prompt|samples$|problems$|curriculum|batch|refill|carry|oversample|tries$|keep$|row_len$",
        "which problems and answers a step has depends on it",
    ),
    (r"^staleness$", "which weights sample a batch depends on it"),
    (
        r"^(checker|malformed|acceleration|parallel_bonus|schedule|branch_|advantage|reward"
        r"|overlong)",
        "what an answer is worth depends on it",
    ),
    (
        r"^(kl$|importance|clip_|dual_clip|objective|layout|train_forced|step_words)",
        "the loss depends on it",
    ),
)
_MISFITS = (KeyError, AttributeError)  # PyYAML's for a value that its tag does not fit: !!bool x


def claim(directory: str | Path, config_text: str, free: Sequence[str] = ()) -> Path:
    """Makes the run directory with its config.yaml; a run that is there is gone on with. Of several
    processes the first does it, and the others wait. `free`: ends of more keys that may change.

    A run that is made longer goes on where it ended: its `final` becomes `final-KEY-VALUE` first.

    Raises ValueError naming the keys if the directory belongs to a run of another config, or a file
    if to no run at all, OSError if it cannot be written. In all cases nothing has been changed.
    """
    if is_url(directory):
        raise ValueError(
            f"output is {directory}, needed is a local directory: set `checkpoints` to have the "
            "checkpoints in an object store"
        )
    directory = Path(directory)
    if is_main():
        _claim(directory, config_text, free)
    wait(f"claimed {directory}")
    return directory


@contextlib.contextmanager
def alone_in(directory: str | Path) -> Iterator[None]:
    """Keeps a second command out of a run directory, which is made where there is none. Of several
    processes of one run the first does it.

    Raises ValueError if another command is in it, OSError if it cannot be made.
    """
    if is_url(directory) or not is_main():
        yield  # `claim` refuses the URL
        return
    directory = Path(directory)
    with writing(directory, "set another output"):
        directory.mkdir(parents=True, exist_ok=True)
    with alone(directory):
        yield


def _claim(directory: Path, config_text: str, free: Sequence[str]) -> None:
    path, new = directory / "config.yaml", yaml.safe_load(config_text)
    with writing(directory, "set another output"):
        directory.mkdir(parents=True, exist_ok=True)
        # Hidden is what a crash has left of a config, and what file systems put into a directory;
        # schedulers put their logs there before a run begins.
        found = [entry for entry in directory.iterdir() if entry.name[0] != "."]
        names = {entry.name for entry in found if entry.suffix not in (".log", ".out", ".err")}
        others = sorted(names - {path.name})
        if path.exists():
            old = read_config(path)
            if others:
                same_config(old | {"inputs": known_inputs(directory)}, new, directory, free)
                _lengthen(directory, old, new)
            elif lacking := essence(new, free).keys() - essence(old, free).keys() - {*LATER}:
                raise ValueError(  # a run that failed at once would have left its whole config
                    f"{path} is of no such run, for it has no {min(lacking)}: set another output"
                )
        elif others:
            raise ValueError(
                f"{directory} holds {others[0]}, and no config.yaml that says of which run: set "
                "another output, or bring the run's config.yaml back"
            )
        write_atomically(path, config_text.encode())


def read_config(path: Path) -> dict:
    """The keys of a run's config.yaml, or inputs.yaml. Raises ValueError for a file that has no
    keys, or a value that JSON does not have."""
    text = read_text(path, f"{path.name} of a run")
    try:
        values = yaml.safe_load(text)
        json.dumps(values)  # in which form values are compared and told
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, *_MISFITS) as error:
        raise ValueError(f"{path} is no config of a run: {describe(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no config of a run: it is {values!r:.60}, no keys with values")
    return values


def _lengthen(directory: Path, old: dict, new: dict) -> None:
    """Where the number of steps is another: takes a final model, which is of the old one, aside."""
    old, new, final = _flat(old), _flat(new), directory / "final"
    for key in LENGTHS:
        if key not in new or old.get(key) == new[key]:
            continue
        was = old.get(key)
        if type(was) not in (int, float):
            path = directory / "config.yaml"
            raise ValueError(f"{path}: {key} is {was!r}, needed is the number of the run so far")
        if final.exists():
            if not new[key] > was:
                raise ValueError(
                    f"{key} was {was}, is {new[key]}: {final} has been trained for the former. "
                    f"Needed is {key}={was} or more, or another output"
                )
            final.rename(directory / f"final-{key.split('.')[-1]}-{was}")
        _log.warning(
            "%s was %s, is %s: the run goes on to there; a learning rate that depends on the "
            "number of steps follows the new one from here on",
            key,
            was,
            new[key],
        )


def claim_inputs(directory: Path, inputs: Mapping[str, str]) -> str:
    """Writes down what the inputs of a run hold, by their keys (`INPUTS`), so that they may move.

    Returns it as YAML, to be added to the text of the config. Raises ValueError naming the key if
    the run in the directory was begun with another content.
    """
    if is_main():
        known = known_inputs(directory)
        same_config({"inputs": known}, {"inputs": inputs}, directory)
        text = yaml.safe_dump({"inputs": known | dict(inputs)})
        with writing(directory):
            write_atomically(directory / "inputs.yaml", text.encode())
    wait(f"inputs of {directory}")
    return yaml.safe_dump({"inputs": dict(inputs)})


def known_inputs(directory: Path) -> dict[str, str]:
    """What the inputs of a run were found to hold, by their keys; nothing of a run from before that
    was written down. Raises ValueError for a damaged inputs.yaml."""
    path = directory / "inputs.yaml"
    if not path.exists():
        return {}
    inputs = read_config(path).get("inputs")
    if not isinstance(inputs, dict) or not all(isinstance(x, str) for x in inputs.values()):
        raise ValueError(
            f"{path}: inputs is {inputs!r:.60}, needed are keys with texts: bring the file back, "
            "or remove it, and the inputs are told by their paths"
        )
    return inputs


def same_config(
    old_config: Mapping, new_config: Mapping, directory: object, free: Sequence[str] = ()
) -> None:
    """Raises ValueError naming the keys in which two configs differ, where that matters; keys of
    `LATER` that the old one does not have are named in a warning."""
    old, new = essence(old_config, free), essence(new_config, free)
    for config in (old, new):
        config.setdefault("start", None)  # a run from before there was one has begun with no other
    for key in INPUTS:
        content = f"inputs.{key}"
        if content in old:  # then its place is of no matter
            old.pop(key, None), new.pop(key, None)
        if not (content in old and content in new):
            old.pop(content, None), new.pop(content, None)
    later = (new.keys() - old.keys()) & {*LATER}
    changed = [
        f"{key} was {_told(old, key)}, is {_told(new, key)}"
        + (_why(key) if (key in old and key in new) or key == "start" else "")
        for key in sorted((old.keys() | new.keys()) - later)
        if _told(old, key) != _told(new, key)
    ]
    if changed:
        raise ValueError(
            f"{directory} belongs to a run of another config ({'; '.join(changed)}), and what it "
            "has done so far depends on that: go on with that config, set another output, or "
            "remove the directory"
        )
    for key in sorted(later):
        _log.warning("%s: the run was begun without %s; it is %s now", directory, key, new[key])


def _why(key: str) -> str:
    """Why that key may not change, to be put behind its values; nothing of other keys."""
    return next((f": {reason}" for pattern, reason in _WHY if re.search(pattern, key)), "")


def _told(config: Mapping, key: str) -> str:
    return json.dumps(config[key]) if key in config else "missing"


def essence(config: Mapping, free: Sequence[str] = ()) -> dict:
    """The keys of a config, dotted, on which its numbers depend; `free` are ends of some that they
    do not depend on."""
    ends = (*_FREE, *free)
    return {
        key: value
        for key, value in _flat(config).items()
        if not any(f".{key}".endswith(f".{end}") for end in ends)
        and not key.startswith("mesh.")
        and "profile" not in key.split(".")
        and not (key == "evaluate" and value is None)
        and key not in (ROW, *LENGTHS)
    }


def _flat(values: Mapping, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
