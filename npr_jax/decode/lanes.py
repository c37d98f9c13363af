"""What the lanes hold, on the host and as the device was last told: tables, knobs, where they are.

A lane is a slot of the batch. Its table (tables.py) grows as its sequence gets pages; the rest is
written when a sequence is bound to it, or begins a new epoch on it (`Sequence.epoch`). Only here
are these arrays written; each is sent again where it has changed.
"""

import collections
from collections import abc

import jax
import numpy as np

from npr_jax.decode.config import EngineConfig
from npr_jax.decode.sampling import LaneSampling
from npr_jax.decode.sequence import Sequence
from npr_jax.decode.steps import LaneState
from npr_jax.decode.tables import Tables

MARKS = 1024  # tokens that one call marks as seen


class Lanes:
    """The arrays of R lanes, with their tables; `put` sends host arrays to the device, `once` makes
    them arguments of a call, and `mark(seen, fresh, tokens)` is the compiled step of that name.

    Attributes, on the device: `knobs`; `state` and `seen` uint16[R, V], what lanes with a penalty
    see (steps.add_seen), which the compiled step gives back and the runner stores; `_no_tokens`
    i32[R, N] for "draw all".
    """

    def __init__(self, config: EngineConfig, tables: Tables, seen, mark: abc.Callable, put, once):
        self.config, self.tables, self.seen = config, tables, seen
        self._mark, self._once = mark, once
        num_lanes = len(seen)
        self._bound: list[tuple[Sequence, int] | None] = [None] * num_lanes  # with its epoch
        biases = num_lanes, config.max_logit_bias
        self._knobs = LaneSampling(
            key=np.zeros((num_lanes, 2), np.uint32),
            temperature=np.ones(num_lanes, np.float32),
            top_p=np.ones(num_lanes, np.float32),
            top_k=np.zeros(num_lanes, np.int32),
            min_p=np.zeros(num_lanes, np.float32),
            penalty=np.ones(num_lanes, np.float32),
            presence=np.zeros(num_lanes, np.float32),
            frequency=np.zeros(num_lanes, np.float32),
            stops=np.full((num_lanes, config.max_stops), -1, np.int32),
            ends=np.zeros(num_lanes, np.int32),
            ends_from=np.zeros(num_lanes, np.int32),
            logprobs=np.zeros(num_lanes, bool) if config.max_logprobs else None,
            bias_ids=np.full(biases, -1, np.int32) if config.max_logit_bias else None,
            bias=np.zeros(biases, np.float32) if config.max_logit_bias else None,
        )
        none = np.zeros(num_lanes, np.int32)
        self._resting = put(np.zeros(num_lanes, bool)), put(_state(none, none))
        self._no_tokens = put(np.full((num_lanes, config.steps), -1, np.int32))
        self.state = put(_state(none, none, frozen=True))
        self.knobs = once(jax.tree.map(np.copy, self._knobs))

    def __len__(self) -> int:
        return len(self._bound)

    def arguments(self, sequences: abc.Sequence[Sequence], counts: abc.Sequence[int]) -> tuple:
        """What a decode step of these sequences takes, after the weights and the pool: tables,
        state, which lanes restart and where, given tokens, knobs, and the tokens seen."""
        restart, state = self._update(sequences)
        given = self._given(sequences, counts)
        return self.tables.send(), self.state, restart, state, given, self.knobs, self.seen

    def _update(self, sequences: abc.Sequence[Sequence]):
        """Brings the arrays up to date; returns which lanes restart bool[lanes], and where."""
        here: list[Sequence | None] = [None] * len(self)
        for sequence in sequences:
            assert sequence.lane is not None
            here[sequence.lane] = sequence
        restarted = []
        for lane, sequence in enumerate(here):
            bound = sequence and (sequence, sequence.epoch)
            if bound != self._bound[lane]:
                self._bound[lane] = bound
                restarted.append(lane)
                self._unbind(lane)
                if sequence:
                    self._bind(lane, sequence)
            elif sequence:
                self.tables.grow(lane, sequence.tail)
        if not restarted:
            return self._resting
        self.knobs = self._once(jax.tree.map(np.copy, self._knobs))
        mask, frozen = np.zeros(len(self), bool), np.ones(len(self), bool)
        where = np.zeros((4, len(self)), np.int32)
        mask[restarted] = True
        for lane in restarted:
            if sequence := here[lane]:
                tail, last = sequence.tail, len(sequence.tail.tokens) - 1
                at = tail.tokens[last], tail.start + last, tail.offset + last, sequence.left
                where[:, lane], frozen[lane] = at, False
        knobs = self._knobs
        counted = (knobs.penalty != 1) | (knobs.presence != 0) | (knobs.frequency != 0)
        penalised = [lane for lane in restarted if counted[lane]]
        if penalised:
            self.mark({lane: sequence for lane in penalised if (sequence := here[lane])})
        tokens, positions, ranks, left = where
        return self._once((mask, LaneState(tokens, positions, ranks, left, frozen)))

    def _given(self, sequences: abc.Sequence[Sequence], counts: abc.Sequence[int]):
        """i32[lanes, N], the tokens to take instead of drawing, or -1."""
        if not any(sequence.given for sequence in sequences):
            return self._no_tokens
        given = np.full((len(self), self.config.steps), -1, np.int32)
        for sequence, count in zip(sequences, counts, strict=True):
            if sequence.given:
                done = len(sequence.tail.tokens) + sequence.pending
                given[sequence.lane, :count] = sequence.given[done : done + count]
        return self._once(given)

    def mark(self, sequences: dict[int, Sequence]) -> None:
        """From now on these lanes see what their sequences do."""
        fresh = np.zeros(len(self), bool)
        fresh[list(sequences)] = True
        seen = [
            (lane, token, number)
            for lane, sequence in sequences.items()
            for token, number in _seen(sequence).items()
        ]
        for first in range(0, max(1, len(seen)), MARKS):
            some = np.full((MARKS, 3), len(self), np.int32)  # a lane that is not there
            some[: len(seen) - first] = np.reshape(seen[first : first + MARKS], (-1, 3))
            self.seen = self._mark(self.seen, *self._once((fresh, some)))
            fresh = np.zeros_like(fresh)

    def _unbind(self, lane: int) -> None:
        """Lets the lane ask for nothing that would have to be computed for it."""
        knobs = self._knobs
        knobs.penalty[lane], knobs.ends_from[lane] = 1, 0
        knobs.presence[lane] = knobs.frequency[lane] = 0
        if knobs.bias_ids is not None:
            knobs.bias_ids[lane] = -1

    def _bind(self, lane: int, sequence: Sequence) -> None:
        """Writes a sequence's table and knobs into its lane."""
        self.tables.set(lane, sequence.table)
        knobs, sampling = self._knobs, sequence.request.sampling
        knobs.key[lane] = sequence.key
        knobs.temperature[lane] = sampling.temperature
        knobs.top_p[lane] = sampling.top_p
        knobs.top_k[lane] = sampling.top_k
        knobs.min_p[lane] = sampling.min_p
        knobs.penalty[lane] = sampling.repetition_penalty
        knobs.presence[lane] = sampling.presence_penalty
        knobs.frequency[lane] = sampling.frequency_penalty
        if sequence.depth and sampling.step_repetition_penalty:
            knobs.penalty[lane] = sampling.step_repetition_penalty
        if knobs.logprobs is not None:
            knobs.logprobs[lane] = sampling.logprobs > 0
        if knobs.bias_ids is not None and knobs.bias is not None:
            for number, (token, bias) in enumerate(sampling.logit_bias):
                knobs.bias_ids[lane, number], knobs.bias[lane, number] = token, bias
        knobs.stops[lane] = -1
        knobs.stops[lane, : len(sequence.request.stops)] = sequence.request.stops
        knobs.ends[lane] = len(sequence.request.ends)
        knobs.ends_from[lane] = sequence.request.ends_from


def _seen(sequence: Sequence) -> dict[int, int]:
    """Of every token that a sequence sees, 1 and how often the response holds it."""
    prompt: set[int] = set()
    response: collections.Counter[int] = collections.Counter()
    for segment in sequence.table:
        cut = max(0, sequence.request.prompt_len - segment.start)
        prompt.update(segment.tokens[:cut])
        response.update(segment.tokens[cut:])
    most = np.iinfo(np.uint16).max - 1
    return dict.fromkeys(prompt, 1) | {t: 1 + min(n, most) for t, n in response.items()}


def _state(tokens, left, frozen: bool = False) -> LaneState:
    return LaneState(tokens, tokens, tokens, left, np.full(len(tokens), frozen))
