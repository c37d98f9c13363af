"""Whether a run fits a TPU slice, told by the TPU compiler on a machine that has no TPU.

    preset, stage, slice, mesh --compile the real train step and decode step--> bytes, FLOPs, time

Only arrays' shapes exist here. What is resident while a stage runs: parameters and optimizer
state, the engine's copy of the weights, the KV pool; beside them either a train step or a decode
step needs room for what it computes, or the engine's next weights. Pages are given what is left.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from npr_jax.base.config import load_config
from npr_jax.base.mesh import BATCH, MeshConfig, batch_shards, local_decode_mesh, make_mesh
from npr_jax.decode.attention import check_pool, empty_pool
from npr_jax.decode.lanes import Lanes
from npr_jax.decode.steps import Rows, compiled_steps, pool_shape, pool_spec
from npr_jax.decode.tables import Tables
from npr_jax.kernels import choose_attention
from npr_jax.model import PRESETS, ModelConfig, abstract_params, num_params
from npr_jax.model.sharding import decode_shardings
from npr_jax.plan.hlo import collective_bytes
from npr_jax.train.beta import BetaConfig
from npr_jax.train.configs import CONFIGS
from npr_jax.train.optimizer import abstract_state
from npr_jax.train.packing import empty_row
from npr_jax.train.rl import RLConfig
from npr_jax.train.rollout import STAGES
from npr_jax.train.step import TrainConfig, compiled_step

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU: the slice that a host of a larger one has, bytes of memory that a program may
    use, bf16 FLOP/s, and bytes/s of memory and of all links of a chip (the vendor's figures)."""

    host: str
    hbm: float
    flops: float
    hbm_rate: float
    link_rate: float


CHIPS = {
    "v5e": Chip("v5e:2x2", 15.75 * GIB, 197e12, 819e9, 200e9),
    "v5p": Chip("v5p:2x2x1", 95.74 * GIB, 459e12, 2765e9, 600e9),
    "v6e": Chip("v6e:2x2", 31.25 * GIB, 918e12, 1640e9, 448e9),
}


# What libtpu would ask a TPU's host for: where there is none it logs errors that mean nothing here.
# Slices are planned by their names, whatever these say.
_NO_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a compiler is not in a TPU's way
}


def stage_config(stage: str, model: str, overrides: Sequence[str] = ()) -> RLConfig | BetaConfig:
    """A stage's preset, `tiny_<stage>` for the tiny model and `qwen3_4b_<stage>` for others, with
    `a.b=value` overrides. Raises ValueError for other stages and keys."""
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}, needed is one of {', '.join(STAGES)}")
    preset = "tiny" if model == "tiny" else "qwen3_4b"
    config = load_config(CONFIGS[stage], f"{preset}_{stage}", overrides)
    assert isinstance(config, RLConfig | BetaConfig)
    return config


