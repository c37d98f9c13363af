"""Seeds that depend on what they are for, and on nothing else."""

import numpy as np


def derive_seeds(num: int, *path: int) -> list[int]:
    """`num` seeds in [0, 2**31) that depend on the integers of `path` (seed, stage, step, ...)."""
    return [int(x) >> 1 for x in np.random.SeedSequence(path).generate_state(num)]
