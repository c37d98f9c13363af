"""Exact mode of the model: how weights are laid out for it, and whether it holds here.

The same bits come from what `kernels/exact.py` says of products, which no version of XLA promises.
So before it is used the machine at hand is asked, once for every shape.
"""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from npr_jax.kernels import exact
from npr_jax.model.config import ModelConfig

_GROUP = 48  # query heads of a key head: rows of a product that counts as one of few
_SAMPLE = 128  # rows of the products that others are compared with


def lay_out(layer: dict, matrix: Callable[[jax.Array], exact.Weights]) -> dict:
    """A layer's weights with its matrices laid out by `matrix`, if they are not yet."""
    return {name: matrix(w) if getattr(w, "ndim", 0) == 2 else w for name, w in layer.items()}


def head(config: ModelConfig, weights: jax.Array | exact.Weights) -> exact.Weights:
    """The weights [D, V] of the logits laid out for many rows, or as they are if they are."""
    if isinstance(weights, exact.Weights):
        return weights
    return exact.turned(weights.T) if config.tie_word_embeddings else exact.many_rows(weights)


@functools.partial(jax.jit, static_argnums=0)
def for_engine(config: ModelConfig, params: dict) -> dict:
    """Unstacked parameters, their matrices laid out for few rows; `unembed` has the logits' weights
    in any case."""
    layers = tuple(lay_out(layer, exact.few_rows) for layer in params["layers"])
    if config.tie_word_embeddings:
        unembed = exact.turned(params["embed"])
    else:
        unembed = exact.few_rows(params["unembed"])
    return {**params, "layers": layers, "unembed": unembed}


def require(config: ModelConfig, mesh, name: str) -> None:
    """Raises ValueError where exact mode, which the setting `name` asks for, is not for the devices
    or the model."""
    platform, group = jax.default_backend(), config.num_heads // config.num_kv_heads
    if mesh is not None or platform != "cpu":
        where = platform.upper() if mesh is None else f"a mesh of {mesh.size} devices"
        raise ValueError(f"{name} is true on {where}: exact is for one CPU device, set it to false")
    if group > _GROUP or not exact.key_block(config.head_dim):
        raise ValueError(
            f"{name} is true, num_heads / num_kv_heads is {group} and head_dim {config.head_dim}: "
            f"exact needs at most {_GROUP} and 256, set it to false"
        )


def check(config: ModelConfig, rows: Iterable[int], few: bool) -> None:
    """Asks this machine whether rows of the model's products have the same bits in calls of `rows`
    rows as in others, and its attention wherever its keys lie; `few`: with an engine's layout.

    Raises ValueError where they do not.
    """
    c = config
    counts = tuple(sorted({max(2, min(n, 4096)) for n in rows}))
    wide, narrow = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    hidden, inner = c.hidden_size, c.intermediate_size
    shapes = [(hidden, wide), (hidden, narrow), (wide, hidden), (hidden, inner), (inner, hidden)]
    layouts: list = [exact.few_rows if few else exact.many_rows] * len(shapes)
    shapes.append((hidden, min(c.padded_vocab_size, 8192)))
    layouts.append(_turned if c.tie_word_embeddings else layouts[0])
    with jax.ensure_compile_time_eval():
        for shape, layout in dict.fromkeys(zip(shapes, layouts, strict=True)):
            if differing := _unlike(*shape, layout, counts):
                raise ValueError(
                    f"exact: {differing[0]} rows times weights {list(shape)} have other bits than "
                    f"{_SAMPLE} rows (jax {jax.__version__} on this CPU): set it to false"
                )
        group = c.num_heads // c.num_kv_heads
        if not _attention_holds(group, c.head_dim):
            raise ValueError(
                f"exact: attention of head_dim={c.head_dim} and {group} query heads a key head has "
                f"bits that depend on where its keys lie (jax {jax.__version__} on this CPU): set "
                "it to false"
            )


def _turned(w: jax.Array) -> exact.Weights:
    return exact.turned(w.T)


@functools.cache
def _unlike(length: int, size: int, layout: Callable, counts: tuple[int, ...]) -> list[int]:
    """Those of `counts` rows whose products with weights [length, size] differ from others'."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((max(*counts, _SAMPLE), length), np.float32)
    w = rng.standard_normal((length, size), np.float32)

    @jax.jit
    def products(x, w):
        laid_out = layout(w)
        reference = exact.many_rows(w).product(x[:_SAMPLE])
        found = [laid_out.product(x[:n])[:_SAMPLE] for n in counts]
        return [jnp.any(y != reference[: len(y)]) for y in found]

    return [n for n, unlike in zip(counts, products(x, w), strict=True) if unlike]


@functools.cache
def _attention_holds(group: int, dim: int) -> bool:
    """Whether a query's output stays the same with hidden keys among its own, and over pages."""
    block, page = exact.key_block(dim), 16
    length = 2 * block + 3 * page
    rng = np.random.default_rng(0)
    own = np.sort(rng.choice(length, length // 2, replace=False))
    others = np.setdiff1d(np.arange(length), own)
    num, shapes = len(own), ((1, length, group, dim), (1, length, 1, dim), (1, length, 1, dim))
    first = [rng.standard_normal(shape, np.float32) for shape in shapes]
    among = [np.empty_like(x) for x in first]
    for x, y in zip(first, among, strict=True):
        y[:, own], y[:, others] = x[:, :num], x[:, num:]
    hidden = np.zeros((2, 1, length, 1, 2), np.int32)
    hidden[1, :, others] = 0, length
    attend = jax.jit(lambda *arrays: exact.rows(*arrays)[0])
    whole = np.asarray(attend(*first, hidden[0]))[0, :num]
    spread = np.asarray(attend(*among, hidden[1]))[0, own]
    q, k, v = first
    pages = -(-num // page)
    pool = np.stack([k[0], v[0]], axis=2)[: pages * page].reshape(1, pages, page, 2, dim)
    at = np.linspace(0, num - 1, 8).astype(np.int32)
    table = np.broadcast_to(np.arange(pages, dtype=np.int32), (8, pages))
    base = np.broadcast_to(page * np.arange(pages + 1, dtype=np.int32), (8, pages + 1))
    over_pages = jax.jit(lambda *arrays: exact.paged(*arrays))
    paged = over_pages(q[0, at][:, None], pool, np.int32(0), table, base, at[:, None])
    return bool((spread == whole).all() and (np.asarray(paged)[:, 0] == whole[at]).all())
