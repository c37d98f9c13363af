"""What a decode step must move and compute, and how much of the machine's limit was reached.

    python bench/roofline.py              # the cases of bench/results/decode.json
    python bench/roofline.py --measure    # only the limits of this device, as one JSON line

A step reads every weight once and the keys and values that its rows see; it multiplies every row
with every weight. The limits are measured with JAX: a matrix-vector product that reads 512 MiB, and
a product of two 2048 x 2048 matrices. The least time of a step is the larger of bytes / bandwidth
and FLOPs / peak. Writes bench/results/roofline.json.
"""

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from models import SHAPES

RESULTS = Path(__file__).parent / "results"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", action="store_true")
    if parser.parse_args().measure:
        print(json.dumps(measure()))
        return
    found = json.loads((RESULTS / "decode.json").read_text())
    limits, rows = found["limits"], []
    for case in found["cases"]:
        need = step(case["model"], case["batch"], context=192)  # the mean of 128 .. 256
        moved = need["weight_bytes"] + need["kv_bytes"]
        least = max(moved / limits["gb_per_s"], need["flops"] / limits["gflop_per_s"]) / 1e9
        took = case["batch"] / case["sides"]["npr_jax"]["decode_tokens_per_s"]
        rows.append(
            {
                "model": case["model"],
                "batch": case["batch"],
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
    record = {"date": datetime.date.today().isoformat(), "limits": limits, "rows": rows}
    (RESULTS / "roofline.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
