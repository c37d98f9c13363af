"""Rollouts that no checkpoint has been trained on yet, kept so that they are not sampled again.

One file per step, `<directory>/<step>.npz`. What it holds counts for one config, one step and one
set of weights; with any other it is left alone, and sampled anew.
"""

import io
import json
import logging
import zipfile
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from etils import epath

from npr_jax.base.distributed import group_rank, group_size
from npr_jax.base.files import describe, numbered, write_atomically, writing
from npr_jax.base.progress import Scalar
from npr_jax.decode import Trajectory
from npr_jax.runs.directory import INPUTS, SIZES, essence
from npr_jax.train.carry import Carried, from_arrays, to_arrays
from npr_jax.train.packing import Example
from npr_jax.tree import TreeLayout

T = TypeVar("T")

_log = logging.getLogger(__name__)
_CARRIED = ".carried"
# What a damaged archive raises: its checksums are of what it holds, not of the names and the kinds.
_DAMAGED = (zipfile.BadZipFile, ValueError, EOFError, KeyError, TypeError, RuntimeError)
_FIELDS = ("token_ids", "loss_mask", "advantage", "old_logp")
_LAYOUT = ("positions", "hidden", "pred", "forced")


class Pending:
    """The files of sampled groups under `directory`, for a run of the config `config_text`."""

    def __init__(self, directory: epath.PathLike, config_text: str):
        if group_size() > 1:  # each has its own
            directory = f"{directory}-{group_rank()}-of-{group_size()}"
        self.directory = epath.Path(directory)
        self._config = json.dumps(
            essence(yaml.safe_load(config_text), (*SIZES, *INPUTS)), sort_keys=True
        )

    def save(
        self,
        step: int,
        weights: int,
        groups: list[list[Example]],
        metrics: Mapping[str, Scalar],
        position: Mapping,
    ) -> None:
        """Writes what was sampled for `step` with weights of that `fingerprint`.

        `position`: JSON values, where the run goes on. Blocks of layouts are not kept: rows need
        none.
        """
        meta = {
            "key": self._key(step, weights),
            "metrics": dict(metrics),
            "position": position,
            "groups": [len(group) for group in groups],
            "prompt_lens": [e.layout.prompt_len for group in groups for e in group],
        }
        examples = [example for group in groups for example in group]
        columns = {
            **{name: [getattr(e, name) for e in examples] for name in _FIELDS},
            **{f"layout_{name}": [getattr(e.layout, name) for e in examples] for name in _LAYOUT},
        }
        arrays: dict[str, np.ndarray] = {}
        for name, parts in columns.items():
            arrays[name] = np.concatenate([part.reshape(-1) for part in parts] or [np.zeros(0)])
            arrays[f"{name}_sizes"] = np.array([part.size for part in parts], np.int64)
        self._write(self._path(step), meta, arrays)

    def load(
        self, step: int, weights: int
    ) -> tuple[list[list[Example]], dict[str, Scalar], dict] | None:
        """(groups, metrics, position) as they were given to `save`; None if there are none."""
        return self._read(self._path(step), step, weights, _sampled)

    def save_carried(self, step: int, weights: int, carried: Carried) -> None:
        """Writes this process's answers that the batch of `step` leaves to the next one."""
        facts, arrays = to_arrays(carried)
        meta = {"key": self._key(step, weights), "facts": facts}
        self._write(self._path(step, _CARRIED), meta, arrays)

    def load_carried(self, step: int, weights: int) -> dict[tuple[int, int], Trajectory] | None:
        """The answers that were given to `save_carried`; None if there are none."""
        path = self._path(step, _CARRIED)
        return self._read(path, step, weights, lambda meta, x: from_arrays(meta["facts"], x))

    def drop(self, step: int) -> None:
        """Removes what was sampled for `step` and before, but for what it leaves to the next."""
        if self.directory.exists():
            for number, path in numbered(self.directory, ".npz").items():
                if number <= step:
                    path.unlink()
            for number, path in numbered(self.directory, _CARRIED).items():
                if number < step:
                    path.unlink()

    def _write(self, path: epath.Path, meta: Mapping, arrays: dict[str, np.ndarray]) -> None:
        """Writes JSON values and arrays as one file."""
        arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        file = io.BytesIO()
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]  # none is "allow_pickle"
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomically(path, file.getvalue())

    def _read(
        self,
        path: epath.Path,
        step: int,
        weights: int,
        use: Callable[[dict, dict[str, np.ndarray]], T],
    ) -> T | None:
        """`use` of what `_write` was given, if it counts for these weights; None if there is none
        that can be used."""
        if not path.exists():
            return None
        try:
            with np.load(io.BytesIO(path.read_bytes())) as file:
                if damaged := file.zip.testzip():  # what numpy reads may end before a checksum
                    raise ValueError(f"{damaged} is not what was written")
                arrays = dict(file)
            meta = json.loads(arrays["meta"].tobytes())
            return use(meta, arrays) if meta["key"] == self._key(step, weights) else None
        except _DAMAGED as error:
            said = describe(error)
            _log.warning("%s is damaged (%s): its rollouts are sampled again", path, said)
            return None

    def _path(self, step: int, ending: str = ".npz") -> epath.Path:
        return self.directory / f"{step}{ending}"

    def _key(self, step: int, weights: int) -> list:
        return [self._config, step, weights]


def _sampled(
    meta: dict, arrays: dict[str, np.ndarray]
) -> tuple[list[list[Example]], dict[str, Scalar], dict]:
    """Groups, metrics and position of a batch."""
    names = (*_FIELDS, *(f"layout_{name}" for name in _LAYOUT))
    columns = [np.split(arrays[name], np.cumsum(arrays[f"{name}_sizes"])[:-1]) for name in names]
    examples = iter(
        [
            _example(dict(zip(names, values, strict=True)), prompt_len)
            for *values, prompt_len in zip(*columns, meta["prompt_lens"], strict=False)
        ]
    )
    groups = [[next(examples) for _ in range(size)] for size in meta["groups"]]
    return groups, meta["metrics"], meta["position"]


def _example(values: dict[str, np.ndarray], prompt_len: int) -> Example:
    num_tokens = len(values["token_ids"])
    hidden = values["layout_hidden"].reshape(num_tokens, -1, 2)
    layout = TreeLayout(
        positions=values["layout_positions"],
        hidden=hidden,
        pred=values["layout_pred"],
        forced=values["layout_forced"],
        prompt_len=prompt_len,
    )
    return Example(layout=layout, **{name: values[name] for name in _FIELDS})


def fingerprint(params: dict) -> int:
    """Tells two sets of float32 weights apart. Integers add up to the same on every mesh."""
    return int(_fingerprint(params))


@jax.jit
def _fingerprint(params: dict) -> jax.Array:
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(params):
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        places = jax.lax.iota(jnp.uint32, leaf.size).reshape(leaf.shape)
        total = total * 31 + jnp.sum(bits * (2 * places + 1), dtype=jnp.uint32)
    return total
