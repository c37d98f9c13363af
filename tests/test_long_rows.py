"""Rows of 32,768 tokens: no array of length squared or of length times vocabulary; they train."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from conftest import spread

from npr_jax import tree
from npr_jax.base.mesh import MeshConfig, make_mesh
from npr_jax.model import PRESETS, init_params
from npr_jax.train.objective import Objective
from npr_jax.train.optimizer import OptimizerConfig, abstract_state, new_state
from npr_jax.train.packing import Example, empty_row, make_rows
from npr_jax.train.step import TrainConfig, compiled_step, optimize

LENGTH, VOCAB, DEPTH = 32768, 1024, 2
CONFIG = dataclasses.replace(
    PRESETS["tiny"], vocab_size=VOCAB, padded_vocab_size=VOCAB, remat="full"
)
OPTIMIZER = OptimizerConfig(learning_rate=0.0)


def compile_step(mesh=None):
    row = empty_row(LENGTH, DEPTH)
    batch = {
        name: jax.ShapeDtypeStruct((1, 1, *value.shape), value.dtype) for name, value in row.items()
    }
    scalars = [jax.ShapeDtypeStruct((), dtype) for dtype in ("int32", "float32", "float32")]
    step = compiled_step(CONFIG, OPTIMIZER, Objective("papo"), "float32", mesh)
    return step.lower(abstract_state(CONFIG, OPTIMIZER, mesh), batch, *scalars).compile()


@pytest.mark.parametrize("mesh", spread([None, MeshConfig(sequence=4, tensor=2)], test=1), ids=str)
def test_no_buffer_is_as_large_as_length_times_vocabulary(mesh, report):
    compiled = compile_step(mesh and make_mesh(mesh))
    sizes = {
        shape: math.prod(map(int, shape.split(",")))
        for shape in set(re.findall(r"\w+\[([\d,]+)\]", compiled.as_text()))
    }
    largest = max(sizes, key=sizes.get)
    parts = 1 if mesh is None else mesh.sequence
    assert sizes[largest] < LENGTH * VOCAB / parts, largest
    assert max(sizes.values()) > LENGTH / parts * CONFIG.hidden_size / 2  # the scan sees them
    temp = compiled.memory_analysis().temp_size_in_bytes
    report(f"{temp / 2**20:.0f} MiB temporary, largest buffer [{largest}]")
    assert temp < LENGTH * LENGTH / 2  # bytes: half of what a mask of booleans would take


@pytest.mark.slow
def test_a_row_of_packed_documents_trains():
    rng = np.random.default_rng(0)
    length = LENGTH // 4
    size = length // 16
    documents = [
        [
            Example(
                rng.integers(VOCAB, size=size),
                tree.layout(size, prompt_len=size - 20),
                np.arange(size) >= size - 20,
            )
        ]
        for _ in range(16)
    ]
    rows = make_rows(documents, length, DEPTH)
    assert len(rows) == 1
    config = TrainConfig(OptimizerConfig(1e-3), row_len=length, micro_rows=1)
    state = new_state(init_params(CONFIG, jax.random.key(0)), config.optimizer)
    state, metrics = optimize(state, rows, CONFIG, config, Objective("sft"), 1e-3)
    assert metrics["loss_tokens"] == 16 * 20 and np.isfinite(metrics["loss"])
    assert metrics["nonfinite"] == 0
