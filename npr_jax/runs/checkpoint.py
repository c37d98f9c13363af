"""Checkpoints of a run: written in the background, committed with digests, checked when read.

    <directory>/<step>/     train state, position, config, digests.json (the last of its files)
    <directory>/damaged-*   what could not be read and was passed over

Everything random comes from the config's seed and the step, so step and position say what is
drawn next.
"""

import contextlib
import errno
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import jax
import orbax.checkpoint as ocp
import yaml
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from npr_jax.base.distributed import gather, group_rank, group_size, is_main, members, wait
from npr_jax.base.files import REMEDY, is_url, numbered, writing
from npr_jax.model.params import check_finite
from npr_jax.runs.digest import find_fault, write_digests, write_part
from npr_jax.runs.directory import SIZES, same_config

State = TypeVar("State")  # a pytree of arrays
_log = logging.getLogger(__name__)
# Orbax logs an error with its traceback at every place that it passes, and then raises it.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError)  # Orbax's and TensorStore's


_WRITTEN = "async_write_complete"  # in the key of Orbax's barrier behind the files of a process


class _Damaged(Exception):
    """Says what is wrong with a checkpoint."""


class Checkpoints:
    """The checkpoints under `directory`, a path or the URL of an object store.

    The last `keep` of them stay, and the `keep_best` with the largest value. A killed run leaves
    the checkpoint before; its unfinished files are named in a warning, and removed.

    Attributes:
      start: directory and step of another run's checkpoint, which is restored where this run has
        none of its own, and what of its position this run takes; None is none.
    """

    start: tuple[epath.PathLike, int, Callable[[dict], dict]] | None = None

    def __init__(self, directory: epath.PathLike, config_text: str, keep: int, keep_best: int = 0):
        self.directory = _place(directory)
        self.config_text = config_text
        policies: list[LatestN | BestN] = [LatestN(keep)]
        if keep_best:
            policies.append(
                BestN(get_metric_fn=_value, n=keep_best, keep_checkpoints_without_metrics=False)
            )
        # The threads that save must not ask for the group: it may be another for a moment.
        self._processes, self._rank, self._size = _processes(), group_rank(), group_size()
        options = ocp.CheckpointManagerOptions(
            multiprocessing_options=self._processes,
            create=False,
            preservation_policy=AnyPreservationPolicy(policies),
            best_fn=_value,
            cleanup_tmp_directories=True,
            async_options=ocp.options.AsyncOptions(
                barrier_sync_fn=self._barrier, post_finalization_callback=self._add_digests
            ),
        )
        try:
            with writing(self.directory, "set `checkpoints` or `output` to another directory"):
                if is_main() and self.directory.exists():
                    for path in self.directory.iterdir():
                        if ocp.utils.TMP_DIR_SUFFIX in path.name:
                            _log.warning("%s is half-written: it is not used, and removed", path)
                            _remove(path)
                if is_main():
                    self.directory.mkdir(parents=True, exist_ok=True)
                wait(f"made {self.directory}")
                self._manager = ocp.CheckpointManager(self.directory, options=options)
        except ImportError as error:  # each kind of object store has a package of its own
            raise ValueError(f"checkpoints are to go to {self.directory}: {error}") from error
        self.last = self._manager.latest_step() or 0  # 0: there is none
        self.good = 0  # the last one that is known to be whole on disk

    def save(self, step: int, state: State, position: Mapping, value: float | None = None) -> None:
        """Saves the state after `step` steps, unless it is the last one saved; `state` may be used
        up when this returns.

        Args:
          position: JSON values, where the run goes on.
          value: the larger, the better the state; None or a value that is not finite is no best.

        Raises OSError, also for the save before, if it cannot be written, and FloatingPointError
        for a state that is not finite; those before stay.
        """
        if step == self.last:
            return
        check_finite(state, f"the state after step {step} is not saved")
        self.wait()
        if group_size() == 1 and jax.process_count() > 1:
            state = jax.device_get(state)  # Orbax takes no array that one process of several has
        meta = {"config": self.config_text, "position": dict(position)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        finite = value is not None and math.isfinite(value)
        self.last = step
        with self._told():
            self._manager.save(
                step, args=items, metrics={"value": value} if finite else None, force=True
            )

    def restore(self, state: State) -> tuple[int, State, dict] | None:
        """(step, state, position) of the last good checkpoint; None if there is no checkpoint.

        `state` gives shapes, dtypes and shardings: of arrays, or `jax.ShapeDtypeStruct`s. A damaged
        checkpoint is named in a warning, moved aside, and the one before it is used.

        Raises ValueError naming the keys if the run's config was another, and naming the
        checkpoints if all of them are damaged; then nothing is moved.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found, position = self._load(step, state)
            except _Damaged as error:
                damaged[step] = str(error)
                continue
            self._set_aside(damaged)
            self.last = self.good = step
            return step, found, position
        if damaged:
            named = "; ".join(f"{step}: {fault}" for step, fault in damaged.items())
            raise ValueError(
                f"every checkpoint in {self.directory} is damaged ({named}): bring back a good "
                "one, or remove the directory to begin anew"
            )
        if self.start is None:
            return None
        directory, step, part_of = self.start
        found, position = _read_start(directory, step, state)
        return step, found, part_of(position)

    def wait(self) -> None:
        """Waits until the last checkpoint is whole on disk. Raises OSError if it cannot be."""
        with self._told():
            self._manager.wait_until_finished()
        self.good = self.last

    def close(self) -> None:
        """Waits for what is being written, and lets go of the directory."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _load(self, step: int, state: State) -> tuple[State, dict]:
        path = self.directory / str(step)
        _check_whole(path)
        meta = self._read(step, meta=ocp.args.JsonRestore())
        old, new = yaml.safe_load(meta["config"]), yaml.safe_load(self.config_text)
        same_config(old, new, self.directory, SIZES)
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        return self._read(step, state=ocp.args.StandardRestore(target)), meta["position"]

    def _read(self, step: int, **item):
        return _restore(self._manager, step, **item)

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """Orbax waits here for the other processes, in the background; the first time of a save
        when this one's files are there, and all digests of them with this."""
        if _WRITTEN in key:
            write_part(self._unfinished(), self._rank)
        processes = self._processes.active_processes
        ocp.multihost.get_barrier_sync_fn(processes=processes)(key=key, timeout_ms=timeout_ms)

    def _add_digests(self) -> None:
        """Orbax calls it when every file of the checkpoint is there, and commits it afterwards; in
        the first process alone."""
        write_digests(self._unfinished(), self._size)

    def _unfinished(self) -> epath.Path:
        """Where the checkpoint that is being saved is until it is committed."""
        path = self.directory / f"{self.last}{ocp.utils.TMP_DIR_SUFFIX}"
        # Object stores have no rename: there the files are where they will be.
        return path if path.exists() else self.directory / str(self.last)

    def _set_aside(self, damaged: Mapping[int, str]) -> None:
        for step, fault in damaged.items() if is_main() else ():
            path = self.directory / str(step)
            new = _unused(self.directory / f"damaged-{step}")
            _log.warning(
                "checkpoint %s is damaged (%s): the one before it is used, and it is now %s",
                path,
                fault,
                new.name,
            )
            path.rename(new)
        if damaged:
            wait(f"set aside {sorted(damaged)}")
            self._manager.reload()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except _ERRORS as error:
            good = f"the last good one is that of step {self.good}" if self.good else "none is"
            raise OSError(
                f"the checkpoint of step {self.last} cannot be written to {self.directory}, {good} "
                f"there: {REMEDY}. What was said: {error}"
            ) from error


def checkpoint_steps(directory: epath.PathLike) -> list[int]:
    """Steps of which there is a checkpoint, damaged or not; nothing is written."""
    directory = _place(directory)
    if not directory.exists():
        return []
    return sorted(numbered(directory))


def best_step(directory: epath.PathLike) -> int | None:
    """The step whose checkpoint has the largest value, the last of equal ones as in `keep_best`;
    None where none has one. Nothing is written."""
    found = []
    for step in checkpoint_steps(directory):
        path = _place(directory) / str(step) / "metrics" / "metrics"
        if path.exists():
            found.append((_value(json.loads(path.read_text())), step))
    return max(found)[1] if found else None


def read_checkpoint_params(directory: epath.PathLike, step: int, params: dict) -> dict:
    """The parameters alone of a checkpoint, also of a run that goes on; nothing is written.

    `params` gives shapes, dtypes and shardings. Raises ValueError where it is damaged.
    """
    path = _place(directory) / str(step)
    fault = find_fault(path)
    wanted = {"params": jax.tree.map(ocp.utils.to_shape_dtype_struct, params)}
    arguments = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    try:
        if fault is None:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                return reader.restore(path / "state", args=arguments)["params"]
    except _ERRORS as error:
        fault = f"it cannot be restored: {error}"
    raise ValueError(f"checkpoint {path} is damaged ({fault}): take another step")


def _read_start(directory: epath.PathLike, step: int, state: State) -> tuple[State, dict]:
    """State and position of a checkpoint of another run, whatever its config; nothing is written.
    Raises ValueError where it is damaged, or of a state of other shapes."""
    place = _place(directory)
    try:
        _check_whole(place / str(step))
        options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=_processes())
        with ocp.CheckpointManager(place, options=options) as manager:
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            meta = _restore(manager, step, meta=ocp.args.JsonRestore())
            found = _restore(manager, step, state=ocp.args.StandardRestore(target))
    except _Damaged as error:
        raise ValueError(f"start: checkpoint {place / str(step)}: {error}") from error
    return found, meta["position"]


