"""Train states that tell themselves apart, and what a directory holds, for tests of checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np

from npr_jax.train.optimizer import OptimizerConfig, new_state

TEXT = "seed: 0\n"
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)


def make_state(number, sharding=None):
    """A train state of 0.8 MB whose every array tells `number`."""
    rng = np.random.default_rng(number)
    state = new_state({"w": jnp.asarray(rng.normal(size=(256, 256)), jnp.float32)}, OPTIMIZER)
    state = jax.tree.map(lambda x: x + number, state)
    if sharding:
        state = jax.tree.map(lambda x: jax.device_put(x, sharding(x)), state)
    return state


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in leaves)


def content(directory):
    return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def steps_in(directory):
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def data_file(checkpoint):
    """The largest file: the arrays."""
    return max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(checkpoint):
    path = data_file(checkpoint)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
