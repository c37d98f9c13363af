"""The TPU kernels: their numbers against numpy in interpret mode, and the real TPU compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as stock
from jax.sharding import Mesh, SingleDeviceSharding, use_abstract_mesh

from npr_jax.kernels import paged_tpu as attention_tpu
from npr_jax.kernels.paged_tpu import paged_attention, plain_attention

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
GARBAGE = 1e9
REST = "rest"


def oracle(q, pool, layer, table, base, ranks):
    """Entry after entry, only of those that a query sees."""
    q, pool = np.asarray(q, np.float64), np.asarray(pool, np.float64)
    out = np.zeros(q.shape)
    group = q.shape[2] // (pool.shape[3] // 2)
    for r, c in np.argwhere(ranks >= 0):
        slots = [
            (table[r, m], z)
            for m in range(table.shape[1])
            for z in range(base[r, m + 1] - base[r, m])
        ]
        kv = np.stack([pool[layer, page, z] for page, z in slots[: ranks[r, c] + 1]])
        for h in range(q.shape[2]):
            k, v = kv[:, h // group * 2], kv[:, h // group * 2 + 1]
            scores = k @ q[r, c, h] / np.sqrt(q.shape[3])
            weights = np.exp(scores - scores.max())
            out[r, c, h] = weights @ v / weights.sum()
    return out


def problem(rows, width, chunk=1, size=4, kv_heads=2, group=2, dim=8, dtype="float32", full=False):
    """Random arguments of a kernel. `rows` has each row's number of entries to attend over, or
    REST. Slots that no row sees hold garbage. `full`: no page but a row's last is filled in part.
    """
    rng = np.random.default_rng(len(rows) * 1000 + chunk)
    layers, pages = 3, 1 + len(rows) * width
    table = np.zeros((len(rows), width), np.int32)
    base = np.zeros((len(rows), width + 1), np.int32)
    ranks = np.full((len(rows), chunk), -1, np.int32)
    pool = np.full((layers, pages, size, 2 * kv_heads, dim), GARBAGE)
    names = rng.permutation(np.arange(1, pages)).reshape(len(rows), width)
    for r, entries in enumerate(rows):
        fill = []
        while sum(fill) < (8 if entries == REST else entries + 3):  # three are still to come
            fill.append(size if full or not fill else rng.integers(1, size + 1))
        fill = fill[:width]
        table[r, : len(fill)] = names[r, : len(fill)]
        base[r, 1:] = np.cumsum(np.pad(fill, (0, width - len(fill))))
        if r and fill[0] == size:
            table[r, 0] = names[0, 0]  # all rows share their first page
        if entries == REST:
            continue
        entries = min(entries, base[r, -1])
        count = min(entries, int(rng.integers(1, chunk + 1)))
        ranks[r, :count] = np.arange(entries - count, entries)
        for m in range(width):
            seen = np.clip(entries - base[r, m], 0, base[r, m + 1] - base[r, m])
            if r == 0 or m:
                shape = (layers, seen, 2 * kv_heads, dim)
                pool[:, table[r, m], :seen] = rng.normal(size=shape)
    q = rng.normal(size=(len(rows), chunk, kv_heads * group, dim))
    arrays = jnp.asarray(q, dtype), jnp.asarray(pool, dtype), jnp.int32(2)
    return *arrays, *(jnp.asarray(x) for x in (table, base, ranks))


def check(kernel, arguments, **options):
    *_, table, base, ranks = (np.asarray(x) for x in arguments)
    out = np.asarray(kernel(*arguments, **options), np.float32)
    assert np.isfinite(out).all()
    expected = oracle(*arguments[:3], table, base, ranks)
    tolerance = 1e-5 if arguments[0].dtype == jnp.float32 else 0.02
    real = ranks >= 0
    np.testing.assert_allclose(out[real], expected[real], rtol=tolerance, atol=tolerance)


@pytest.fixture
def small(monkeypatch):
    """Blocks of 16 slots and tiles of 8 queries, so that there are several of them."""
    monkeypatch.setattr(attention_tpu, "_SLOTS", 16)
    monkeypatch.setattr(attention_tpu, "_QUERIES", 8)


# The first row fills its first page, which the others share. 13 pages are no multiple of a block.
EVEN = (20, REST, 1, 30, REST, REST, 7, 44)
ODD = (44, 16, REST, 5, REST)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "chunk", "group"), [(EVEN, 1, 4), (ODD, 1, 1), (ODD, 8, 2)])
def test_kernel_matches_the_oracle(small, rows, chunk, group, dtype):
    check(paged_attention, problem(rows, 13, chunk, group=group, dtype=dtype), interpret=True)


@pytest.mark.parametrize(("rows", "kv_heads"), [((9, 40), 4), ((9, 40, 21), 1)])
def test_kernel_at_other_numbers_of_heads(small, rows, kv_heads):
    check(paged_attention, problem(rows, 13, 5, kv_heads=kv_heads), interpret=True)


def test_kernel_at_the_shapes_of_a_model():
    check(
        paged_attention,
        problem((700, 3), 60, size=16, kv_heads=8, group=4, dim=128, dtype="bfloat16"),
        interpret=True,
    )


@pytest.mark.parametrize("when", ["eager", "on_wait"])
@pytest.mark.parametrize(("rows", "chunk"), [(EVEN, 1), (ODD, 8), ((REST,) * 4, 1)])
def test_copies_are_waited_for_and_do_not_race(small, monkeypatch, rows, chunk, when):
    """Copies that come as early or as late as they can, into memory full of NaN."""

    def keys_values(block, head):  # this interpreter knows no reshape of what it refers to
        k, v = block[:, :, 2 * head], block[:, :, 2 * head + 1]
        return k.reshape(-1, k.shape[-1]), v.reshape(-1, v.shape[-1])

    monkeypatch.setattr(attention_tpu, "_keys_values", keys_values)
    params = pltpu.InterpretParams(dma_execution_mode=when, detect_races=True)
    check(paged_attention, problem(rows, 13, chunk), interpret=params)
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize(("rows", "chunk"), [((20, REST, 30, 44), 1), ((44, 16, REST, 5), 8)])
def test_stock_kernel_is_called_right(monkeypatch, rows, chunk):
    """With JAX's own reference in its place: no interpreter of jax 0.10.2 runs the kernel."""

    def reference(*arguments, sm_scale, **blocks):
        return stock.ref_ragged_paged_attention(*arguments, sm_scale=sm_scale)

    monkeypatch.setattr(attention_tpu, "ragged_paged_attention", reference)
    check(plain_attention, problem(rows, 13, chunk, dim=128, dtype="bfloat16", full=True))