def plan(
    model: str,
    config: RLConfig | BetaConfig,
    topology: str,
    mesh: MeshConfig | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict:
    """Compiles a stage for a slice; figures per chip, in bytes, FLOPs and seconds.

    Args:
      model: name of a preset of `npr_jax.model.PRESETS`.
      config: of the stage; what it says of rows, loss, engine and mesh is what is compiled.
      topology: kind and shape of the slice, such as "v5p:4x4x4".
      mesh: of training; None is fsdp over all chips.
      tell: is told what is compiled.

    Returns:
      params, optimizer, engine_weights, batch: resident, beside the pool; train_temp,
      decode_temp: of the steps; page, pages, pages_wanted: of the pool; flops, collectives: of one
      micro-batch; compute_s, collective_s, least_s: the least time of it; micro_batches,
      step_least_s: of an optimizer step with answers as long as can be; decode_least_s: of one
      decode step; hbm, fits, advice.

    Raises:
      ValueError: the model, the slice or the mesh is not what can be, or there is no TPU compiler.
    """
    if model not in PRESETS:
        raise ValueError(f"model is {model!r}, needed is one of {', '.join(PRESETS)}")
    chip, devices = _slice(topology)
    made = make_mesh(mesh or MeshConfig(fsdp=-1), devices)
    if made is None:
        raise ValueError(f"{topology} has one chip, needed are several")
    config.train.check(made)
    arch = architecture(PRESETS[model], config.train)
    shards = batch_shards(made)
    step, arguments = train_step(arch, config, made)
    state = arguments[0]
    found: dict = {
        "model": model,
        "stage": config.command,
        "topology": topology,
        "mesh": {axis: size for axis, size in made.shape.items() if size > 1},
        "hbm": chip.hbm,
        "params": _bytes(state.params),
        "optimizer": _bytes(state.opt_state),
        "row_len": config.train.row_len,
        "micro_batch": config.train.micro_rows * shards,
        "micro_batches": math.ceil(config.rows / (config.train.micro_rows * shards)),
    }
    tell(f"compiling the train step for {made.size} chips")
    found |= _train_figures(arch, config.train, made, step.lower(*arguments), chip)
    local = _one_host(made, chip)
    tell(f"compiling the decode step for the {local.size} chips of a host")
    found |= _decode_figures(arch, config, local, chip)
    found["step_least_s"] = found["micro_batches"] * found["least_s"]
    resident = found["params"] + found["optimizer"] + found["engine_weights"]
    # When the engine gets new weights, both copies are there for a moment, and no step runs.
    room = (
        chip.hbm - resident - max(found[n] for n in ("train_temp", "decode_temp", "engine_weights"))
    )
    found["pages"] = max(0, math.floor(room / found["page"]))
    found["pages_wanted"] = config.engine.pages
    found["fits"] = found["pages"] >= found["pages_wanted"]
    found["advice"] = "" if found["fits"] else _advice(found, made, local.size, config)
    return found


def report(found: dict) -> str:
    """What `plan` found, as text."""

    def gib(name: str) -> str:
        return f"{found[name] / GIB:10.2f} GiB"

    mesh = ",".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    lines = [
        f"{found['model']}, {found['stage']}, {found['topology']}, mesh {mesh}; per chip:",
        f"  parameters (float32)        {gib('params')}",
        f"  optimizer (float32)         {gib('optimizer')}",
        f"  engine's copy of weights    {gib('engine_weights')}",
        f"  train step: gradients, activations {gib('train_temp')[3:]}",
        f"  decode step                 {gib('decode_temp')}",
        f"  memory                      {gib('hbm')}",
        f"  KV pages that fit           {found['pages']:10,} of {found['page_tokens']} tokens, "
        f"{found['page'] / 2**20:.1f} MiB each; the config wants {found['pages_wanted']:,}",
        f"  micro-batch of {found['micro_batch']} rows of {found['row_len']} tokens:",
        f"    FLOPs                     {found['flops'] / 1e12:10.1f} TFLOP "
        f"(at least {found['compute_s']:.2f} s)",
        f"    collectives               {gib('collectives')} (at least "
        f"{found['collective_s']:.2f} s)"
        if found["collectives"]
        else "    collectives               not known: the compiler found no room for the step",
        f"  optimizer step, longest answers: {found['micro_batches']} micro-batches, at least "
        f"{found['step_least_s']:.1f} s",
        f"  decode step: at least {found['decode_least_s'] * 1e3:.2f} ms, "
        f"{found['replicas']} replicas of {found['lanes']} lanes",
        "It fits." if found["fits"] else f"It does not fit: {found['advice']}.",
    ]
    return "\n".join(lines)


def _slice(topology: str) -> tuple[Chip, list]:
    """The kind of chip, and the devices of a slice, which need not exist."""
    kind = topology.partition(":")[0]
    if kind not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+)+", topology):
        raise ValueError(
            f"topology is {topology!r}, needed is one of {', '.join(CHIPS)} and a shape: v5p:4x4x4"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "planning needs the TPU compiler (Linux on x86): pip install libtpu, or make libtpu "
            "and PYTHONPATH=build/libtpu"
        )
    for name, value in _NO_HOST.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # the compiler's own, of several kinds
        raise ValueError(f"topology {topology!r}: the TPU compiler says {error}") from error
    return CHIPS[kind], list(found.devices)


def _one_host(mesh: Mesh, chip: Chip) -> Mesh:
    """The decoding mesh of one host, as a slice of its own: compilers number chips by slices."""
    from jax.experimental import topologies

    local = local_decode_mesh(mesh, mesh.devices.flat[0].process_index)
    assert local is not None  # a mesh has one
    alone = topologies.get_topology_desc(platform="tpu", topology_name=chip.host).devices
    if len(alone) != local.size:
        return local
    return Mesh(np.array(alone).reshape(local.devices.shape), local.axis_names, local.axis_types)


def architecture(preset: ModelConfig, train: TrainConfig) -> ModelConfig:
    """A model as the stage trains it on a TPU."""
    attention = choose_attention(preset.attention, preset.head_dim, "tpu")
    return dataclasses.replace(preset, remat=train.remat, attention=attention)


def train_step(arch: ModelConfig, config: RLConfig | BetaConfig, mesh: Mesh) -> tuple:
    """The compiled train step of a stage, to be lowered, and its arguments as shapes, with a batch
    of one micro-batch."""
    train = config.train
    shape = (1, train.micro_rows * batch_shards(mesh), train.row_len)
    dtypes = {name: x.dtype for name, x in empty_row(1, config.depth).items()}
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
    return step, (abstract_state(arch, train.optimizer, mesh), batch, *scalars)


