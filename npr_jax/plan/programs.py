"""The programs of a stage as they are compiled for a slice that need not exist, and what they take.

Only arrays' shapes exist here.
"""

import dataclasses
import functools
import re
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from npr_jax.base.mesh import BATCH, batch_shards
from npr_jax.decode.attention import check_pool, empty_pool
from npr_jax.decode.lanes import Lanes
from npr_jax.decode.steps import Rows, compiled_steps, pool_shape, pool_spec
from npr_jax.decode.tables import Tables
from npr_jax.kernels import choose_attention
from npr_jax.model import ModelConfig, abstract_params
from npr_jax.model.flops import train_flops
from npr_jax.model.sharding import decode_shardings
from npr_jax.plan.hlo import collective_bytes
from npr_jax.plan.places import array_bytes
from npr_jax.plan.traffic import Program
from npr_jax.train.beta import BetaConfig
from npr_jax.train.optimizer import abstract_base, abstract_state
from npr_jax.train.packing import empty_row
from npr_jax.train.rl import RLConfig
from npr_jax.train.step import TrainConfig, compiled_step


def architecture(preset: ModelConfig, train: TrainConfig) -> ModelConfig:
    """A model as the stage trains it on a TPU."""
    attention = choose_attention(preset.attention, preset.head_dim, "tpu")
    return dataclasses.replace(train.model(preset), attention=attention)


def train_step(arch: ModelConfig, config: RLConfig | BetaConfig, mesh: Mesh) -> tuple:
    """The compiled train step of a stage, to be lowered, and its arguments as shapes, with a batch
    of one micro-batch."""
    train = config.train
    shape = (1, train.micro_rows * batch_shards(mesh), train.row_len)
    dtypes = {name: x.dtype for name, x in empty_row(1, config.depth).items()}
    if config.loss.kl:
        dtypes["ref_logp"] = np.dtype(np.float32)
    sharding, everywhere = NamedSharding(mesh, P(None, BATCH, "sequence")), NamedSharding(mesh, P())
    batch = {
        name: jax.ShapeDtypeStruct(
            (*shape, config.depth, 2) if name == "hidden" else shape, dtype, sharding=sharding
        )
        for name, dtype in dtypes.items()
    }
    scalars = [
        jax.ShapeDtypeStruct((), dtype, sharding=everywhere)
        for dtype in (jnp.int32, jnp.float32, jnp.float32)
    ]
    optimizer = dataclasses.replace(train.optimizer, learning_rate=0.0)  # it is an argument
    step = compiled_step(arch, optimizer, config.loss, train.compute_dtype, mesh)
    base = abstract_base(arch, train.compute_dtype, mesh)
    frozen = () if base is None else (base,)
    return step, (abstract_state(arch, train.optimizer, mesh), batch, *scalars, *frozen)


def decode_step(arch: ModelConfig, config: RLConfig | BetaConfig, mesh: Mesh) -> tuple:
    """The compiled decode step of a stage's engine on a TPU, to be lowered, and its arguments as
    shapes, with a pool of two pages a replica."""
    engine, dtype = config.engine, config.train.compute_dtype
    everywhere = NamedSharding(mesh, P())

    def array(shape, dtype, sharding=everywhere):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    params = jax.tree.map(
        lambda x, sharding: array(x.shape, x.dtype, sharding),
        abstract_params(arch, dtype),
        decode_shardings(arch, mesh),
    )
    attention = choose_attention(engine.attention, arch.head_dim, "tpu")
    # What the step needs beside the pool does not depend on how many pages there are.
    cache_dtype = jnp.dtype(engine.cache_dtype or dtype)
    check_pool(attention, cache_dtype)
    shape = pool_shape(arch, attention, mesh.shape["data"] * 2, engine.page_size)
    pages = NamedSharding(mesh, pool_spec(arch, attention, mesh))
    pool = jax.eval_shape(functools.partial(empty_pool, shape, cache_dtype))
    pool = jax.tree.map(lambda x: array(x.shape, x.dtype, pages), pool)

    def put(tree, spec=None):
        return jax.tree.map(
            lambda x: array(x.shape, x.dtype, NamedSharding(mesh, spec or P())), tree
        )

    steps = compiled_steps(arch, attention, engine.steps, mesh, engine.max_logprobs)
    num_lanes = mesh.shape["data"] * engine.lanes
    rows = put(Rows.empty(num_lanes, engine.longest_table), P("data"))
    tables = Tables(rows, engine.page_size, steps.write)
    seen = array((num_lanes, arch.padded_vocab_size), jnp.uint16, NamedSharding(mesh, P("data")))
    lanes = Lanes(engine, tables, seen, steps.mark, put, put)
    least, limit = array((mesh.shape["data"],), jnp.int32), array((), jnp.int32)
    shared = [tables.shared((-1,) * engine.lanes)] * mesh.shape["data"]
    shared = put(jax.tree.map(lambda *x: np.concatenate(x), *shared))
    arguments = *lanes.arguments([], []), None, shared, least, limit
    return steps.decode, (params, pool, *arguments)


