"""A file of digests beside the files of a checkpoint tells whether they are what was written.

Every process has a directory of arrays of its own in there, which is nearly all of it. Each takes
the digests of what it has written, and leaves them as a small file; the first adds those of what is
left, and makes one file of all. Whole is a checkpoint that has it. When it is read, the processes
share the files in the same way, however many there are then.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from etils import epath
from orbax.checkpoint.utils import TMP_DIR_SUFFIX

from npr_jax.base.files import write_atomically

NAME = "digests.json"
# Orbax writes these two when it commits, after the digests; nothing is restored from them.
_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")
_PART = re.compile(r"digests-[0-9]+\.json")
_CHUNK = 1 << 24


def write_part(directory: epath.Path, process: int) -> None:
    """Writes the SHA-256 of the files that a process has written below `directory`, when all are
    there."""
    digests = _digests(directory, lambda name: _writer(name) == process)
    write_atomically(_part(directory, process), _text(digests))


def write_digests(directory: epath.Path, processes: int = 1) -> None:
    """Writes the SHA-256 of every file below `directory` into it; where there are several
    processes, with those that they have left by `write_part`.

    Raises FileNotFoundError where one of them has not.
    """
    digests, parts = {}, [_part(directory, process) for process in range(processes)]
    if processes > 1:
        for part in parts:
            digests |= json.loads(part.read_text())
    digests |= _digests(directory, lambda name: name not in digests)
    write_atomically(directory / NAME, _text(digests))
    if processes > 1:
        for part in parts:
            part.unlink()


def find_fault(directory: epath.Path, process: int = 0, processes: int = 1) -> str | None:
    """What is wrong with the share of a process in a directory that has been through
    `write_digests`; None if nothing is."""
    path = directory / NAME
    if not path.is_file():
        return f"half-written: it has no {NAME}"
    try:
        expected = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        return f"{NAME} is damaged: {error}"
    if not isinstance(expected, dict):
        return f"{NAME} is damaged: it holds {type(expected).__name__}, needed is an object"

    def mine(name: str) -> bool:
        return (_writer(name) or 0) % processes == process

    expected = {name: digest for name, digest in expected.items() if mine(name)}
    found = _digests(directory, mine)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if found[name] != expected.get(name):
            return f"{name} is not what was written"
    return None


def _part(directory: epath.Path, process: int) -> epath.Path:
    return directory / f"digests-{process}.json"


def _text(digests: Mapping[str, str]) -> bytes:
    return json.dumps(digests, indent=0, sort_keys=True).encode()


def _writer(name: str) -> int | None:
    """Which process writes a file; None where all do, or the first at the very end."""
    own = re.search(r"(?:^|/)ocdbt\.process_([0-9]{1,9})/", name)
    return int(own[1]) if own else None


def _digests(directory: epath.Path, wanted: Callable[[str], bool]) -> dict[str, str]:
    files = {_name(file, directory): file for file in _files(directory)}
    files = {name: file for name, file in files.items() if wanted(name)}
    with ThreadPoolExecutor(4) as pool:  # hashing leaves the interpreter's lock
        return dict(zip(files, pool.map(_digest, files.values()), strict=True))


def _name(file: epath.Path, directory: epath.Path) -> str:
    """Where a file is in there once the checkpoint is committed."""
    return file.relative_to(directory).as_posix().replace(TMP_DIR_SUFFIX, "")


def _files(directory: epath.Path) -> Iterator[epath.Path]:
    for path in directory.iterdir():
        if path.is_dir():
            yield from _files(path)
        elif path.name not in (NAME, *_LATER) and not _PART.fullmatch(path.name):
            yield path


def _digest(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