def _train_figures(
    arch: ModelConfig, train: TrainConfig, mesh: Mesh, lowered: jax.stages.Lowered, chip: Chip
) -> dict:
    text, seconds, temp = _compile(lowered)
    flops = train_flops(arch, train.micro_rows * batch_shards(mesh), train.row_len) / mesh.size
    collectives = collective_bytes(text)
    compute_s, collective_s = flops / chip.flops, collectives / chip.link_rate
    return {
        "train_temp": temp,
        "train_compile_s": seconds,
        "flops": flops,
        "collectives": collectives,
        "compute_s": compute_s,
        "collective_s": collective_s,
        "least_s": max(compute_s, collective_s),
    }


def train_flops(config: ModelConfig, rows: int, row_len: int) -> float:
    """FLOPs of a forward and backward pass over rows in which nothing is hidden; layers that are
    computed again (remat) count again."""
    tokens, c = rows * row_len, config
    table = c.padded_vocab_size * c.hidden_size
    layers = num_params(c) - table * (1 if c.tie_word_embeddings else 2)
    matrices = 2 * layers * tokens
    attention = 2 * c.num_layers * c.num_heads * c.head_dim * tokens * row_len  # causal: half
    again = 1 if c.remat == "full" else 0  # "dots" keeps what costs
    return (3 + again) * (matrices + attention) + 3 * 2 * table * tokens  # logits: never again


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

    steps = compiled_steps(arch, attention, engine.steps, mesh)
    num_lanes = mesh.shape["data"] * engine.lanes
    rows = put(Rows.empty(num_lanes, engine.longest_table), P("data"))
    tables = Tables(rows, engine.page_size, steps.write)
    seen = array((num_lanes, arch.padded_vocab_size), jnp.bool_, NamedSharding(mesh, P("data")))
    lanes = Lanes(engine, tables, seen, steps.mark, put, put)
    least, limit = array((mesh.shape["data"],), jnp.int32), array((), jnp.int32)
    shared = [tables.shared((-1,) * engine.lanes)] * mesh.shape["data"]
    shared = put(jax.tree.map(lambda *x: np.concatenate(x), *shared))
    arguments = *lanes.arguments([], []), None, shared, least, limit
    return steps.decode, (params, pool, *arguments)


def _decode_figures(
    arch: ModelConfig, config: RLConfig | BetaConfig, mesh: Mesh, chip: Chip
) -> dict:
    engine = config.engine
    decode, arguments = decode_step(arch, config, mesh)
    params, pool, *_ = arguments
    _, seconds, temp = _compile(decode.lower(*arguments))
    weights = _bytes(params)
    return {
        "engine_weights": weights,
        "decode_temp": temp,
        "decode_compile_s": seconds,
        "page": _bytes(pool) / 2,
        "page_tokens": engine.page_size,
        "lanes": engine.lanes,
        "replicas": mesh.shape["data"],
        "decode_least_s": weights / chip.hbm_rate,  # every step reads every weight
    }


# How the compiler says how much memory a program would take, or its temporary arrays alone.
_NO_ROOM = re.compile(
    r"(?:Used |total memory required for HLO temporaries \()([\d.]+)([KMGT])(?: of|\) exceeds)"
)


def _compile(lowered) -> tuple[str, float, float]:
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


def _bytes(tree) -> int:
    """Bytes on one device of abstract arrays with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _advice(found: dict, mesh: Mesh, host: int, config: RLConfig | BetaConfig) -> str:
    """Which setting to change: that of the largest part."""
    state = found["params"] + found["optimizer"]
    sizes = {
        "state": state,
        "weights": found["engine_weights"],
        "train": found["train_temp"],
        "decode": found["decode_temp"],
    }
    shares = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in sizes.items())
    # What is resident has to fit before anything is computed.
    resident = state + found["engine_weights"] >= found["hbm"]
    match max(("state", "weights") if resident else sizes, key=sizes.__getitem__):
        case "state":
            what = "make mesh.fsdp larger, which takes more chips (mesh.data should be 1)"
        case "weights":
            what = f"make mesh.tensor larger (sequence x tensor is {host} at most here)"
        case "train" if config.train.remat != "full":
            what = "set train.remat to full"
        case "train" if config.train.micro_rows > 1:
            what = "make train.micro_rows smaller"
        case "train" if mesh.shape["sequence"] * mesh.shape["tensor"] < host:
            what = "make mesh.sequence or mesh.tensor larger"
        case "train":
            what = "make train.row_len (and max_tokens) smaller, or take chips with more memory"
        case _:
            what = "make engine.lanes smaller"
    if state + found["engine_weights"] + max(sizes["train"], sizes["decode"]) < found["hbm"]:
        return f"{found['pages']:,} pages fit: set engine.pages to that, or {what} ({shares})"
    return f"{what} ({shares})"