def test_what_the_kernels_do_not_take():
    with pytest.raises(ValueError, match="head_dim is 64"):
        paged_attention(*problem((5,), 4, dim=64))
    with pytest.raises(ValueError, match="head_dim is 64"):
        plain_attention(*problem((5,), 4, dim=64))
    with pytest.raises(ValueError, match="queries are float32"):
        plain_attention(*problem((5,), 4, dim=128))


@pytest.mark.parametrize("kernel", [paged_attention, plain_attention])
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize(("num_rows", "chunk"), [(64, 1), (4, 128)])
@pytest.mark.parametrize("chip", CHIPS)
def test_tpu_compiler_takes_qwen3_4b_at_16k(tpu_compiler, kernel, chip, num_rows, chunk, size):
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]
    array = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    width = 16384 // size + 4
    arguments = (
        array((num_rows, chunk, 32, 128), jnp.bfloat16),
        array((36, 2 * width, size, 16, 128), jnp.bfloat16),
        array((), jnp.int32),
        array((num_rows, width), jnp.int32),
        array((num_rows, width + 1), jnp.int32),
        array((num_rows, chunk), jnp.int32),
    )
    # The stock kernel asks which chip it is for.
    with use_abstract_mesh(Mesh([device], "x").abstract_mesh):
        compiled = jax.jit(kernel).lower(*arguments).compile()
    assert "tpu_custom_call" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**25  # the pool is not copied
