"""The TPU kernels: copies, the stock kernel's call, the real TPU compiler.

Their numbers: test_paged_attention.py.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from conftest import spread
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as stock
from jax.sharding import Mesh, SingleDeviceSharding, use_abstract_mesh
from paged_attention_checks import ENTRIES, FILLS, REST, check, problem

from npr_jax.decode.attention import Shared
from npr_jax.kernels import paged_tpu as attention_tpu
from npr_jax.kernels.paged_tpu import paged_attention, plain_attention

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@pytest.fixture
def small(monkeypatch):
    """Blocks of 16 slots and tiles of 8 queries, so that there are several of them."""
    monkeypatch.setattr(attention_tpu, "_SLOTS", 16)
    monkeypatch.setattr(attention_tpu, "_QUERIES", 8)


@pytest.mark.parametrize("when", spread(["eager", "on_wait"], check=1))
@pytest.mark.parametrize(
    ("rows", "chunk"), [((0, 2, 1, 4), 1), ((0, 1, 2, 3, 4), 8), ((2, 2, 2, 2), 1)]
)
def test_copies_are_waited_for_and_do_not_race(small, monkeypatch, rows, chunk, when):
    """Copies that come as early or as late as they can, into memory full of NaN."""

    def keys_values(block, head):  # this interpreter knows no reshape of what it refers to
        k, v = block[:, :, 2 * head], block[:, :, 2 * head + 1]
        return k.reshape(-1, k.shape[-1]), v.reshape(-1, v.shape[-1])

    monkeypatch.setattr(attention_tpu, "_keys_values", keys_values)
    params = pltpu.InterpretParams(dma_execution_mode=when, detect_races=True)
    arguments = problem([ENTRIES[i] for i in rows], [FILLS[i] for i in rows], chunk)
    check(functools.partial(paged_attention, interpret=params), arguments)
    assert not interpret_pallas_call.races.races_found


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "chunk"), [((20, REST, 30, 44), 1), ((44, 16, REST, 5), 8)])
def test_stock_kernel_is_called_right(monkeypatch, rows, chunk):
    """With JAX's own reference in its place: no interpreter of jax 0.10.2 runs the kernel."""

    def reference(q, *arguments, sm_scale, **blocks):
        out = stock.ref_ragged_paged_attention(q, *arguments, sm_scale=sm_scale)
        return jnp.full_like(q, jnp.nan).at[: len(out)].set(out)  # the rest is never written

    monkeypatch.setattr(attention_tpu, "ragged_paged_attention", reference)
    arguments = problem(rows, [[4] * 13] * 4, chunk, dim=128, dtype="bfloat16")
    with jax.disable_jit():  # this reference takes lengths that are known
        check(plain_attention, arguments)


def test_what_the_kernels_do_not_take():
    with pytest.raises(ValueError, match=r"head_dim is 64.*multiple of 128.*attention"):
        paged_attention(*problem([5], [[4, 4]], dim=64))
    with pytest.raises(ValueError, match="head_dim is 64"):
        plain_attention(*problem([5], [[4, 4]], dim=64))
    with pytest.raises(ValueError, match="queries are float32"):
        plain_attention(*problem([5], [[4, 4]], dim=128))


@pytest.mark.parametrize("kernel", [paged_attention, plain_attention])
@pytest.mark.parametrize("case", spread(itertools.product(CHIPS, (16, 64)), test=1))
@pytest.mark.parametrize(("num_rows", "chunk"), [(64, 1), (4, 128)])
def test_tpu_compiler_takes_qwen3_4b_at_16k(tpu_compiler, kernel, case, num_rows, chunk):
    chip, size = case
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]
    array = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    width = 16384 // size + 4
    arguments = (
        array((num_rows, chunk, 32, 128), jnp.bfloat16),
        array((36, 2 * width, size, 16, 128), jnp.bfloat16),
        array((), jnp.int32),
        array((num_rows, width), jnp.int32),
        array((num_rows, width + 1), jnp.int32),
        *[array((num_rows, chunk), jnp.int32)] * 2,
        jax.tree.map(lambda x: array(x.shape, x.dtype), Shared.nothing(num_rows)),
    )
    # The stock kernel asks which chip it is for.
    with use_abstract_mesh(Mesh([device], "x").abstract_mesh):
        compiled = jax.jit(kernel).lower(*arguments).compile()
    calls = sum("tpu_custom_call" in line for line in compiled.as_text().splitlines())
    assert calls == (2 if kernel is paged_attention and chunk == 1 else 1)  # runs, and the rest
    assert compiled.memory_analysis().temp_size_in_bytes < 2**25  # the pool is not copied
