"""One of two processes that save a checkpoint together and read it, for the tests.

    python tests/two_checkpoints.py DIRECTORY

Prints JSON: which files it has read to take their digests, when it was saved and when it was
restored, and what was said of one with a flipped bit in what the second process had written.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from checkpoint_checks import TEXT, flip, make_state
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from npr_jax.base.distributed import initialize, is_main, wait
from npr_jax.runs import digest
from npr_jax.runs.checkpoint import Checkpoints

initialize()
directory = Path(sys.argv[1])
mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))


def sharded(number):
    state = make_state(number)  # the same in both

    def put(x):
        sharding = NamedSharding(mesh, P("fsdp") if x.ndim == 2 else P())
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)

    return jax.tree.map(put, state)


def same(a, b):
    def equal(x, y):
        pairs = zip(x.addressable_shards, y.addressable_shards, strict=True)
        return all(np.array_equal(p.data, q.data) for p, q in pairs)

    return all(jax.tree.leaves(jax.tree.map(equal, a, b)))


read: list[str] = []
take = digest._digest


def recorded(path):
    read.append(path.as_posix())
    return take(path)


digest._digest = recorded
told = {}
with Checkpoints(directory, TEXT, keep=2) as checkpoints:
    checkpoints.save(1, sharded(1), {"problem": 7})
    checkpoints.save(2, sharded(2), {"problem": 9})
told["saved"], read = read, []
with Checkpoints(directory, TEXT, keep=2) as checkpoints:
    step, state, position = checkpoints.restore(sharded(0))
    assert (step, position) == (2, {"problem": 9}) and same(state, sharded(2))
told["restored"] = read
wait("restored")
if is_main():
    flip(directory / "2" / "state" / "ocdbt.process_1")
wait("flipped")
with Checkpoints(directory, TEXT, keep=2) as checkpoints:
    step, state, _ = checkpoints.restore(sharded(0))
    assert step == 1 and same(state, sharded(1))
print(json.dumps(told))
