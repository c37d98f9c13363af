"""Random keys of lines of text, made on the host: the Threefry keys that jax.random gives, bit for
bit, without waiting for a device that is at work.

The key of a line is folded from its parent's: of n samples from their prompt's seed, of branches
from the line that forks. The token at a position is drawn with a key folded once more, on the
device (sampling.py).
"""

import numpy as np

BRANCH, TOKEN = 0, 1  # the two streams of a line's key
PRNG = "threefry2x32"  # what jax.random calls the implementation of these keys

_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
_PARITY = 0x1BD11BDA


def seed_keys(seeds) -> np.ndarray:
    """The keys uint32[..., 2] of seeds in [0, 2**32)."""
    seeds = np.asarray(seeds, np.uint32)
    return np.stack([np.zeros_like(seeds), seeds], axis=-1)


def branch_keys(keys: np.ndarray, count: int) -> np.ndarray:
    """The keys uint32[..., count, 2] of lines 0 to count - 1 that grow from each of the lines with
    these `keys` uint32[..., 2]."""
    return fold_in(fold_in(keys[..., None, :], [BRANCH]), np.arange(count))


def fold_in(keys: np.ndarray, numbers) -> np.ndarray:
    """Keys uint32[..., 2] folded with numbers of such a shape (...), or one that broadcasts, as
    jax.random does it: uint32[..., 2]. One of the two has one dimension more than none.

    Threefry-2x32 with 20 rounds (Salmon et al., 2011) of the block (0, number).
    """
    high, low = keys[..., 0], keys[..., 1]
    schedule = high, low, high ^ low ^ np.uint32(_PARITY)
    low = np.asarray(numbers).astype(np.uint32) + low
    high = np.zeros_like(low) + high
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            high = high + low
            low = (low << np.uint32(rotation) | low >> np.uint32(32 - rotation)) ^ high
        high = high + schedule[(group + 1) % 3]
        low = low + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return np.stack([high, low], axis=-1)
