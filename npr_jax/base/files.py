"""Writing that a crash leaves whole: the old file or the new one, never half of one."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from etils import epath
from safetensors import SafetensorError

REMEDY = (
    "make room there, or move the run to where it can be written, and run the same command again: "
    "it goes on from the last checkpoint"
)


def is_url(path: epath.PathLike) -> bool:
    """Whether `path` is in an object store, where there is no rename and no fsync."""
    return "://" in str(path)


def write_atomically(path: epath.PathLike, data: bytes) -> None:
    """Replaces the content of `path`, on disk when this returns."""
    if is_url(path):  # an object is seen once it is whole
        epath.Path(path).write_bytes(data)
        return
    path = Path(path)
    new = path.with_name(path.name + ".tmp")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    _sync(path.parent)


def publish(directory: Path, write: Callable[[Path], None]) -> None:
    """Makes a directory that is there as a whole or not at all; `write(path)` fills it."""
    new = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(new, ignore_errors=True)
    write(new)
    for path in new.rglob("*"):
        _sync(path)
    new.replace(directory)
    _sync(directory.parent)


def cut_half_line(path: Path) -> None:
    """Cuts off the last line of a file that is there if it was not written whole."""
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:  # from the end on in pieces: the file may be large, and so may its lines
            start = max(0, end - (1 << 20))
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            file.truncate(end)


@contextlib.contextmanager
def writing(path: epath.PathLike, remedy: str = REMEDY) -> Iterator[None]:
    """An error of writing in here (disk full, no permission) names `path` and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{path} cannot be written ({reason}): {remedy}") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
