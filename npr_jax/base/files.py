"""Files: what an error of theirs means, and writing that a crash leaves whole: the old file or the
new one, never half of one."""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from etils import epath
from safetensors import SafetensorError

REMEDY = (
    "make room there, or move the run to where it can be written, and run the same command again: "
    "it goes on from the last checkpoint"
)

DEMO = Path("runs/demo")  # what the tiny presets start from

# What may pass without anybody changing the command: a full disk is emptied, a network comes back.
_PASSING = {
    *(errno.EAGAIN, errno.EINTR, errno.EIO, errno.EBUSY, errno.ETXTBSY, errno.ENOLCK, errno.ESTALE),
    *(errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE),
    *(errno.EPIPE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNREFUSED, errno.ECONNRESET),
    *(errno.ECONNABORTED, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN),
    *(errno.EHOSTUNREACH, errno.EADDRINUSE, errno.EADDRNOTAVAIL),
}


def lasting(error: BaseException | None) -> bool:
    """Whether the same command would meet this error again, so that trying again helps nobody.

    An error of the system is judged by its errno, or by that of the error that it was raised from;
    one that has none by its class.
    """
    if not isinstance(error, OSError):
        return isinstance(error, ValueError | FloatingPointError)
    if error.errno is not None:
        return error.errno not in _PASSING
    classes = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
    return isinstance(error, classes) or lasting(error.__cause__)


def describe(error: BaseException) -> str:
    """An error in one line, without the number that Python puts before one of the system."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        text = ": ".join([*dict.fromkeys(names), _reason(error)])
    return "; ".join(line.strip() for line in text.splitlines() if line.strip()) or repr(error)


def absent(path: str | Path) -> str:
    """Says that nothing is at a path, where it was looked for, and that the demo would make it."""
    path = Path(path)
    where = "" if path.is_absolute() else f" in {Path.cwd()}"
    hint = f"; run `npr-jax demo` first, which makes {DEMO}" if DEMO in path.parents else ""
    return f"there is no {path}{where}{hint}"


@contextlib.contextmanager
def reading(path: str | Path, needed: str) -> Iterator[None]:
    """An error of opening or reading `path` in here says what is wrong with it and what is `needed`
    there. Raises the same class of error; ValueError at once for what is no regular file, such as
    a pipe: it would be waited for, and could not be read a second time."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise ValueError(f"{path} is a pipe or a device, needed is a file: {needed}")
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{absent(path)}; needed is {needed}") from error
    except IsADirectoryError as error:
        raise IsADirectoryError(f"{path} is a directory, needed is {needed}") from error
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(
            f"{path} cannot be read ({_reason(error)}), needed is {needed}"
        ) from error


def read_text(path: str | Path, needed: str) -> str:
    """The text of a file, without byte order mark; errors as in `reading`, ValueError where it is
    not UTF-8."""
    with reading(path, needed):
        data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start + 1}), needed is {needed}"
        ) from error


def hub_error(message: str, error: Exception) -> FileNotFoundError:
    """What is raised where the Hugging Face hub gave nothing. It is no lasting error where the hub
    could not be reached and may be another time."""
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import LocalEntryNotFoundError

    found = FileNotFoundError(f"{message}: {describe(error)}")
    status = getattr(getattr(error, "response", None), "status_code", 0)
    unreached = isinstance(error, LocalEntryNotFoundError) and not is_offline_mode()
    if unreached or status == 429 or status >= 500:
        found.errno = errno.EHOSTUNREACH
    return found


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keeps other processes out of a file or directory that is there: ValueError if one is in.

    The system forgets it when the process ends, however it ends. A file system that has no locks
    keeps nobody out.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is writing {path}: wait for it, or give another output"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
        yield
    finally:
        os.close(handle)


def _reason(error: OSError) -> str:
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]


def is_url(path: epath.PathLike) -> bool:
    """Whether `path` is in an object store, where there is no rename and no fsync. A `Path` of one
    has lost a slash."""
    return re.match(r"[A-Za-z][\w+.-]+:/", str(path)) is not None


def json_text(value, **options) -> str:
    """JSON as the standard has it: numbers that are not finite, which it cannot write, are null.

    `options`: of `json.dumps`. Every file of JSON is written through it.
    """
    return json.dumps(_with_null(value), allow_nan=False, **options)


def _with_null(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _with_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_null(item) for item in value]
    return value


def without_twins(pairs: list[tuple[str, Any]]) -> dict:
    """An object of JSON from its pairs (`object_pairs_hook`); ValueError for a key that is given
    twice, of which other readers take one or the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"the key {twin!r:.80} is there twice")
    return found


T = TypeVar("T")


def whole_lines(path: Path, needed: str, take: Callable[[dict], T]) -> Iterator[tuple[bytes, T]]:
    """Each whole line of a file of JSON objects that may still grow, and what `take` makes of its
    object. Raises ValueError with file and line where it is none, or `take` raises."""
    with reading(path, needed):
        *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("it is no object")
            taken = take(record)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}:{number}: {why}; needed is {needed}") from error
        yield line + b"\n", taken


def write_atomically(path: epath.PathLike, data: bytes) -> None:
    """Replaces the content of `path`, on disk when this returns."""
    if is_url(path):  # an object is seen once it is whole
        epath.Path(path).write_bytes(data)
        return
    path = Path(path)
    new = _incomplete(path)
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def publish(directory: Path, write: Callable[[Path], None]) -> None:
    """Makes a directory that is there as a whole or not at all; `write(path)` fills it."""
    new = _incomplete(directory)
    shutil.rmtree(new, ignore_errors=True)
    try:
        write(new)
        sync_all(new)
        new.replace(directory)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    _sync(directory.parent)


def _incomplete(path: Path) -> Path:
    """Where `path` is written until it is whole: a name that no user gives, so that what is there
    is ours, and always the same, so that what a crash leaves is overwritten and does not add up."""
    return path.with_name(f".{path.name}.incomplete-npr-jax")


def sync_all(directory: Path) -> None:
    """Brings a directory and all it holds to the disk, before its name says that it is whole."""
    for path in (*directory.rglob("*"), directory):
        _sync(path)


def numbered(directory: epath.Path, ending: str = "") -> dict[int, epath.Path]:
    """What is named NUMBER+ending in a directory, by its number from 1, as we write such names; 007
    or ² is none."""
    name = re.compile(rf"([1-9][0-9]*){re.escape(ending)}")
    found = ((name.fullmatch(path.name), path) for path in directory.iterdir())
    return {int(match[1]): path for match, path in found if match}


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
        reason = _reason(error) if isinstance(error, OSError) else error
        raise OSError(f"{path} cannot be written ({reason}): {remedy}") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
