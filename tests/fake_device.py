"""A device in plain Python: pages hold (token, position, weights), and what is drawn is a function
of just what a table lists. So a finished answer can be checked against its own layout: had any page
been given away too early, listed twice, or read at a wrong fill, another token would have come out.
"""

import dataclasses
import functools
import itertools
from collections import Counter

import bigram
import jax
import numpy as np
from engine_checks import recount
from hypothesis import strategies as st

from npr_jax.decode import Engine, EngineConfig, SamplingParams
from npr_jax.decode.attention import TOGETHER
from npr_jax.decode.sequence import Fork
from npr_jax.decode.steps import LaneState, Rows, SamplerOutput, Steps
from npr_jax.tree import Rules

_TABLE = np.cumsum(bigram.table(eos=0.01, nested=0.12), axis=1)
PROMPTS = [[12, 13, 20], [22], list(range(9, 23)), [*range(9, 23), 20, 21, 22], [12] * 9]


def draw(tokens, positions) -> int:
    """The next token after what is seen, in order; a hash picks it from the table."""
    ranks = np.arange(len(tokens), dtype=np.uint64)
    mixed = (tokens.astype(np.uint64) * 0x9E3779B1 + positions.astype(np.uint64)) * 0x85EBCA77
    mixed = (mixed ^ (mixed >> np.uint64(15))) * (2 * ranks + 0xC2B2AE3D)
    total = int(mixed.sum()) & 0xFFFFFFFFFFFFFFFF
    share = ((total ^ (total >> 29)) * 0xBF58476D1CE4E5B9 >> 11 & 0xFFFFFFFF) / 2**32
    return int(np.searchsorted(_TABLE[tokens[-1]], share * _TABLE[tokens[-1], -1], side="right"))


