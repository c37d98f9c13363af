"""How the next token is chosen: the caller's knobs, and the pure function that applies them.

Every lane has its own knobs and key (keys.py), so a token depends on nothing else in the batch: the
token at `position` of a line is drawn with fold(fold(line key, TOKEN), position) by the Gumbel
maximum.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import struct

from npr_jax.base.fields import Checked, Count, CountOrZero, Positive, PositiveOrZero, Range
from npr_jax.decode.keys import PRNG, TOKEN

Array = Any  # of JAX on the device, of NumPy on the host, or a shape alone
MOST_LOGPROBS, MOST_BIASES = 20, 300  # of a token, of an answer: the limits of OpenAI's API
SLACK = 1e-6  # by which a float32 probability or sum may miss what was asked for


@dataclasses.dataclass(frozen=True)
class SamplingParams(Checked):
    """What a caller may ask for.

    A token is drawn from what the knobs leave of the distribution, in this order: the repetition
    penalty changes the logits; `presence_penalty` and `frequency_penalty` are subtracted;
    `logit_bias` is added, and ends of text that `min_tokens` forbids are taken out; all are divided
    by the temperature; of the tokens sorted by probability (falling; equal ones by id, rising) the
    first `top_k` stay; of these, with probabilities that sum to 1 again, the fewest whose sum is
    `top_p` or more (less 1e-6, for rounding); of these, those with at least `min_p` times the
    probability of the first (less a millionth of it). The
    first stays in any case. A knob that is off changes nothing. Log-probs of sampled tokens are of
    what is left, its probabilities summing to 1.

    Attributes:
      temperature: divides the logits; 0 is greedy, for which no filter matters.
      top_p: the fewest tokens whose probabilities sum to it are kept; 1 is off.
      top_k (tokens): that are kept, the likeliest; 0 is off.
      min_p: tokens at least this many times as likely as the likeliest are kept; 0 is off.
      repetition_penalty: divides (multiplies, below 0) the logits of tokens that the line sees; 1
        is off.
      step_repetition_penalty: the same inside steps; null takes `repetition_penalty`.
      max_tokens (tokens): the most that an answer may have, all its branches and headers together.
      max_position (tokens): positions stay below it; null is the model's limit.
      n (answers): per prompt.
      seed: of every prompt, or one for each.
      parallel: fork at `</guideline>`; false decodes everything as one line of text.
      stop_token_ids (token ids): end the text beside the model's own end-of-text ids.
      ignore_eos: the model's own end-of-text ids are tokens like others.
      stop: texts that end a line (the trunk or a branch) as an end of text does. The answer's text
        ends before the first that the line has drawn, wherever tokens begin and end; the token
        that completes it is the last. What the engine writes itself is not searched.
      logprobs (tokens): of which every token drawn has the raw log-probs beside its own, the
        likeliest; at most `engine.max_logprobs`.
      prompt_logprobs (tokens): the prompt's tokens have raw log-probs too, and as many of the
        likeliest in place of each. Needs an `engine.max_logprobs` of at least 1; the prompt is
        computed, whatever is cached of it. Null is off.
      max_branches (branches): as `engine.max_branches`, which null takes, and at most that.
      max_depth (levels): as `engine.max_depth`, which null takes, and at most that; 0 forks none.
      min_tokens (tokens): of the response that the path of a line must hold before the line may
        end. Until its position is so many behind the prompt's end, a line (trunk or branch) draws
        none of the model's own ends of text nor of `stop_token_ids`, and what it draws is not
        searched for `stop`; tags are drawn as ever. At most `max_tokens`.
      presence_penalty: subtracted from the logits of tokens that the line sees in the response:
        what the engine wrote included, the prompt not; in a branch the trunk's so far and its own,
        and after a join all branches'.
      frequency_penalty: the same, times how often it holds them.
      logit_bias (pairs): of a token's id and what is added to its logit, -100 to ban it as good as
        surely; at most `engine.max_logit_bias`.
    """

    temperature: PositiveOrZero = 1.0
    top_p: Annotated[float, Range(gt=0, le=1)] = 1.0
    top_k: CountOrZero = 0
    min_p: Annotated[float, Range(ge=0, lt=1)] = 0.0
    repetition_penalty: Positive = 1.0
    step_repetition_penalty: Positive | None = None
    max_tokens: Count = 512
    max_position: Count | None = None
    n: Count = 1
    seed: Annotated[int | tuple[int, ...], Range(ge=0, lt=2**32)] = 0
    parallel: bool = True
    stop_token_ids: tuple[CountOrZero, ...] = ()
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    logprobs: Annotated[int, Range(ge=0, le=MOST_LOGPROBS)] = 0
    prompt_logprobs: Annotated[int, Range(ge=0, le=MOST_LOGPROBS)] | None = None
    max_branches: Count | None = None
    max_depth: CountOrZero | None = None
    min_tokens: CountOrZero = 0
    presence_penalty: Annotated[float, Range(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Range(ge=-2, le=2)] = 0.0
    logit_bias: tuple[tuple[CountOrZero, float], ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if "" in self.stop:
            raise ValueError(f"stop is {list(self.stop)}, needed are texts that are not empty")
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}, needed is at most max_tokens={self.max_tokens}"
            )
        ids = [token for token, _ in self.logit_bias]
        if len(ids) > MOST_BIASES or len(ids) > len({*ids}):
            raise ValueError(
                f"logit_bias has {len(ids)} entries for {len({*ids})} tokens, needed are one for "
                f"each, and at most {MOST_BIASES}"
            )


@struct.dataclass
class LaneSampling:
    """The knobs of R lanes: `key` uint32[R, 2]; `temperature`, `top_p`, `min_p`, `penalty` (for
    repetition), `presence` and `frequency` f32[R]; `top_k` i32[R]; `stops` i32[R, E], token ids
    (-1: unused), of which the first `ends` i32[R] end the text, and are not drawn below the
    position `ends_from` i32[R]; `bias_ids` i32[R, B] (-1: unused) and `bias` f32[R, B] (None:
    the engine takes none); `logprobs` bool[R], whether it wants the likeliest tokens (None: the
    engine gives none)."""

    key: Array
    temperature: Array
    top_p: Array
    top_k: Array
    min_p: Array
    penalty: Array
    presence: Array
    frequency: Array
    stops: Array
    ends: Array
    ends_from: Array
    logprobs: Array | None = None
    bias_ids: Array | None = None
    bias: Array | None = None


def _filter(logits: jax.Array, lanes: LaneSampling, wanted: jax.Array) -> jax.Array:
    """-inf where a lane of `wanted` bool[R] cuts a token of the tempered logits f32[R, V]; see
    SamplingParams for the rule. Lanes that are not wanted stay as they are, bit for bit.

    Nothing is sorted: the last token that stays is found by bisection.
    """
    vocab = logits.shape[-1]
    weight = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    top_k = jnp.where(lanes.top_k > 0, jnp.minimum(lanes.top_k, vocab), vocab)

    def first_k():
        keys = _keys(logits)
        last = _largest(keys.shape[0], lambda key: jnp.sum(keys >= key, axis=-1) >= top_k)
        return _with_first(keys > last, keys == last, top_k - jnp.sum(keys > last, axis=-1))

    def fewest():  # of those that top-k keeps
        mass = jnp.where(keep, weight, 0.0)

        def sum_above(some):
            return jnp.sum(jnp.where(some, mass, 0.0), axis=-1)

        need = jnp.maximum(lanes.top_p - SLACK, SLACK * SLACK) * jnp.sum(mass, axis=-1)

        def enough(key):  # a weight's bits are ordered as weights are
            return sum_above(mass >= jax.lax.bitcast_convert_type(key, jnp.float32)) >= need

        last = jax.lax.bitcast_convert_type(_largest(len(mass), enough, 2), jnp.float32)
        room = jnp.ceil(
            (need - sum_above(mass > last)) / jnp.maximum(last[:, 0], jnp.finfo(jnp.float32).tiny)
        )
        return _with_first(mass > last, keep & (mass == last), jnp.clip(room, 1, vocab))

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


def _largest(num_rows: int, enough: Callable[[jax.Array], jax.Array], first: int = 0) -> jax.Array:
    """The largest key uint32[R, 1] for which `enough(key)` bool[R] holds, for each of R rows; it
    holds for 0, and for every key below one for which it holds. `first` bits of all keys are 0."""

    def try_bit(i, found):
        tried = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(tried)[:, None], tried, found)

    return jax.lax.fori_loop(first, 32, try_bit, jnp.zeros((num_rows, 1), jnp.uint32))


def _with_first(above: jax.Array, equal: jax.Array, room: jax.Array) -> jax.Array:
    """What is above, and of what is equal the first `room` [R] by id."""
    num_rows, vocab = equal.shape

    def by_id():
        left = jnp.arange(vocab, 0, -1, dtype=jnp.uint32)
        first = 32 - vocab.bit_length()
        last = _largest(
            num_rows, lambda key: jnp.sum(equal & (left >= key), axis=-1) >= room, first
        )
        return above | (equal & (left >= last))

    more = jnp.any(jnp.sum(equal, axis=-1) > room)
    return jax.lax.cond(more, by_id, lambda: above | equal)


def sample(
    logits: jax.Array,
    positions: jax.Array,
    given: jax.Array,
    lanes: LaneSampling,
    seen: Callable[[], jax.Array],
    log_sum_exp: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Draws one token per lane.

    Args:
      logits: f32[R, V], raw.
      positions: i32[R], of the tokens to be drawn.
      given: i32[R]; a token to take instead of drawing, or -1.
      lanes: the knobs.
      seen: gives uint16[R, V], what lines see (`steps.add_seen`); used where a lane has a penalty.
      log_sum_exp: of f32[R, V] over each row, f32[R]; None is JAX's.

    Returns:
      tokens i32[R]; raw log-prob f32[R]; log-prob under the penalised, tempered and filtered
      distribution f32[R] (0 for greedy lanes); margin f32[R], the best minus the second of the
      perturbed logits; `log_sum_exp` of the raw logits, f32[R].
    """
    greedy = lanes.temperature == 0
    endless = positions < lanes.ends_from
    counted = (lanes.penalty != 1) | (lanes.presence != 0) | (lanes.frequency != 0)
    differs = counted | endless
    if lanes.bias_ids is not None:
        differs |= lanes.bias_ids[:, 0] >= 0

    def changed():
        penalty = lanes.penalty[:, None]
        scaled = jnp.where(logits > 0, logits / penalty, logits * penalty)
        counts = seen()
        x = jnp.where(counts > 0, scaled, logits)
        drawn = jnp.maximum(counts, 1) - 1  # of the response
        x -= lanes.presence[:, None] * (drawn > 0) + lanes.frequency[:, None] * drawn
        end = endless[:, None] & (jnp.arange(lanes.stops.shape[1]) < lanes.ends[:, None])
        ids, added = jnp.where(end, lanes.stops, -1), jnp.full(end.shape, -jnp.inf)
        if lanes.bias_ids is not None and lanes.bias is not None:
            ids = jnp.concatenate([ids, lanes.bias_ids], axis=1)
            added = jnp.concatenate([added, lanes.bias], axis=1)
        ids = jnp.where(ids < 0, logits.shape[-1], ids)  # past the end: none
        return x.at[jnp.arange(len(x))[:, None], ids].add(added, mode="drop")

    # Divided in both branches, or the one without would copy the logits.
    temperature = jnp.where(greedy, 1.0, lanes.temperature)[:, None]
    shaped = jax.lax.cond(
        jnp.any(differs),
        lambda: changed() / temperature,
        lambda: logits / temperature,
    )
    filters = (lanes.top_k > 0) | (lanes.top_p < 1) | (lanes.min_p > 0)
    wanted = filters & ~greedy
    shaped = jax.lax.cond(jnp.any(wanted), lambda x: _filter(x, lanes, wanted), lambda x: x, shaped)

    def noise(key, position):
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl=PRNG), TOKEN)
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

    log_sum_exp = log_sum_exp or functools.partial(jax.nn.logsumexp, axis=-1)
    norm = log_sum_exp(logits)

    def logp(x, norm):
        return jnp.take_along_axis(x, tokens[:, None], axis=-1)[:, 0] - norm

    logp_sampled = jnp.where(greedy, 0.0, logp(shaped, log_sum_exp(shaped)))
    return tokens, logp(logits, norm), logp_sampled, margin, norm


def likeliest(logits: jax.Array, norm: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` tokens i32[R, K] with the largest logits f32[R, V], falling, equal ones by rising
    id; and their log-probs f32[R, K] under `norm` f32[R], of which a token has no other elsewhere.
    """
    values, ids = jax.lax.top_k(logits, count)
    return ids, values - norm[:, None]
