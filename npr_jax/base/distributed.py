"""Several processes as one run: starting, sharing small values, and ending together.

Every process runs the same program with its own part of the data; arrays on the mesh are the only
thing that XLA moves between them inside a step. Process 0 writes what a run tells.

Where some processes train and others roll out, each of the two sides is a `group`: all that is said
here of "all processes" is then of those of the group, in which the first is `is_main`.
"""

import contextlib
import functools
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from npr_jax.base.parts import part

T = TypeVar("T")

_VARIABLES = ("NPR_COORDINATOR", "NPR_PROCESSES", "NPR_PROCESS")
HEARTBEAT_SECONDS = 30
_PIECE = 1 << 22  # bytes that a process sends to another at a time


def initialize() -> None:
    """Joins this process to the others, before anything else of JAX runs.

    NPR_COORDINATOR (host:port of process 0), NPR_PROCESSES and NPR_PROCESS (this one's number) say
    who they are; without them JAX asks the platform: TPU pods, Slurm, Open MPI, Kubernetes.

    Raises ValueError where some of the variables are missing or are no numbers.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    given = {name: os.environ.get(name, "") for name in _VARIABLES}
    arguments: dict = {}
    if any(given.values()):
        missing = [name for name in _VARIABLES if not given[name]]
        if missing:
            raise ValueError(f"{', '.join(missing)} not set, needed are all of {_VARIABLES}")
        for name in _VARIABLES[1:]:
            if not given[name].isdigit():
                raise ValueError(f"{name} is {given[name]!r}, needed is a number")
        arguments = dict(
            coordinator_address=given["NPR_COORDINATOR"],
            num_processes=int(given["NPR_PROCESSES"]),
            process_id=int(given["NPR_PROCESS"]),
        )
    # SIGTERM is ours (runs/sigterm.py): JAX's own handler would only tell itself.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


_group: tuple[int, ...] | None = None  # processes; None: all


@contextlib.contextmanager
def group(processes: Sequence[int] | None) -> Iterator[None]:
    """In here this process works with these alone, of which it is one; None: with all."""
    global _group
    outer, _group = _group, None if processes is None else tuple(processes)
    try:
        yield
    finally:
        _group = outer


def members() -> tuple[int, ...]:
    """The processes, by JAX's numbers."""
    return _group or tuple(range(jax.process_count()))


def group_size() -> int:
    """How many processes there are."""
    return len(members())


def group_rank() -> int:
    """The number of this one among them, from 0."""
    return members().index(jax.process_index())


def is_main() -> bool:
    """Whether this process writes what a run tells."""
    return group_rank() == 0


def mine(items: Sequence[T]) -> Sequence[T]:
    """This process's share: the shares of all processes are disjoint, and together everything."""
    return items[group_rank() :: group_size()]


def gather(value: T) -> list[T]:
    """The values of all processes in their order; all make the call together. For small values."""
    known = members()
    if len(known) == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    with part("wait"):
        sizes = _all_gather(known, np.array([len(data)], np.int32))[:, 0]
        longest = 1 << int(sizes.max() - 1).bit_length()  # a program for each
        found = _all_gather(known, np.pad(data, (0, longest - len(data))))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(found, sizes, strict=True)]


def _all_gather(known: tuple[int, ...], row: np.ndarray) -> np.ndarray:
    """Rows [P, L] of these processes, of which this one gives one."""
    mesh = _mesh(known)
    array = jax.make_array_from_process_local_data(NamedSharding(mesh, P("process")), row[None])
    return np.asarray(_same(mesh, P())(array).addressable_data(0))


def gather_all(items: Sequence[T]) -> list[T]:
    """The items of all processes, those of process 0 first."""
    return [item for part in gather(list(items)) for item in part]


def exchange(values: Sequence[T]) -> list[T]:
    """Sends values[p] to every process p; what each process sends to this one, in their order.

    All make the call together. For large values, of which each has one receiver: the devices send
    them in all-to-alls of at most `_PIECE` bytes for each pair of processes, so that few shapes are
    compiled, and nobody holds what is for others.
    """
    processes = group_size()
    if processes == 1:
        return [values[0]]
    sent = [np.frombuffer(pickle.dumps(value, protocol=5), np.uint8) for value in values]
    sizes = np.array(gather([len(data) for data in sent]))  # [sender, receiver]
    size = min(_PIECE, 1 << int(sizes.max() - 1).bit_length())
    rounds = -(-int(sizes.max()) // size)
    padded = np.zeros((processes, rounds * size), np.uint8)
    for row, data in zip(padded, sent, strict=True):
        row[: len(data)] = data
    mesh = _mesh(members())
    turn = _same(mesh, P(None, "process"))
    received = []
    for first in range(0, rounds * size, size):
        piece = padded[None, :, first : first + size]
        array = jax.make_array_from_process_local_data(NamedSharding(mesh, P("process")), piece)
        received.append(np.asarray(turn(array).addressable_data(0))[:, 0])
    whole = np.concatenate(received, axis=1)
    return [
        pickle.loads(data[:size].tobytes())
        for data, size in zip(whole, sizes[:, group_rank()], strict=True)
    ]


@functools.cache
def _mesh(processes: tuple[int, ...]) -> Mesh:
    """Of one device of each of these processes."""
    first = {device.process_index: device for device in reversed(jax.devices())}
    devices = np.array([first[process] for process in processes])
    return Mesh(devices, ("process",), axis_types=(AxisType.Auto,))


@functools.cache
def _same(mesh: Mesh, spec: P) -> Callable:
    """The compiled x -> x, which lies as `spec` says."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, spec))


def to_host(tree):
    """The whole arrays of a pytree as numpy arrays, in every process."""
    if group_size() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def wait(name: str) -> None:
    """Waits until every process is here."""
    here = gather(name)
    assert len({*here}) == 1, here  # all make the call together


@contextlib.contextmanager
def ends_together(tell: Callable[[BaseException], int]) -> Iterator[None]:
    """Ends this process at once where an error is raised inside, if it is one of several: waiting
    for the others to agree on an orderly end, as JAX does, would hang them all. The others notice,
    by a broken connection or a missing heartbeat, and end too.

    `tell(error)` prints what a user must know and returns the exit code.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        code = tell(error)
        if not isinstance(error, SystemExit):  # which comes of a signal, and all processes end
            print(
                f"process {jax.process_index()} of {jax.process_count()} ends. Where this is about "
                "a connection, a peer or a heartbeat, another process has ended first: its own "
                "output says why. The same command goes on from the last checkpoint.",
                file=sys.stderr,
            )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