class Device:
    """Stands in for the compiled steps."""

    def __init__(self, config: EngineConfig):
        self.cells = np.full((config.pages, config.page_size, 3), -1, np.int64)
        self.weights = 0  # the number of those that the call at hand was given
        self.steps = config.steps
        self.copied = 0  # entries

    def _seen(self, rows, r: int, rank: int):
        """(tokens, positions) of the entries that row r sees up to `rank`."""
        base, size = rows.base[r], self.cells.shape[1]
        entry = base[:-1, None] + np.arange(size)
        seen = (entry < base[1:, None]) & (entry <= rank)
        cells = self.cells[rows.table[r]][seen]
        assert (cells >= 0).all(), "an entry that was never written is read"
        assert (cells[:, 2] == self.weights).all(), "an entry of other weights is read"
        return cells[:, 0], cells[:, 1]

    def _write(self, rows, r: int, rank: int, token: int, position: int) -> None:
        column = int((rows.base[r, 1:] <= rank).sum())
        page, slot = rows.table[r, column], rank - rows.base[r, column]
        assert page > 0 and 0 <= slot < self.cells.shape[1], "a write outside the table"
        number, size = rank - rows.entry[r], self.cells.shape[1]
        assert (column, slot) == (rows.column[r] + number // size, number % size)
        self.cells[page, slot] = token, position, self.weights

    def _check(self, rows, shared, ranks) -> None:
        """What is read together is what each of the rows would read alone; no row is left out."""
        np.testing.assert_array_equal(np.sort(shared.order), np.arange(len(ranks)))
        reached = np.zeros(len(ranks), int)
        for begin, end, first, last in shared.runs.tolist():
            members = shared.order[begin:end]
            assert (reached[members] == first).all() and len(members) <= TOGETHER
            reached[members] = last
            for r in members[ranks[members].max(axis=1) >= 0]:
                leader = members[0]
                assert (rows.table[r, first:last] == rows.table[leader, first:last]).all()
                edges = slice(first, last + 1)
                assert (rows.base[r, edges] == rows.base[leader, edges]).all()
        np.testing.assert_array_equal(reached, shared.own)

    def prefill(self, params, pool, rows, shared, tokens, positions, ranks):
        self.weights = int(params["final_norm"][0])
        self._check(rows, shared, ranks)
        for r, c in np.argwhere(ranks >= 0):
            self._write(rows, r, ranks[r, c], tokens[r, c], positions[r, c])
        for r, c in np.argwhere(ranks >= 0):
            _, seen = self._seen(rows, r, ranks[r, c])
            assert seen.max() == positions[r, c] and (seen < positions[r, c]).sum() == len(seen) - 1
        return pool

    def score(self, params, pool, *arguments):
        *arguments, targets = arguments
        pool = self.prefill(params, pool, *arguments)
        found = np.where(targets < 0, 0, -targets - 1).astype(np.float32)  # as the token says
        ids = np.zeros((*targets.shape, 1), np.int32)
        return pool, found, ids, ids.astype(np.float32)

    @staticmethod
    def write(rows, cells, ends):
        table, base = rows.table.copy(), rows.base.copy()
        for row, column, page, entries in cells:
            if row < len(table):
                table[row, column], base[row, column] = page, entries
        return Rows(table, base, *ends.T)

    @staticmethod
    def mark(seen, fresh, tokens):
        seen = seen.copy()
        seen[fresh] = 0
        row, token, number = tokens[tokens[:, 0] < len(seen)].T
        seen[row, token] = number
        return seen

    def copy(self, pool, cells):
        for page, entry, to_page, to_entry in cells:
            if to_page < len(self.cells):
                found = self.cells[page, entry]
                assert (found[:2] >= 0).all(), "an entry that was never written is copied"
                self.cells[to_page, to_entry] = found
                self.copied += 1
        return pool

    def decode(
        self,
        params,
        pool,
        rows,
        state,
        restart,
        restarted,
        given,
        lanes,
        seen,
        pick,
        shared,
        least,
        limit,
    ):
        self.weights = int(params["final_norm"][0])
        seen = seen.copy()
        everywhere = jax.tree.map(lambda a, b: np.where(restart, a, b), restarted, state)
        if pick is None:
            pick = np.arange(len(restart))
        number = np.flatnonzero(pick < len(restart))  # the rows that are lanes
        rows, new, lanes = jax.tree.map(lambda x: x[pick[number]], (rows, everywhere, lanes))
        first = np.full((len(pick), 1), -1)
        first[number, 0] = np.where(new.frozen | (new.left < 1), -1, new.ranks)
        listed = jax.tree.map(lambda x: np.zeros((len(pick), *x.shape[1:]), x.dtype), rows)
        jax.tree.map(lambda every, some: every.__setitem__(number, some), listed, rows)
        self._check(listed, shared, first)
        tokens, positions, ranks, left, frozen = (
            np.array(x) for x in (new.tokens, new.positions, new.ranks, new.left, new.frozen)
        )
        drawn = np.zeros((len(tokens), self.steps), np.int32)
        count = np.zeros(len(tokens), np.int32)
        stopped = np.zeros(len(tokens), bool)
        for step in range(min(limit, self.steps)):
            live = ~frozen & (left > 0) & (ranks < rows.room)
            if live.sum() < max(1, least[0]):
                break
            for r in np.flatnonzero(live):
                self._write(rows, r, ranks[r], tokens[r], positions[r])
            for r in np.flatnonzero(live):
                tokens_seen, positions_seen = self._seen(rows, r, ranks[r])
                if lanes.penalty[r] != 1 or lanes.presence[r] or lanes.frequency[r]:
                    # The response begins at `ends_from`, as nobody here asks for `min_tokens`.
                    own = tokens_seen[positions_seen >= lanes.ends_from[r]]
                    expected = np.bincount(own, minlength=seen.shape[1])
                    expected[np.unique(tokens_seen)] += 1
                    np.testing.assert_array_equal(seen[pick[number[r]]], expected)
                token = given[pick[number[r]], step]
                token = draw(tokens_seen, positions_seen) if token < 0 else token
                seen[pick[number[r]], token] = max(1, seen[pick[number[r]], token]) + 1
                drawn[r, step] = tokens[r] = token
                stopped[r] = frozen[r] = token in lanes.stops[r]
            count += live
            positions, ranks, left = positions + live, ranks + live, left - live
        moved = LaneState(tokens, positions, ranks, left, frozen)
        for name in ("tokens", "positions", "ranks", "left", "frozen"):
            getattr(everywhere, name)[pick[number]] = getattr(moved, name)
        out = [np.zeros((len(pick), *x.shape[1:]), x.dtype) for x in (drawn, count, stopped)]
        for all_rows, some in zip(out, (drawn, count, stopped), strict=True):
            all_rows[number] = some
        drawn, count, stopped = out
        figures = np.full(drawn.shape, -0.5, np.float32)
        steps = np.full(len(pick), count.max(initial=0), np.int32)
        output = SamplerOutput(drawn, figures, figures, figures, count, stopped, steps)
        return pool, everywhere, seen, output


@functools.cache
def _model():
    return bigram.model()


class Landed(np.ndarray):
    """An array that is there at once."""

    def is_ready(self) -> bool:
        return True


def engine_on_fake_device(config: EngineConfig, **changes) -> Engine:
    """An engine whose every call to the device goes to `Device`; `changes` are of its model."""
    engine = Engine(dataclasses.replace(_model(), **changes), config)
    device, runner = Device(config), engine.runner

    def decode(*args):
        pool, state, seen, drawn = device.decode(*args)
        return pool, state, seen, dataclasses.replace(drawn, count=drawn.count.view(Landed))

    runner._steps = runner._prompt_steps = Steps(
        device.prefill, device.score, decode, device.write, device.mark, device.copy
    )
    runner._put = lambda tree, spec=None: tree
    runner.reset()
    return engine


def check_answer(answer) -> None:
    """Every sampled token is what the function says of what the layout lets it see."""
    tree, tokens = answer.layout, answer.token_ids
    sampled = np.flatnonzero(~answer.forced)
    drawn = sampled[sampled >= answer.prompt_len]
    assert (answer.step[drawn] > answer.step[tree.pred[drawn]]).all(), "before its predictor"
    assert (np.delete(answer.step, drawn) == -1).all()
    for t in drawn:
        p = tree.pred[t]
        k = np.arange(p + 1)
        hidden = ((tree.hidden[: p + 1, :, 0] <= p) & (p < tree.hidden[: p + 1, :, 1])).any(axis=1)
        assert draw(tokens[k[~hidden]], tree.positions[k[~hidden]]) == tokens[t]


def check_scores(answer, asked: bool) -> None:
    """The prompt's tokens are scored where that was asked for and the answer had begun."""
    found, own = answer.logp[: answer.prompt_len], -answer.token_ids[: answer.prompt_len] - 1
    own[0] = 0
    begun = asked and len(answer.response_ids) > 0
    assert (found == own).all() if begun else ((found == 0) | asked & (found == own)).all()


OPERATIONS = ("visit", "visit", "visit", "visit", "submit", "fork", "abort", "preempt", "forget")
CONFIGS = [
    EngineConfig(
        lanes=lanes,
        pages=pages,
        page_size=size,
        steps=steps,
        header_rows=rows,
        header_chunk=4,
        prefill_rows=2,
        prefill_chunk=chunk,
        max_branches=4,
        max_depth=3,
        max_logprobs=1,
    )
    for lanes, pages, size, steps, rows, chunk in (
        (4, 30, 4, 5, 4, 8),
        (2, 60, 2, 3, 1, 5),
        (7, 24, 8, 9, 3, 16),
        (16, 70, 4, 6, 5, 8),
        (3, 90, 1, 4, 2, 8),
    )
]


# All rules of fork, join and positions, first the defaults.
RULES = [
    Rules(join, fork, positions, 13 if join == "last" else None)
    for join, fork, positions in itertools.product(
        ("all", "last"), ("trunk", "fresh"), ("max", "sum")
    )
]

# The same with blocks of trials.
TRIAL, FAILURE = 9, 13
TRIALS = [dataclasses.replace(rules, trial=TRIAL, failure=FAILURE) for rules in RULES]

SOME_RULES = st.one_of(st.just(RULES[0]), st.sampled_from(RULES), st.sampled_from(TRIALS))


def run_program(config: EngineConfig, program: list[tuple[str, int]]) -> dict[str, int]:
    """Runs (operation, argument) one after the other, then everything to its end; checks counts
    after each, every answer at its end, and that nothing is held then. Returns the statistics."""
    engine = engine_on_fake_device(config)
    scheduler = engine.schedulers[0]
    asked, answers, aborted, scored, forked = [], {}, [], set(), Counter()
    budget = min(90, (config.pages - 8) * config.page_size - 20)

    def collect():
        while engine._outputs.events:
            event = engine._outputs.events.popleft()
            if event.kind == "finish":
                assert event.request not in answers
                answers[event.request] = event.trajectory

    def hear(event):
        if event.kind == "finish":
            answers[event.request] = event.trajectory

    def fork(value: int):
        """An answer goes on from the middle of another."""
        for request in asked[value % len(asked) :]:
            found = engine._requests.get(request)
            if found is None or found.end or any(isinstance(x, Fork) for x in found.trunk.items):
                continue
            first = max(0, found.trunk.tail.start - found.prompt_len)
            most = found.trunk.position - found.prompt_len
            if not first <= most <= 50:
                continue
            length = first + value % (most - first + 1)
            known = found.trunk.own_tokens()[: found.prompt_len + length]
            sampling = SamplingParams(
                parallel=False, max_tokens=1 + value % 9, frequency_penalty=value % 2 / 2
            )
            new = engine.fork(request, length, [9 + value % 14] * (1 + value % 3), sampling, hear)
            prompt = engine._requests[new].trunk.own_tokens()
            assert prompt[: len(known)] == known and len(prompt) == len(known) + 1 + value % 3
            asked.append(new)
            forked["from_the_middle"] += 1
            return

    def abort_at(count: int, value: int):
        """A callback that aborts an answer, its own or another, at its `count`-th event."""
        heard = []

        def callback(event):
            heard.append(event)
            if len(heard) == count:
                aborted.append(engine.abort(asked[value % len(asked)]))

        return callback

    for operation, value in program:
        if operation == "submit":
            begin, room = PROMPTS[value % len(PROMPTS)], budget
            if value % 4 == 3 and answers:  # the next turn of a conversation
                begin = list(answers.values())[-1].token_ids[:40].tolist()
                room -= len(begin) // 2
            prompt = [*begin, 9 + value // 5 % 14]
            sampling = SamplingParams(
                n=1 + value % 3,
                parallel=value % 5 != 4,
                max_tokens=room - value % 8 * room // 9,
                repetition_penalty=1 + value % 7 // 5,  # which changes nothing that `draw` draws
                step_repetition_penalty=1 + value % 5 // 3,
                prompt_logprobs=None if value % 4 else 0,
                frequency_penalty=0.0 if value % 3 else 0.5,
            )
            callback = abort_at(value % 9, value // 4) if value % 3 == 0 else None
            new = engine.submit([prompt], sampling, callback)
            asked += new
            scored |= set() if value % 4 else set(new)
        elif operation == "visit" and engine._requests:
            engine._visit()
        elif operation == "fork" and asked:
            fork(value)
        elif operation == "abort" and asked:
            engine.abort(asked[value % len(asked)])
        elif operation == "preempt" and scheduler.running:
            scheduler._preempt(scheduler.running[value % len(scheduler.running)])
        elif operation == "forget":
            engine.drop_prefix_cache()
        recount(scheduler)
        collect()
    for _ in range(3000):
        if not engine._requests:
            break
        engine._visit()
        recount(scheduler)
        collect()
    assert sorted(answers) == sorted(asked), "somebody starved"
    for request, answer in answers.items():
        check_answer(answer)
        check_scores(answer, request in scored)
    assert scheduler.pages.num_held == 0
    engine._pending = None
    reasons = {f"ends_{a.finish_reason}": 1 for a in answers.values()}
    counts = {"aborts_by_callbacks": sum(aborted)}
    counts["copied"] = engine.runner._steps.copy.__self__.copied
    return engine.stats() | reasons | forked | counts
