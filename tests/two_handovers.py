"""One of two processes of four devices, one of which trains and the other rolls out, for the tests.

    python tests/two_handovers.py FILE

Writes the digest of the bits that were to arrive, and of those that have.
"""

import dataclasses
import hashlib
import sys

import jax
import numpy as np
from jax.sharding import Mesh

from npr_jax.base.distributed import group, initialize
from npr_jax.base.mesh import MeshConfig, local_decode_mesh, make_mesh, rollout_mesh, sides
from npr_jax.model import PRESETS
from npr_jax.model.params import init_params
from npr_jax.model.sharding import place_params, train_shardings
from npr_jax.train.handover import Handover

initialize()
config = dataclasses.replace(PRESETS["tiny"], hidden_size=96, num_heads=4, num_kv_heads=2)


def digest(params) -> str:
    found = hashlib.sha256()
    for path, x in sorted(jax.tree.leaves_with_path(params), key=lambda at: str(at[0])):
        whole = np.asarray(jax.device_get(x.astype("float32")))
        found.update(f"{path}{whole.shape}".encode() + whole.tobytes())
    return found.hexdigest()


for dtype, mesh in (
    ("bfloat16", MeshConfig(fsdp=2, tensor=2, rollout=4)),
    ("float32", MeshConfig(data=-1, rollout=4)),
    ("float32", MeshConfig(tensor=4, rollout=4)),  # more shards than KV heads
):
    if mesh.tensor == 4:
        config = dataclasses.replace(config, num_kv_heads=4)
    params = init_params(config, jax.random.key(0))
    params["final_norm"] = params["final_norm"].at[0].set(-0.0)  # a bit that a sum would lose
    wanted = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
    local = local_decode_mesh(rollout_mesh(mesh)) if jax.process_index() else None
    handover = Handover(config, dtype, *sides(mesh), local)
    if jax.process_index():
        arrived = handover.receive()
        assert all(isinstance(x.sharding.mesh, Mesh) for x in jax.tree.leaves(arrived))
        with open(sys.argv[1], "a", encoding="utf-8") as file:
            print(digest(wanted), digest(arrived), file=file)
    else:
        with group([0]):
            there = place_params(params, train_shardings(config, make_mesh(mesh)))
            packed = handover.pack(there)
        handover.send(packed)
