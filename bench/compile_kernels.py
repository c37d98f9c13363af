"""Compiles the attention kernels for one TPU chip, on a machine that has none.

    pip install libtpu
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python bench/compile_kernels.py

Writes bench/results/compile_kernels.json: per kernel and shape the seconds of compilation and the
memory that the compiler plans beside arguments and result. Nothing is run.
"""

import datetime
import functools
import json
import time
from importlib.metadata import version
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding, use_abstract_mesh

from npr_jax.decode.attention import Shared
from npr_jax.kernels.paged_tpu import paged_attention, plain_attention
from npr_jax.kernels.tree_tpu import flash
from npr_jax.model import PRESETS

MODEL = "qwen3-4b"
CONTEXT, POOL = 16384, 65536  # tokens of a row's table, of the pool
PAGE_SIZES = (16, 64)
SHAPES = {"decode": (64, 1), "prefill": (4, 128)}  # rows, queries of a row
TOKENS, DEPTH = 32768, 4  # of a training row, and its levels of hidden intervals
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def main() -> None:
    results = []
    for chip, name in CHIPS.items():
        device = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
        for kernel in (paged_attention, plain_attention):
            for shape, (rows, chunk) in SHAPES.items():
                for size in PAGE_SIZES:
                    begun = time.perf_counter()
                    # The stock kernel asks which chip it is for.
                    with use_abstract_mesh(Mesh([device], "x").abstract_mesh):
                        lowered = jax.jit(kernel).lower(*_arguments(device, rows, chunk, size))
                    compiled = lowered.compile()
                    assert "tpu_custom_call" in compiled.as_text()
                    results.append(
                        {
                            "chip": chip,
                            "kernel": kernel.__name__,
                            "shape": shape,
                            "page_size": size,
                            "seconds": round(time.perf_counter() - begun, 1),
                            "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
                        }
                    )
                    print(json.dumps(results[-1]), flush=True)
        for shape, function in (("forward", flash), ("gradient", _gradient)):
            begun = time.perf_counter()
            lowered = jax.jit(function).lower(*_row(device))
            assert "tpu_custom_call" in lowered.as_text()
            compiled = lowered.compile()
            results.append(
                {
                    "chip": chip,
                    "kernel": "tree_attention",
                    "shape": shape,
                    "seconds": round(time.perf_counter() - begun, 1),
                    "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
                }
            )
            print(json.dumps(results[-1]), flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "model": MODEL,
        "context": CONTEXT,
        "pool_tokens": POOL,
        "rows_and_queries": SHAPES,
        "row_tokens": TOKENS,
        "versions": {name: version(name) for name in ("jax", "libtpu")},
        "results": results,
    }
    path = Path(__file__).parent / "results" / "compile_kernels.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _arguments(device, rows, chunk, size):
    config = PRESETS[MODEL]
    array = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    width = CONTEXT // size + 4
    kv = (2 * config.num_kv_heads, config.head_dim)
    return (
        array((rows, chunk, config.num_heads, config.head_dim), "bfloat16"),
        array((config.num_layers, POOL // size, size, *kv), "bfloat16"),
        array((), "int32"),
        array((rows, width), "int32"),
        array((rows, width + 1), "int32"),
        *[array((rows, chunk), "int32")] * 2,
        jax.tree.map(lambda x: array(x.shape, x.dtype), Shared.nothing(rows)),
    )


def _row(device):
    """q, k, v, hidden and offset of one training row."""
    config = PRESETS[MODEL]
    array = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    q = array((1, TOKENS, config.num_heads, config.head_dim), "bfloat16")
    kv = array((1, TOKENS, config.num_kv_heads, config.head_dim), "bfloat16")
    return q, kv, kv, array((1, TOKENS, DEPTH, 2), "int32"), array((), "int32")


def _gradient(q, k, v, hidden, offset):
    """The output and what q, k and v get for a gradient of it."""
    out, pull = jax.vjp(lambda *x: flash(*x, hidden, offset), q, k, v)
    return out, pull(out)


if __name__ == "__main__":
    main()