def train_figures(
    arch: ModelConfig, train: TrainConfig, mesh: Mesh, lowered: jax.stages.Lowered
) -> dict:
    """Temporary bytes of the train step, and FLOPs and bytes of collectives of a micro-batch."""
    text, seconds, temp = compile_text(lowered)
    flops = train_flops(arch, train.micro_rows * batch_shards(mesh), train.row_len) / mesh.size
    collectives = collective_bytes(text)
    return {
        "train_temp": temp,
        "train_compile_s": seconds,
        "flops": flops,
        "collectives": collectives,
    }


def decode_figures(arch: ModelConfig, config: RLConfig | BetaConfig, mesh: Mesh) -> dict:
    """Sizes of the engine on a host, and bytes that one of its decode steps moves beside the keys
    that it reads, through memory and from other chips."""
    engine = config.engine
    decode, arguments = decode_step(arch, config, mesh)
    params, pool, *_ = arguments
    text, seconds, temp = compile_text(decode.lower(*arguments))
    kernel = text and choose_attention(engine.attention, arch.head_dim, "tpu") == "pallas"
    weights = array_bytes(params)
    return {
        "engine_weights": weights,
        "decode_temp": temp,
        "decode_compile_s": seconds,
        "page": array_bytes(pool) / 2,
        "page_tokens": engine.page_size,
        "lanes": engine.lanes,
        "replicas": mesh.shape["data"],
        # The other implementations have loops inside of the loop, as long as the tables.
        "decode_counted": "compiled" if kernel else "arithmetic",
        # What the kernel brings of the keys is counted with the answers.
        "decode_bytes": Program(text, defaultdict(float), min).bytes()[1] if kernel else weights,
        "decode_collectives": collective_bytes(text),
    }


# How the compiler says how much memory a program would take, or its temporary arrays alone.
_NO_ROOM = re.compile(
    r"(?:Used |total memory required for HLO temporaries \()([\d.]+)([KMGT])(?: of|\) exceeds)"
)


def compile_text(lowered) -> tuple[str, float, float]:
    """(text of the optimised program, seconds, temporary bytes); where the compiler found no room
    for it no text, and all the bytes that it says it needs."""
    begun = time.perf_counter()
    # As a dump: `as_text` of jax 0.10.2 fails on programs whose collectives are fused.
    with tempfile.TemporaryDirectory() as folder:
        try:
            program = lowered.compile(compiler_options={"xla_dump_to": folder})
        except jax.errors.JaxRuntimeError as error:
            used = _NO_ROOM.search(str(error))
            if used is None:
                raise
            size = float(used[1]) * 1024 ** " KMGT".index(used[2])
            return "", time.perf_counter() - begun, size
        (path,) = Path(folder).glob("*.after_optimizations.txt")
        text = path.read_text(encoding="utf-8")
    return text, time.perf_counter() - begun, program.memory_analysis().temp_size_in_bytes
