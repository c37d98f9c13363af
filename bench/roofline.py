"""What a decode step must move and compute, and how much of the machine's limit was reached.

    python bench/roofline.py              # the cases of bench/results/decode.json
    python bench/roofline.py --measure    # only the limits of this device, as one JSON line
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 PYTHONPATH=build/libtpu \
      python bench/roofline.py --compiled # what the TPU compiler makes of it; nothing is run

A step reads every weight once and the keys and values that its rows see; it multiplies every row
with every weight. The limits are measured with JAX: a matrix-vector product that reads 512 MiB, and
a product of two 2048 x 2048 matrices. The least time of a step is the larger of bytes / bandwidth
and FLOPs / peak. Writes bench/results/roofline.json.

With --compiled the decode step of two models is compiled for three TPU chips, and what its text
moves through a chip's main memory (npr_jax/plan/traffic.py, and the kernel's own account of the
keys that it brings) is held against what it must: every weight once (of a table of embeddings that
is no head, the rows looked up), the keys and values that each row sees, the new ones. Each row has
pages of its own, all full. What happens once a visit is shared by its steps. Where the weights do
not fit one chip, a host's four hold them, and figures are of one. The program does not depend on
how many pages there are; the pool is what the rows need, or what the chip has room for. Writes
bench/results/traffic.json.
"""

import argparse
import datetime
import json
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
from models import SHAPES
from tpu_steps import TOPOLOGIES, chips, lower_decode, tensor_mesh

from npr_jax import EngineConfig
from npr_jax.base.chips import CHIPS
from npr_jax.decode.attention import Shared
from npr_jax.decode.tables import pages_read
from npr_jax.model import PRESETS, ModelConfig, abstract_params
from npr_jax.plan.traffic import Program

RESULTS = Path(__file__).parent / "results"
MODELS, BATCHES = ("qwen3-4b", "qwen3-8b"), (1, 5, 64)
CONTEXT, PAGE, STEPS = 16384, 64, 16


def seconds(function, *args) -> float:
    """Median of nine calls."""
    function(*args).block_until_ready()
    times = []
    for _ in range(9):
        begun = time.perf_counter()
        function(*args).block_until_ready()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def measure() -> dict:
    """Bandwidth in GB/s and peak in GFLOP/s of the default device, float32."""
    matrix, vector = jnp.ones((1 << 15, 1 << 12)), jnp.ones(1 << 12)
    square = jnp.ones((2048, 2048))
    product = jax.jit(jnp.matmul)
    return {
        "gb_per_s": round(matrix.nbytes / seconds(product, matrix, vector) / 1e9, 1),
        "gflop_per_s": round(2 * 2048**3 / seconds(product, square, square) / 1e9, 1),
        "device": jax.devices()[0].device_kind,
    }


def step(name: str, batch: int, context: int, item: int = 4) -> dict:
    """Bytes and FLOPs of one decode step of `batch` rows that see `context` entries each."""
    s = SHAPES[name]
    heads, kv = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    layer = s["hidden"] * (2 * heads + 2 * kv) + 3 * s["hidden"] * s["ffn"]
    weights = s["layers"] * layer + s["hidden"] * s["vocab"]
    cached = s["layers"] * 2 * kv * context * batch
    return {
        "weight_bytes": item * weights,
        "kv_bytes": item * cached,
        "flops": 2 * batch * weights + s["layers"] * 4 * heads * context * batch,
    }


