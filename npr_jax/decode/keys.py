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


def seed_key(seed: int) -> np.ndarray:
    """The key uint32[2] of a seed in [0, 2**32)."""
    return np.array([0, seed], np.uint32)


def branch_keys(key: np.ndarray, count: int) -> list[np.ndarray]:
    """The keys uint32[2] of lines 0 to count - 1 that grow from the line with this `key`."""
    (stream,) = fold_in(key, np.array([BRANCH]))
    return list(fold_in(stream, np.arange(count)))


def fold_in(key: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """A key uint32[2] folded with each of N numbers, as jax.random does it: uint32[N, 2].

    Threefry-2x32 with 20 rounds (Salmon et al., 2011) of the block (0, number).
    """
    schedule = np.array([key[0], key[1], key[0] ^ key[1] ^ np.uint32(_PARITY)], np.uint32)[:, None]
    high = np.zeros(len(numbers), np.uint32) + schedule[0]
    low = np.asarray(numbers, np.uint32) + schedule[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            high = high + low
            low = (low << np.uint32(rotation) | low >> np.uint32(32 - rotation)) ^ high
        high = high + schedule[(group + 1) % 3]
        low = low + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return np.stack([high, low], axis=1)
