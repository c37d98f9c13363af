"""A file of digests beside the files of a checkpoint tells whether they are what was written."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from npr_jax.base.files import write_atomically

NAME = "digests.json"
# Orbax writes these two when it commits, after the digests; nothing is restored from them.
_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")
_CHUNK = 1 << 24


def write_digests(directory: epath.Path) -> None:
    """Writes the SHA-256 of every file below `directory` into it."""
    write_atomically(directory / NAME, json.dumps(_digests(directory), indent=0).encode())


def find_fault(directory: epath.Path) -> str | None:
    """What is wrong with a directory that has been through `write_digests`; None if nothing is."""
    path = directory / NAME
    if not path.is_file():
        return f"half-written: it has no {NAME}"
    try:
        expected = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        return f"{NAME} is damaged: {error}"
    if not isinstance(expected, dict):
        return f"{NAME} is damaged: it holds {type(expected).__name__}, needed is an object"
    found = _digests(directory)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if found[name] != expected.get(name):
            return f"{name} is not what was written"
    return None


def _digests(directory: epath.Path) -> dict[str, str]:
    files = list(_files(directory))
    with ThreadPoolExecutor(4) as pool:  # hashing leaves the interpreter's lock
        digests = pool.map(_digest, files)
        return {f.relative_to(directory).as_posix(): d for f, d in zip(files, digests, strict=True)}


def _files(directory: epath.Path) -> Iterator[epath.Path]:
    for path in directory.iterdir():
        if path.is_dir():
            yield from _files(path)
        elif path.name not in (NAME, *_LATER):
            yield path


def _digest(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
