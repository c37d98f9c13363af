"""What a stage takes, counted from shapes: where no compiler is at hand, as for GPUs.

Temporary bytes of a train step with `remat` "full" are those of the TPU compiler's programs to a
tenth, its collectives to 15% (tests hold them against bench/results/plan.json).
"""

import jax
import jax.numpy as jnp

from npr_jax.base.mesh import batch_shards
from npr_jax.model import ModelConfig, abstract_params, num_params
from npr_jax.model.flops import train_flops
from npr_jax.model.lora import plain
from npr_jax.model.sharding import decode_shardings
from npr_jax.plan.places import array_bytes
from npr_jax.train.beta import BetaConfig
from npr_jax.train.rl import RLConfig
from npr_jax.train.step import TrainConfig


def train_figures(arch: ModelConfig, train: TrainConfig, mesh, params: int) -> dict:
    """As `programs.train_figures`; `params`: bytes of them on a chip, in float32."""
    rows = train.micro_rows * batch_shards(mesh)
    flops = train_flops(arch, rows, train.row_len) / mesh.size
    return {
        "train_temp": train_temp(arch, train, mesh.shape, params),
        "flops": flops,
        "collectives": train_collectives(arch, train, mesh.shape),
    }


def train_temp(arch: ModelConfig, train: TrainConfig, mesh, params: int) -> float:
    """Temporary bytes of a train step on a chip: gradients, what layers keep for the backward pass,
    and the arrays of the layer at hand, of whose weights the next ones are gathered beside it."""
    tensor = mesh["tensor"]
    tokens = train.micro_rows * train.row_len / mesh["sequence"]
    item = jnp.dtype(train.compute_dtype).itemsize
    width, inner = arch.hidden_size, arch.intermediate_size / tensor
    queries = arch.num_heads * arch.head_dim / tensor
    keys = arch.num_kv_heads * arch.head_dim / tensor
    kept = {
        "full": width,
        "dots": 3 * width + 2 * inner + 2 * queries + 2 * keys,
        "none": 6 * width + 3 * inner + 2 * queries + 4 * keys,
    }[arch.remat]
    layer, table = _layer(arch) / tensor, _table(arch) / tensor
    at_hand = tokens * item * (6 * width + 1.5 * (3 * inner + 2 * queries + 4 * keys))
    gradient = 0 if arch.lora else 4  # of what is frozen there is none
    gathered = layer * (2 * item + gradient) + table * (item + gradient)
    return 2 * params + arch.num_layers * tokens * item * kept + at_hand + gathered


def train_collectives(arch: ModelConfig, train: TrainConfig, mesh) -> float:
    """Bytes that a chip receives in a micro-batch from the other chips of its copy of the
    parameters: weights are gathered for the forward pass, its repetition and the backward pass, and
    gradients scattered; what `tensor` splits is added up twice in a layer of each of them, but once
    in the repetition, which needs no more."""
    item = jnp.dtype(train.compute_dtype).itemsize
    passes = 3 if arch.remat == "full" else 2
    parts, tensor, sequence = mesh["fsdp"], mesh["tensor"], mesh["sequence"]
    moved = num_params(arch) * passes * item + 4 * num_trained(arch)
    weights = moved / tensor * (parts - 1) / parts
    tokens = train.micro_rows * train.row_len / sequence
    sums = {3: 5, 2: 4}[passes] * tokens * arch.hidden_size * item * 2 * (tensor - 1) / tensor
    keys = 2 * arch.num_kv_heads * arch.head_dim / tensor * item  # every part sees all of a row's
    keys *= passes * train.micro_rows * train.row_len * (sequence - 1) / sequence
    return weights + arch.num_layers * (sums + keys)


def decode_figures(arch: ModelConfig, config: RLConfig | BetaConfig, mesh) -> dict:
    """As `programs.decode_figures`."""
    engine, dtype = config.engine, config.train.compute_dtype
    tensor = mesh.shape["tensor"]
    shardings = decode_shardings(arch, mesh)
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract_params(arch, dtype),
        shardings,
    )
    weights = array_bytes(params)
    heads = arch.num_kv_heads / (tensor if arch.num_kv_heads % tensor == 0 else 1)
    cache = jnp.dtype(engine.cache_dtype or dtype).itemsize
    scale = 4 / arch.head_dim if engine.cache_dtype == "int8" else 0  # one of float32 a head
    entry = arch.num_layers * 2 * heads * arch.head_dim * (cache + scale)
    item = jnp.dtype(dtype).itemsize
    logits = engine.lanes * arch.padded_vocab_size * 4
    sums = 2 * arch.num_layers * engine.lanes * arch.hidden_size * item * 2 * (tensor - 1) / tensor
    return {
        "engine_weights": weights,
        "decode_temp": 2 * logits,
        "page": entry * engine.page_size,
        "page_tokens": engine.page_size,
        "lanes": engine.lanes,
        "replicas": mesh.shape["data"],
        "decode_counted": "arithmetic",
        # The table of embeddings is read where it is the head too; else rows of it.
        "decode_bytes": weights - (0 if arch.tie_word_embeddings else _table(arch) * item / tensor),
        "decode_collectives": sums + (logits * (tensor - 1) / tensor),
    }


def prefill_flops(arch: ModelConfig, tokens: int) -> float:
    """FLOPs of a forward pass over a prompt, without logits."""
    attention = 2 * arch.num_layers * arch.num_heads * arch.head_dim * tokens**2
    return 2 * arch.num_layers * _layer(arch) * tokens + attention


def token_flops(arch: ModelConfig) -> float:
    """FLOPs of a token that is decoded, but for those over the keys that it sees."""
    return 2 * (arch.num_layers * _layer(arch) + _table(arch))


def num_trained(arch: ModelConfig) -> int:
    """Number of parameters that are trained."""
    return num_params(arch) - (num_params(plain(arch)) if arch.lora else 0)


def _table(arch: ModelConfig) -> int:
    return arch.padded_vocab_size * arch.hidden_size


def _layer(arch: ModelConfig) -> float:
    """Weights of a layer."""
    tables = 1 if arch.tie_word_embeddings else 2
    return (num_params(arch) - tables * _table(arch)) / arch.num_layers