def own_pages(batch: int) -> int:
    """Pages that the attention of one layer reads for rows of CONTEXT entries, none shared."""
    return pages_read(Shared.nothing(batch), [CONTEXT // PAGE] * batch)


def compiled(model: str, chip: str, batch: int) -> dict:
    """Bytes of a step of `batch` lanes, moved and needed, of one chip."""
    config, limit = PRESETS[model], CHIPS[chip].hbm
    devices = chips(chip)
    shards = 1 if weight_bytes(config, batch) < 0.85 * limit else len(devices)
    entry = 2 * 2 * config.num_kv_heads * config.head_dim // shards  # of a layer, bfloat16
    room = 0.9 * limit - weight_bytes(config, batch) / shards
    most = int(room / (config.num_layers * PAGE * entry))
    pages = min(batch * CONTEXT // PAGE + 1, most)
    engine = EngineConfig(
        lanes=batch, pages=pages, page_size=PAGE, table_pages=CONTEXT // PAGE, steps=STEPS
    )
    place = devices[0] if shards == 1 else tensor_mesh(devices)
    begun = time.perf_counter()
    program = lower_decode(config, engine, place).compile()
    keys = config.num_layers * PAGE * entry * own_pages(batch)
    weights = weight_bytes(config, batch) / shards
    written = config.num_layers * entry * batch
    need = weights + config.num_layers * entry * CONTEXT * batch + written
    row = {
        "model": model,
        "chip": chip,
        "chips": shards,
        "batch": batch,
        "pool_tokens": pages * PAGE,
        "compile_s": round(time.perf_counter() - begun, 1),
        "temp_mb": round(program.memory_analysis().temp_size_in_bytes / 1e6, 1),
        "weights_mb": round(weights / 1e6, 1),
        "need_mb": round(need / 1e6, 1),
        "keys_mb": round(keys / 1e6, 1),
    }
    text = program.as_text()
    for name, choose in (("plain", min), ("filtered", max)):
        kernels = {"npr_paged_attention": keys / config.num_layers, "npr_shared_runs": 0.0}
        account = Program(text, kernels, choose)
        once, each = account.bytes()
        moved = each + once / STEPS
        row[name] = {
            "moved_mb": round(moved / 1e6, 1),
            "beside_keys_mb": round((moved - keys) / 1e6, 1),
            "ratio": round(moved / need, 4),
            "ratio_beside_keys": round((moved - keys) / (weights + written), 4),
        }
    smallest = 2 * config.hidden_size * config.num_kv_heads * config.head_dim // shards  # wk or wv
    vocab = config.padded_vocab_size // shards  # what sampling writes is no copy of a weight
    row["copies"] = [
        line
        for line in account.written(smallest)
        if f",{vocab}]" not in line and f",{vocab // 128},128]" not in line
    ]
    return row


def weight_bytes(config: ModelConfig, batch: int) -> int:
    """Of the weights that a step of `batch` rows reads, in bfloat16."""
    params = abstract_params(config, "bfloat16")
    looked_up = 2 * batch * config.hidden_size
    table = 0 if config.tie_word_embeddings else params["embed"].size * 2
    return sum(x.size * 2 for x in jax.tree.leaves(params)) - table + looked_up


def compile_all() -> None:
    rows = []
    for chip in TOPOLOGIES:
        for model in MODELS:
            for batch in BATCHES:
                rows.append(compiled(model, chip, batch))
                print(json.dumps(rows[-1]), flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "context": CONTEXT,
        "page_size": PAGE,
        "steps": STEPS,
        "versions": {name: version(name) for name in ("jax", "libtpu")},
        "rows": rows,
    }
    (RESULTS / "traffic.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure()))
        return
    if args.compiled:
        compile_all()
        return
    found = json.loads((RESULTS / "decode.json").read_text())
    rows = []
    for case in found["cases"]:
        limits = case["limits"]
        need = step(case["model"], case["batch"], context=192)  # the mean of 128 .. 256
        moved = need["weight_bytes"] + need["kv_bytes"]
        least = max(moved / limits["gb_per_s"], need["flops"] / limits["gflop_per_s"]) / 1e9
        took = case["batch"] / case["sides"]["npr_jax"]["decode_tokens_per_s"]
        rows.append(
            {
                "model": case["model"],
                "batch": case["batch"],
                "date": case["date"],
                "mb": round(moved / 1e6, 1),
                "mflop": round(need["flops"] / 1e6, 1),
                "step_ms": round(1e3 * took, 2),
                "least_ms": round(1e3 * least, 2),
                "gb_per_s": round(moved / took / 1e9, 2),
                "share_of_bandwidth": round(moved / took / 1e9 / limits["gb_per_s"], 3),
                "share_of_peak": round(need["flops"] / took / 1e9 / limits["gflop_per_s"], 3),
                "share_of_limit": round(least / took, 3),
            }
        )
        print(json.dumps(rows[-1]))
    (RESULTS / "roofline.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
