"""The GPU kernel against the oracle, interpreted on a CPU; and its lowering for a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_cases import CASES, make_case

from npr_jax.decode.attention import gather
from npr_jax.decode.attention_gpu import paged_attention


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_is_the_oracle(name, dtype):
    case = make_case(**CASES[name], dtype=dtype)
    out = jax.jit(functools.partial(paged_attention, interpret=True))(*case)
    expected = gather(*case)
    real = np.asarray(case[-1]) >= 0
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(
        np.asarray(out, np.float32)[real], np.asarray(expected, np.float32)[real], atol=tolerance
    )
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert out.dtype == dtype


def test_shapes_that_the_kernel_cannot_take_are_refused():
    case = make_case(**CASES["decode"] | {"dim": 24})
    with pytest.raises(ValueError, match="head_dim is 24, needed is a power of two from 16"):
        paged_attention(*case)


@pytest.mark.parametrize("rows, chunk", [(64, 1), (1, 1), (4, 128)])
@pytest.mark.parametrize("size", [16, 64])
def test_the_kernel_lowers_for_a_gpu_at_the_shapes_of_qwen3_4b(rows, chunk, size):
    width = 16384 // size + 8
    i32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    shapes = (
        jax.ShapeDtypeStruct((rows, chunk, 32, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((36, rows * width + 1, size, 16, 128), jnp.bfloat16),
        i32(()),
        i32((rows, width)),
        i32((rows, width + 1)),
        i32((rows, chunk)),
    )
    lowered = jax.jit(paged_attention).trace(*shapes).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "triton" in text and "npr_paged_attention" in text
    # The pool goes in as it is: no array of its size but the pool itself and its other shape.
    pool = f"tensor<{36 * (rows * width + 1)}x{size}x16x128xbf16>"
    assert text.count(f"-> {pool}") == 1