def _restore(manager: ocp.CheckpointManager, step: int, **item):
    try:
        found = manager.restore(step, args=ocp.args.Composite(**item))
    except _ERRORS as error:
        raise _Damaged(f"it cannot be restored: {error}") from error
    return found[next(iter(item))]


def _processes() -> ocp.options.MultiprocessingOptions:
    """Those that save and restore together."""
    here = {*members()}
    active = here if len(here) < jax.process_count() else None  # None: all
    return ocp.options.MultiprocessingOptions(primary_host=min(here), active_processes=active)


def _check_whole(path: epath.Path) -> None:
    """Raises _Damaged naming what is wrong with a checkpoint; all processes together."""
    faults = gather(find_fault(path, group_rank(), group_size()))
    if fault := next(filter(None, faults), None):
        raise _Damaged(fault)


def _place(directory: epath.PathLike) -> epath.Path:
    """Orbax takes no path that is relative."""
    path = epath.Path(directory)
    return path if is_url(path) else path.absolute()


def _remove(path: epath.Path) -> None:
    """Removes a half-written checkpoint. After a save that failed in this process the array store
    may go on to write for a while, so it is gone when it stays away."""
    for _ in range(100):
        try:
            path.rmtree(missing_ok=True)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
        time.sleep(0.05)
        if not path.exists():
            return
    raise OSError(errno.ENOTEMPTY, "something goes on to write into it", str(path))


def _value(metrics: Mapping[str, float]) -> float:
    return metrics["value"]


def _unused(path: epath.Path) -> epath.Path:
    number = 0
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name.split('.')[0]}.{number}")
    return path
