"""How the next token is chosen: the caller's knobs, and the pure function that applies them.

Every lane has its own knobs and key, so a token depends on nothing else in the batch: the token at
`position` of a line is drawn with fold(fold(line key, TOKEN), position) by the Gumbel maximum.
"""

import dataclasses
import math
from collections.abc import Callable
from numbers import Integral, Real

import jax
import jax.numpy as jnp
from flax import struct

BRANCH, TOKEN = 0, 1  # the two streams of a line's key
SLACK = 1e-6  # by which a float32 probability or sum may miss what was asked for


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """What a caller may ask for.

    A token is drawn from what the knobs leave of the distribution, in this order: the penalties
    change the logits, which are divided by the temperature; of the tokens sorted by probability
    (falling; equal ones by id, rising) the first `top_k` stay; of these, with probabilities that
    sum to 1 again, the fewest whose sum is `top_p` or more (less 1e-6, for rounding); of these,
    those with at least `min_p` times the probability of the first (less a millionth of it). The
    first stays in any case. A knob that is off changes nothing. Log-probs of sampled tokens are of
    what is left, its probabilities summing to 1.

    Attributes:
      temperature: 0 is greedy, for which no filter matters.
      top_k, top_p, min_p: the filters; 0, 1 and 0 switch them off.
      repetition_penalty: divides (multiplies, below 0) the logits of tokens that the line sees.
      step_repetition_penalty: the same inside steps; None takes `repetition_penalty`.
      max_tokens: tokens of the whole tree that may be generated, headers included.
      max_position: positions stay below it; None is the model's limit.
      n: answers per prompt.
      seed: of every prompt, or one for each.
      parallel: fork at `</guideline>`; False decodes everything as one line of text.
      stop_token_ids: end the text beside the model's own end-of-text ids.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    step_repetition_penalty: float | None = None
    max_tokens: int = 512
    max_position: int | None = None
    n: int = 1
    seed: int | tuple[int, ...] = 0
    parallel: bool = True
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        def check(name, kind, good, need, optional=False):
            value = getattr(self, name)
            if optional and value is None:
                return
            right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            if not right or (kind is Real and not math.isfinite(value)) or not good(value):
                raise ValueError(f"{name} is {value!r}, needed is {need}")

        check("temperature", Real, lambda x: x >= 0, "a finite number, 0 or more")
        check("top_p", Real, lambda x: 0 < x <= 1, "a number above 0, at most 1")
        check("top_k", Integral, lambda x: x >= 0, "an integer, 0 (off) or more")
        check("min_p", Real, lambda x: 0 <= x < 1, "a number from 0 (off), below 1")
        for name in ("repetition_penalty", "step_repetition_penalty"):
            optional = name.startswith("step")
            check(name, Real, lambda x: x > 0, "a finite number above 0", optional)
        check("max_tokens", Integral, lambda x: x >= 1, "an integer, 1 or more")
        check("max_position", Integral, lambda x: x >= 1, "an integer, 1 or more", optional=True)
        check("n", Integral, lambda x: x >= 1, "an integer, 1 or more")
        check("parallel", bool, lambda x: True, "true or false")
        for name, many in (("seed", self.seed), ("stop_token_ids", self.stop_token_ids)):
            many = (many,) if name == "seed" and isinstance(many, Integral) else many
            if not isinstance(many, tuple) or not all(
                isinstance(x, Integral) and not isinstance(x, bool) and 0 <= x < 2**32 for x in many
            ):
                one = "an integer or " if name == "seed" else ""
                need = f"{one}a tuple of integers from 0, below 2**32"
                raise ValueError(f"{name} is {getattr(self, name)!r}, needed is {need}")


@struct.dataclass
class LaneSampling:
    """The knobs of R lanes as arrays [R]; `key` is uint32[R, 2], `stops` i32[R, E] (-1: unused)."""

    key: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    min_p: jax.Array
    penalty: jax.Array
    stops: jax.Array


def _filter(logits: jax.Array, lanes: LaneSampling, wanted: jax.Array) -> jax.Array:
    """-inf where a lane of `wanted` bool[R] cuts a token of the tempered logits f32[R, V]; see
    SamplingParams for the rule. Lanes that are not wanted stay as they are, bit for bit.

    Nothing is sorted: the last token that stays is found by bisection.
    """
    keys, vocab = _keys(logits), logits.shape[-1]
    weight = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    top_k = jnp.where(lanes.top_k > 0, jnp.minimum(lanes.top_k, vocab), vocab)

    def first_k():
        last = _largest(keys, lambda kept: jnp.sum(kept, axis=-1) >= top_k)
        above = keys > last
        return _with_first(above, keys == last, top_k - jnp.sum(above, axis=-1))

    def fewest():  # of those that top-k keeps
        mass = jnp.where(keep, weight, 0.0)
        need = jnp.maximum(lanes.top_p - SLACK, SLACK * SLACK) * jnp.sum(mass, axis=-1)
        last = _largest(keys, lambda kept: jnp.sum(jnp.where(kept, mass, 0.0), axis=-1) >= need)
        above, equal = keep & (keys > last), keep & (keys == last)
        each = jnp.max(jnp.where(equal, weight, 0.0), axis=-1)
        room = jnp.ceil((need - jnp.sum(jnp.where(above, mass, 0.0), axis=-1)) / each)
        return _with_first(above, equal, jnp.clip(room, 1, vocab).astype(jnp.int32))

    keep = jnp.ones(logits.shape, bool)
    keep = jax.lax.cond(jnp.any(wanted & (lanes.top_k > 0)), first_k, lambda: keep)
    nucleus = wanted & (lanes.top_p < 1)
    some = jax.lax.cond(jnp.any(nucleus), fewest, lambda: keep)
    keep = jnp.where(nucleus[:, None], some, keep)
    keep &= weight >= (lanes.min_p * (1 - SLACK))[:, None]
    return jnp.where(keep | ~wanted[:, None], logits, -jnp.inf)


def _keys(x: jax.Array) -> jax.Array:
    """uint32 keys that are ordered as the floats f32 are, with one key for both zeros."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(keys: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest key uint32[R, 1] of each row for which `enough(keys >= key)` bool[R] holds; it
    holds for 0, and for every key below one for which it holds."""

    def try_bit(i, found):
        tried = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(keys >= tried)[:, None], tried, found)

    return jax.lax.fori_loop(0, 32, try_bit, jnp.zeros((len(keys), 1), jnp.uint32))


def _with_first(above: jax.Array, equal: jax.Array, room: jax.Array) -> jax.Array:
    """What is above, and of what is equal the first `room` i32[R] by id."""

    def by_id():
        return above | (equal & (jnp.cumsum(equal, axis=-1) <= room[:, None]))

    more = jnp.any(jnp.sum(equal, axis=-1) > room)
    return jax.lax.cond(more, by_id, lambda: above | equal)


def sample(
    logits: jax.Array,
    positions: jax.Array,
    given: jax.Array,
    lanes: LaneSampling,
    seen: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Draws one token per lane.

    Args:
      logits: f32[R, V], raw.
      positions: i32[R], of the tokens to be drawn.
      given: i32[R]; a token to take instead of drawing, or -1.
      lanes: the knobs.
      seen: bool[R, V], the tokens that the penalty applies to, or None where no lane has one.

    Returns:
      tokens i32[R]; raw log-prob f32[R]; log-prob under the penalised, tempered and filtered
      distribution f32[R] (0 for greedy lanes); margin f32[R], the best minus the second of the
      perturbed logits.
    """
    greedy = lanes.temperature == 0
    shaped = logits
    if seen is not None:
        penalty = lanes.penalty[:, None]
        scaled = jnp.where(shaped > 0, shaped / penalty, shaped * penalty)
        shaped = jnp.where(seen, scaled, shaped)
    shaped = shaped / jnp.where(greedy, 1.0, lanes.temperature)[:, None]
    filters = (lanes.top_k > 0) | (lanes.top_p < 1) | (lanes.min_p > 0)
    wanted = filters & ~greedy
    shaped = jax.lax.cond(jnp.any(wanted), lambda x: _filter(x, lanes, wanted), lambda x: x, shaped)

    def noise(key, position):
        key = jax.random.fold_in(jax.random.wrap_key_data(key), TOKEN)
        key = jax.random.fold_in(key, position)
        return jax.random.gumbel(key, shaped.shape[-1:], jnp.float32)

    perturbed = jax.lax.cond(
        jnp.all(greedy),
        lambda: shaped,
        lambda: jnp.where(greedy[:, None], shaped, shaped + jax.vmap(noise)(lanes.key, positions)),
    )
    best = jnp.argmax(perturbed, axis=-1)
    column = jnp.arange(logits.shape[-1])
    second = jnp.max(jnp.where(column == best[:, None], -jnp.inf, perturbed), axis=-1)
    margin = jnp.max(perturbed, axis=-1) - second
    tokens = jnp.where(given >= 0, given, best).astype(jnp.int32)

    def logp(x):
        chosen = jnp.take_along_axis(x, tokens[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(x, axis=-1)

    return tokens, logp(logits), jnp.where(greedy, 0.0, logp(shaped)), margin


@jax.jit
def fold_branches(key: jax.Array, numbers: jax.Array) -> jax.Array:
    """Keys uint32[N, 2] of the branches `numbers` i32[N] of the line whose key is uint32[2]."""
    parent = jax.random.fold_in(jax.random.wrap_key_data(key), BRANCH)
    return jax.vmap(lambda i: jax.random.key_data(jax.random.fold_in(parent, i)))(numbers)
