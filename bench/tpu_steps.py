"""The engine's decode step, lowered for TPU chips that need not exist."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from npr_jax import EngineConfig
from npr_jax.base.mesh import MeshConfig, local_decode_mesh, make_mesh
from npr_jax.decode.attention import Shared
from npr_jax.decode.lanes import Lanes
from npr_jax.decode.steps import Rows, compiled_steps, pool_shape, pool_spec
from npr_jax.decode.tables import Tables
from npr_jax.model import ModelConfig, abstract_params
from npr_jax.model.sharding import decode_shardings

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}  # hosts of four chips


def chips(kind: str) -> list:
    """The devices of a host."""
    from jax.experimental import topologies  # asks for libtpu

    found = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[kind])
    return list(found.devices)


def tensor_mesh(devices: list) -> Mesh:
    """All of them as one replica."""
    made = make_mesh(MeshConfig(tensor=len(devices)), devices)
    assert made is not None
    return local_decode_mesh(made)


def lower_decode(
    config: ModelConfig, engine: EngineConfig, place: Mesh | jax.Device, width: int | None = None
) -> jax.stages.Lowered:
    """The step with bfloat16 weights and pages and the TPU kernels, on a chip or a mesh; `width`
    lanes are picked out of all, or none are."""
    mesh = place if isinstance(place, Mesh) else None

    def sharding(spec=None):
        return SingleDeviceSharding(place) if mesh is None else NamedSharding(mesh, spec or P())

    def put(tree, spec=None):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(spec)), tree
        )

    params = put(abstract_params(config, "bfloat16"))
    pool_sharding = sharding(mesh and pool_spec(config, "pallas", mesh))
    if mesh is not None:
        params = jax.tree.map(
            lambda x, on: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on),
            params,
            decode_shardings(config, mesh),
        )
    shape = pool_shape(config, "pallas", engine.pages, engine.page_size)
    pool = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=pool_sharding)
    steps = compiled_steps(config, "pallas", engine.steps, mesh, engine.max_logprobs)
    rows = put(Rows.empty(engine.lanes, engine.longest_table), P("data"))
    tables = Tables(rows, engine.page_size, steps.write)
    seen = jax.ShapeDtypeStruct((engine.lanes, config.padded_vocab_size), jnp.uint16)
    lanes = Lanes(engine, tables, put(seen, P("data")), steps.mark, put, put)
    pick = None if width is None else put(jax.ShapeDtypeStruct((width,), jnp.int32), P("data"))
    shared = put(Shared.nothing(width or engine.lanes), P("data"))
    least = put(jax.ShapeDtypeStruct((1,), jnp.int32), P("data"))
    limit = put(jax.ShapeDtypeStruct((), jnp.int32))
    arguments = *lanes.arguments([], []), pick, shared, least, limit
    return steps.decode.lower(params, pool, *arguments)
