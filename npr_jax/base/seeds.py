"""Seeds that depend on what they are for, and on nothing else."""

import hashlib
import json

import numpy as np


def derive_seeds(num: int, *path: int) -> list[int]:
    """`num` seeds in [0, 2**31) that depend on the integers of `path` (seed, stage, step, ...)."""
    return [int(x) >> 1 for x in np.random.SeedSequence(path).generate_state(num)]


def seed_of(*path: int | str) -> int:
    """One seed below 2**32 that depends on the integers and names of `path`."""
    digest = hashlib.sha256(json.dumps(path).encode()).digest()
    return int.from_bytes(digest[:4], "big")
