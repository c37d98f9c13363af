"""Rows that are dealt: every example once, in rows that hold it, on full shards that work alike;
what is trained is what is trained without dealing."""

import collections
import dataclasses
import functools
import itertools
import json
import random
import sys

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import two_processes
from conftest import examples as number_of
from conftest import spread
from hypothesis import given, settings
from train_toy import example, problem, tiny

from npr_jax.base import distributed
from npr_jax.base.mesh import MeshConfig, make_mesh
from npr_jax.model.sharding import place_params, train_shardings
from npr_jax.plan.plan import stage_config
from npr_jax.train import rl
from npr_jax.train.batch import facts, make_batch, visible_pairs
from npr_jax.train.deal import ALL, GAIN, Item, deal, least_slots, shapes, used_tokens
from npr_jax.train.objective import Objective
from npr_jax.train.optimizer import OptimizerConfig, new_state, state_shardings
from npr_jax.train.packing import Example, make_rows
from npr_jax.train.step import TrainConfig, optimize
from npr_jax.tree import layout

LONG = 32768


def items_of(groups, processes=1, split=False):
    """Items of (prompt, responses...) tokens; a group lies on one process, or is dealt out."""
    return [
        Item((group + i * split) % processes, group, prompt, size, size * prompt + size**2 // 2)
        for group, (prompt, *sizes) in enumerate(groups)
        for i, size in enumerate(sizes)
    ]


def check(items, dealt, shards, processes, allowed):
    """What any deal has to be."""
    found = collections.Counter()
    for part in dealt:
        number, row_len = part.shape
        assert number in allowed.rows and row_len in allowed.lengths
        assert len(part.rows) == shards and {len(rows) for rows in part.rows} == {number}
        assert any(row for rows in part.rows for row in rows)
        for row in itertools.chain(*part.rows):
            groups = [items[document[0]].group for document in row]
            assert len({*groups}) == len(groups)  # a prompt once a row
            tokens = 0
            for document in row:
                assert len({items[i].group for i in document}) == 1
                tokens += items[document[0]].prompt + sum(items[i].response for i in document)
                found.update(document)
            assert tokens <= row_len
    assert found == collections.Counter(range(len(items)))
    largest = allowed.rows[-1], allowed.lengths[-1]
    order = [part.shape == largest for part in dealt]
    assert order == sorted(order)
    assert sum(part.slots for part in dealt) >= least_slots(items, shards, allowed.lengths[-1])
    assert used_tokens(items, dealt) <= sum(part.slots for part in dealt)


@settings(max_examples=number_of(60), deadline=None)
@given(
    groups=st.lists(
        st.lists(st.integers(1, 400), min_size=2, max_size=9).map(lambda g: [g[0] // 4, *g[1:]]),
        min_size=1,
        max_size=12,
    ),
    processes=st.integers(1, 64),
    each=st.integers(1, 4),
    micro_rows=st.integers(1, 6),
    row_len=st.integers(500, 2000),
    sequence=st.sampled_from([1, 2, 4]),
    split=st.booleans(),
)
def test_every_example_is_dealt_once_into_rows_that_hold_it(
    groups, processes, each, micro_rows, row_len, sequence, split
):
    row_len += -row_len % sequence
    allowed = shapes(row_len, micro_rows, sequence)
    assert all(length % (32 * sequence) == 0 for length in allowed.lengths[:-1])
    assert allowed.lengths[-1] == row_len and len(allowed.lengths) <= 9
    assert allowed.rows[-1] == micro_rows and allowed.rows[0] == 1
    items = items_of(groups, processes, split)
    dealt = deal(items, processes * each, processes, allowed)
    check(items, dealt, processes * each, processes, allowed)
    assert dealt == deal(items, processes * each, processes, allowed)
    fixed = shapes(row_len, micro_rows, sequence, fixed=True)
    dealt = deal(items, processes * each, processes, fixed)
    check(items, dealt, processes * each, processes, fixed)
    assert {part.shape for part in dealt} == {(micro_rows, row_len)}


def best(sizes, shards, allowed):
    """The fewest slots, by trying all: of rows sorted by length a shard each run at a time."""
    if not sizes:
        return 0

    def ways(rest, rows):
        if not rest:
            yield rows
            return
        for i in range(len(rows)):
            if rows[i] + rest[0] <= allowed.lengths[-1]:
                yield from ways(rest[1:], [*rows[:i], rows[i] + rest[0], *rows[i + 1 :]])
        yield from ways(rest[1:], [*rows, rest[0]])

    return min(
        shards * sum(allowed.length(row) for row in sorted(rows, reverse=True)[::shards])
        for rows in ways(sizes, [])
    )


def test_few_rows_are_packed_nearly_as_well_as_can_be():
    rng, ours, theirs = random.Random(0), 0, 0
    allowed = shapes(1024, 1)
    for _ in range(number_of(150)):
        sizes = [rng.randrange(30, rng.choice((300, 1024))) for _ in range(rng.randrange(1, 8))]
        shards = rng.choice((1, 2, 3))
        items = items_of([(0, size) for size in sizes])
        slots = sum(part.slots for part in deal(items, shards, 1, allowed))
        least = best(sizes, shards, allowed)
        assert least <= slots <= 1.5 * least
        assert least >= least_slots(items, shards, 1024)
        ours, theirs = ours + slots, theirs + least
    assert ours <= 1.05 * theirs


def realistic(rng, groups, samples, median, most):
    """Answers whose lengths vary within a group and more between groups."""
    made = []
    for _ in range(groups):
        typical = median * rng.lognormal(0.0, 0.5)
        sizes = np.minimum(most, typical * rng.lognormal(0.0, 0.5, samples)).astype(int) + 1
        made.append((int(median / 30 * rng.lognormal(0.0, 0.5)) + 1, *sizes.tolist()))
    return made


@pytest.mark.parametrize("processes", [2, 4, 64])
@pytest.mark.parametrize("row_len, micro_rows, median", [(512, 4, 75), (LONG, 1, 5500)])
def test_slots_are_used(processes, row_len, micro_rows, median, report):
    """Where there are four or more rows of tokens a shard."""
    rng, allowed = np.random.default_rng(0), shapes(row_len, micro_rows)
    used = slots = 0
    for _ in range(3):
        answers = 5.5 * processes * row_len / median
        groups = realistic(rng, round(answers / 16), 16, median, row_len - median)
        items = items_of(groups, processes)
        dealt = deal(items, processes, processes, allowed)
        check(items, dealt, processes, processes, allowed)
        used += used_tokens(items, dealt)
        slots += sum(part.slots for part in dealt)
        assert len({part.shape for part in dealt}) <= 4
    report(f"{processes} processes, rows of {row_len}: {used / slots:.3f}")
    assert used >= 0.95 * slots


def test_as_many_row_lengths_are_allowed_as_are_asked_for():
    eighths = (64, 128, 192, 256, 320, 384, 448, 480, 512)
    for number, lengths in ((1, (512,)), (2, (256, 384, 512)), (8, eighths)):
        assert shapes(512, 4, number=number) == ((1, 2, 4), lengths)
    train = TrainConfig(OptimizerConfig(1e-3), row_len=512, micro_rows=2, row_lengths=1)
    assert train.shapes(None) == ((1, 2), (512,))
    items = items_of([(24, 60), (24, 90)])
    (part,) = deal(items, 1, 1, train.shapes(None))
    assert part.shape == (1, 512)


def test_the_full_shape_is_kept_where_little_is_gained():
    allowed = shapes(1024, 2)
    full = deal(items_of([(24, *[250] * 4)] * 8), 2, 1, allowed)
    assert [part.shape for part in full] == [(2, 1024)] * 2
    # A batch of a few short answers is not filled up to `micro_rows` whole rows.
    (short,) = deal(items_of([(24, 60)]), 1, 1, allowed)
    assert short.shape == (1, 128)
    # Five rows where four and a little are needed, but not a quarter of a row more.
    items = items_of([(24, *[200] * 5)] * 4 + [(24, 50)])
    dealt = deal(items, 1, 1, shapes(1024, 1))
    assert sum(part.slots for part in dealt) <= GAIN * (4 * 1024 + 128)


def test_rows_that_run_together_cost_alike_and_stay_where_they_are():
    """Rows of one long answer attend more than rows of many short ones."""
    groups = [(8, 1000), (8, *[110] * 9)] * 8
    items = [item._replace(process=item.group // 2 % 4) for item in items_of(groups)]
    dealt = deal(items, 8, 4, shapes(1024, 1))
    assert len(dealt) == 2
    for part in dealt:
        costs = [sum(items[i].pairs for d in rows[0] for i in d) for rows in part.rows]
        assert max(costs) < 1.2 * min(costs)
    long = [part for part in dealt if len(part.rows[0][0][0]) == 1]
    homes = [items[rows[0][0][0]].process for rows in long[0].rows]
    assert homes == sorted(homes)  # two shards a process


def test_visible_pairs_are_those_of_the_mask():
    model, rng = tiny(), random.Random(0)
    for branches in (1, 2, 3):
        one = example(model, *problem(rng, branches)[:2])
        assert visible_pairs(one.layout) == one.layout.visible().sum()


CONFIG = TrainConfig(OptimizerConfig(1e-3), row_len=512, micro_rows=2)


@pytest.fixture(scope="module")
def groups():
    """Five groups of unequal numbers of examples; the last has no advantage."""
    model, rng, made = tiny(), random.Random(2), []
    for size in (4, 1, 3, 2, 2):
        prompt, group = problem(rng)[0], []
        for _ in range(size):
            one = example(model, prompt, problem(rng, rng.choice((1, 2)))[1])
            old = np.array([-3.6 + 0.2 * rng.random() for _ in range(len(one.layout))])
            advantage = 0.0 if len(made) == 4 else rng.uniform(-2, 2)
            group.append(dataclasses.replace(one, advantage=advantage, old_logp=old))
        made.append(group)
    return made


def step(rows, objective, micro_rows=2):
    config = dataclasses.replace(CONFIG, micro_rows=micro_rows)
    state = new_state(tiny().params, config.optimizer)
    state, metrics = optimize(state, rows, tiny().config, config, objective, 1e-3)
    return state.opt_state[1].mu, metrics


@pytest.mark.parametrize("name", spread(["dapo", "sft", "papo"], test=1))
def test_what_is_dealt_trains_as_what_is_not(groups, name):
    """Loss, gradient and figures, over micro-batches of several shapes."""
    every = name == "sft"
    known = [facts(e, ALL, n) for n, group in enumerate(groups) for e in group]
    own = dict(enumerate(e for group in groups for e in group))
    batch = make_batch(known, own, shapes(320, 1), 1, 3, every)
    assert len({part["tokens"].shape for part in batch.parts}) > 1 and not batch.fused
    moments, metrics = step(batch, Objective(name))
    expected, undealt = step(make_rows(groups, 512, 3), Objective(name))
    norm = np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(expected)))
    far = jax.tree.map(lambda a, b: float(abs(a - b).max()) / norm, moments, expected)
    assert max(jax.tree.leaves(far)) < 1e-6
    for key in ("loss", "grad_norm"):  # 1.4e-6 is what other rows round otherwise in float32
        np.testing.assert_allclose(metrics[key], undealt[key], rtol=2e-6)
    assert metrics["loss_tokens"] == undealt["loss_tokens"]
    if every:
        np.testing.assert_allclose(metrics["entropy"], undealt["entropy"], rtol=2e-6)
        assert batch.left_out == 0
        return
    # Answers without advantage have no gradient; figures are over the others.
    assert batch.left_out == 2
    assert batch.computed == batch.count - sum(int(e.loss_mask.sum()) for e in groups[-1])
    figures = step(make_rows(groups[:-1], 512, 3), Objective(name))[1]
    for key in ("entropy", "logp_gap", "logp_gap_max"):
        np.testing.assert_allclose(metrics[key], figures[key], rtol=2e-6)
    # Where another term gives them one they are computed.
    assert make_batch(known, own, shapes(320, 1), 1, 3, every=True).left_out == 0


def collected(groups, places):
    return rl.Collected(groups, places, {"score": 0.0})


def test_parts_of_a_group_are_one(groups, monkeypatch):
    """Two parts with one place share a prompt, whoever has them."""
    whole = collected(groups[:2], [0, 1])
    parts = collected([groups[0][:1], groups[1], groups[0][1:]], [0, 1, 0])
    (one,), (other,) = (list(rl.minibatches(c, 1, CONFIG, 3)) for c in (whole, parts))
    assert one.figures == other.figures and one.count == other.count
    first, second = list(rl.minibatches(parts, 2, CONFIG, 3))
    assert first.count == sum(int(e.loss_mask.sum()) for e in groups[0])
    assert second.count == sum(int(e.loss_mask.sum()) for e in groups[1])


def test_a_group_without_advantages_is_not_computed(groups):
    (batch,) = rl.minibatches(collected(groups[-1:], [0]), 1, CONFIG, 3)
    assert batch.parts == () and batch.left_out == 2 and batch.computed == 0
    with pytest.raises(ValueError, match="none of the examples"):
        step(batch, Objective("papo"))
    (batch,) = rl.minibatches(collected(groups[-1:], [0]), 1, CONFIG, 3, every=True)
    assert batch.parts and batch.left_out == 0


def test_errors_name_the_row_and_the_prompts(groups):
    config = dataclasses.replace(CONFIG, row_len=64)
    with pytest.raises(ValueError, match=r"an example has \d+ tokens, a row has 64: raise row_len"):
        list(rl.minibatches(collected(groups, range(5)), 1, config, 3))
    with pytest.raises(ValueError, match="have different prompts"):
        list(rl.minibatches(collected(groups[:2], [0, 0]), 1, CONFIG, 3))
    with pytest.raises(ValueError, match="need 3 hidden intervals per token, depth is 2"):
        list(rl.minibatches(collected(groups, range(5)), 1, CONFIG, 2))


def test_a_step_that_is_smaller_than_the_mesh_says_what_helps():
    config = stage_config("zero", "qwen3-4b", ["minibatches=32"])
    assert config.advice(16) == ""
    assert config.advice(64) == (
        "an optimizer step has 16 examples for 64 parts of the batch (mesh.data x mesh.fsdp): 48 "
        "or more of them compute empty rows. Set minibatches to 8 or less, or mesh.sequence or "
        "mesh.tensor 4 times as large and mesh.fsdp as much smaller, which leaves 16 parts"
    )
    # What it names helps.
    assert dataclasses.replace(config, minibatches=8).advice(64) == ""
    assert "prompts to 64 or more and minibatches to 1" in config.advice(1024)
    assert dataclasses.replace(config, prompts=64, minibatches=1).advice(1024) == ""
    assert "fit.batch to 256 or more" in stage_config("beta", "qwen3-4b").advice(256)


@pytest.mark.parametrize("stage", ["zero", "papo"])
def test_a_step_of_the_presets_is_as_large_as_64_chips(stage):
    assert stage_config(stage, "qwen3-4b").advice(64) == ""


def test_exact_mode_has_one_shape():
    config = dataclasses.replace(CONFIG, exact=True)
    assert config.shapes(None) == ((2,), (512,))


UNEVEN = dataclasses.replace(CONFIG, row_len=256, micro_rows=1)
SIZES = 45, 1, 15, 80, 3, 30  # answers of groups
PLACES = [0, 1, 1, 2, 3, 3]  # the second and third are one group, and so are the last two


@functools.cache
def uneven():
    """Groups of plain texts with most of the answers in few of them."""
    rng, prompts = np.random.default_rng(3), {}
    made = []
    for place, size in zip(PLACES, SIZES, strict=True):
        prompt = prompts.setdefault(place, rng.integers(1, 30, 8 + 3 * place))
        made.append([])
        for length in np.minimum(200, 45 * rng.lognormal(0.0, 0.4, size)).astype(int):
            ids = np.concatenate([prompt, rng.integers(1, 30, length)])
            laid = layout(len(ids), prompt_len=len(prompt))
            old = rng.uniform(-3.6, -3.4, len(ids))
            mask, advantage = np.arange(len(ids)) >= len(prompt), rng.uniform(-2, 2)
            made[-1].append(Example(ids, laid, mask, advantage, old))
    return made


def train_uneven(mesh, numbers):
    """A step of which a process has the groups of these numbers, and half a step: their metrics."""
    toy, found = tiny(), []
    params, shardings = toy.params, None
    if mesh is not None:
        params = place_params(params, train_shardings(toy.config, mesh))
        shardings = state_shardings(toy.config, UNEVEN.optimizer, mesh)
    state = new_state(params, UNEVEN.optimizer, shardings)
    given = collected([uneven()[n] for n in numbers], [PLACES[n] for n in numbers])
    (whole,), (half, _) = (list(rl.minibatches(given, n, UNEVEN, 3, mesh)) for n in (1, 2))
    for batch in (whole, half):
        state, metrics = optimize(state, batch, toy.config, UNEVEN, Objective("dapo"), 1e-3, mesh)
        found.append(metrics)
    return found


@pytest.mark.slow
def test_two_processes_with_uneven_groups_train_as_one(report):
    """One has nearly all answers, the other one group and parts of two: slots are used all the
    same, and the figures are those of one process."""
    ours = [json.loads(out.splitlines()[-1]) for out in two_processes.run(__file__)]
    assert ours[0] == ours[1]
    theirs = train_uneven(None, range(len(SIZES)))
    for a, b in zip(ours[0], theirs, strict=True):
        assert a.keys() == b.keys()
        report(f"slot_use {a['slot_use']:.3f} on 8 shards, {b['slot_use']:.3f} on one")
        assert min(a["slot_use"], b["slot_use"]) > 0.9
    assert ours[0][0]["slot_use"] >= 0.95  # it has more than four rows of tokens a shard
    for a, b in zip(ours[0], theirs, strict=True):
        for key in ("loss", "grad_norm", "entropy", "logp_gap", "logp_gap_max", "loss_tokens"):
            np.testing.assert_allclose(a[key], b[key], rtol=1e-5, err_msg=key)


def _process() -> None:
    """What each of two processes does."""
    jax.config.update("jax_default_matmul_precision", "highest")
    distributed.initialize()
    distributed._PIECE = 1 << 14  # so that what is sent goes in several pieces
    process = jax.process_index()
    sent = [np.arange(process * 100_000 + to) for to in range(2)]
    for sender, got in enumerate(distributed.exchange(sent)):
        np.testing.assert_array_equal(got, np.arange(sender * 100_000 + process))
    mesh = make_mesh(MeshConfig(fsdp=-1))
    print(json.dumps(train_uneven(mesh, [[0, 1, 3, 4], [2, 5]][process])))


if __name__ == "__main__":
    sys.exit(_process())
