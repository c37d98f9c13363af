"""How the next token is chosen: the caller's knobs, and the pure function that applies them.

Every lane has its own knobs and key, so a token depends on nothing else in the batch: the token at
`position` of a line is drawn with fold(fold(line key, TOKEN), position) by the Gumbel maximum.
"""

import dataclasses
import math
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
    SamplingParams for the rule. Lanes that are not wanted stay as they are, bit for bit."""
    vocab = logits.shape[-1]
    order = jnp.sort(logits, axis=-1, descending=True)
    weight = jnp.exp(order - order[:, :1])
    top_k = jnp.where(lanes.top_k > 0, jnp.minimum(lanes.top_k, vocab), vocab)
    total = jnp.cumsum(jnp.where(jnp.arange(vocab) < top_k[:, None], weight, 0.0), axis=-1)
    # In float32 the sum reaches its end before the last tokens: without top-p it decides nothing.
    before = jnp.sum(total < ((lanes.top_p - SLACK) * total[:, -1])[:, None], axis=-1)
    count = jnp.where(lanes.top_p < 1, jnp.minimum(before + 1, top_k), top_k)
    lowest = jnp.take_along_axis(order, count[:, None] - 1, axis=-1)

    def first_by_id():
        above, equal = logits > lowest, logits == lowest
        room = count - jnp.sum(above, axis=-1)
        return above | (equal & (jnp.cumsum(equal, axis=-1) <= room[:, None]))

    keep = logits >= lowest
    more = jnp.any(wanted & (jnp.sum(keep, axis=-1) > count))
    keep = jax.lax.cond(more, first_by_id, lambda: keep)
    least = lanes.min_p * (1 - SLACK)
    keep &= jnp.exp(logits - order[:, :1]) >= least[:, None]
    return jnp.where(keep | ~wanted[:, None], logits, -jnp.inf)


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
