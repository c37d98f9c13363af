"""Compiles the train step and the decode step for one TPU chip, on a machine that has none.

    pip install libtpu
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python bench/compile_tpu.py

Writes bench/results/compile_tpu.json: per program the seconds of compilation and the memory
that the compiler plans on the chip. Nothing is run.
"""

import argparse
import datetime
import functools
import json
import time
from importlib.metadata import version
from pathlib import Path

import jax
from jax.sharding import SingleDeviceSharding
from tpu_steps import TOPOLOGIES, chips, lower_decode

from npr_jax import EngineConfig
from npr_jax.decode.attention import Shared
from npr_jax.decode.steps import Rows, compiled_steps, pool_shape
from npr_jax.model import PRESETS, abstract_params
from npr_jax.train.objective import Objective
from npr_jax.train.optimizer import OptimizerConfig, abstract_state
from npr_jax.train.step import compiled_step

MODEL = "qwen3-0.6b"
ROW_LEN, DEPTH = 4096, 3
LANES, PAGES, PAGE_SIZE, TABLE, STEPS, STOPS = 32, 1024, 64, 64, 16, 8
PREFILL_ROWS, PREFILL_CHUNK = 4, 256
NARROW = 5  # lanes, of the 32: the branches of one block


def main() -> None:
    config = PRESETS[MODEL]
    programs = {
        "train_step": _train,
        "decode": _decode,
        "decode_narrow": functools.partial(_decode, width=NARROW),
        "prefill": _prefill,
    }
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("programs", nargs="*", help=f"of {', '.join(programs)}; default: all")
    wanted = parser.parse_args().programs or list(programs)
    path = Path(__file__).parent / "results" / "compile_tpu.json"
    results = []
    if len(wanted) < len(programs):  # the others stay as they are
        found = json.loads(path.read_text(encoding="utf-8"))["results"]
        results = [row for row in found if row["program"] not in wanted]
    for chip in TOPOLOGIES:
        sharding = SingleDeviceSharding(chips(chip)[0])
        for program in wanted:
            lower = programs[program]
            begun = time.perf_counter()
            compiled = lower(config, sharding).compile()
            memory = compiled.memory_analysis()
            total = (
                memory.argument_size_in_bytes
                + memory.temp_size_in_bytes
                + memory.output_size_in_bytes
                - memory.alias_size_in_bytes
            )
            results.append(
                {
                    "chip": chip,
                    "program": program,
                    "seconds": round(time.perf_counter() - begun, 1),
                    "memory_gib": round(total / 2**30, 2),
                    "temp_gib": round(memory.temp_size_in_bytes / 2**30, 2),
                }
            )
            print(json.dumps(results[-1]), flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "model": MODEL,
        "row_len": ROW_LEN,
        "lanes": LANES,
        "narrow": NARROW,
        "pages": PAGES,
        "page_size": PAGE_SIZE,
        "table_pages": TABLE,
        "versions": {name: version(name) for name in ("jax", "libtpu")},
        "results": sorted(results, key=lambda row: (row["chip"], row["program"])),
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _shapes(tree, sharding):
    """The same tree of abstract arrays, on the chip."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _array(shape, dtype, sharding):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _train(config, sharding):
    optimizer = OptimizerConfig(learning_rate=0.0)
    state = abstract_state(config, optimizer, None)
    shape = (1, 1, ROW_LEN)
    batch = {name: _array(shape, "int32", sharding) for name in ("tokens", "positions", "pred")}
    batch["hidden"] = _array((*shape, DEPTH, 2), "int32", sharding)
    batch["loss_mask"] = _array(shape, "bool", sharding)
    batch |= {name: _array(shape, "float32", sharding) for name in ("advantages", "old_logp")}
    scalars = [_array((), dtype, sharding) for dtype in ("int32", "float32", "float32")]
    step = compiled_step(config, optimizer, Objective("papo"), "bfloat16", None)
    return step.lower(_shapes(state, sharding), batch, *scalars)


def _pool(config, sharding):
    return _array(pool_shape(config, "pallas", PAGES, PAGE_SIZE), "bfloat16", sharding)


def _rows(rows, sharding):
    return _shapes(Rows.empty(rows, TABLE), sharding)


def _decode(config, sharding, width=None):
    """The step of all lanes, or of a few of them. All that sampling can do is in it, top-p too."""
    engine = EngineConfig(
        lanes=LANES,
        pages=PAGES,
        page_size=PAGE_SIZE,
        table_pages=TABLE,
        steps=STEPS,
        max_stops=STOPS,
    )
    if width is not None:
        assert width in engine.widths and width < LANES
    (device,) = sharding.device_set
    return lower_decode(config, engine, device, width)


def _prefill(config, sharding):
    chunk = [_array((PREFILL_ROWS, PREFILL_CHUNK), "int32", sharding) for _ in range(3)]
    return compiled_steps(config, "pallas", STEPS).prefill.lower(
        _shapes(abstract_params(config, "bfloat16"), sharding),
        _pool(config, sharding),
        _rows(PREFILL_ROWS, sharding),
        _shapes(Shared.nothing(PREFILL_ROWS), sharding),
        *chunk,
    )


if __name__ == "__main__":
    main()
