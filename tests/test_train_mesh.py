"""One device, eight host devices in several meshes, and two processes of four: the same training,
with every array where it was declared to be."""

import dataclasses
import functools
import json
import random
import sys

import chex
import jax
import numpy as np
import pytest
import two_processes
from conftest import spread
from jax.sharding import PartitionSpec as P
from train_toy import example, problem, tiny

from npr_jax.base.config import load_config
from npr_jax.base.distributed import gather, initialize, mine
from npr_jax.base.mesh import MeshConfig, batch_shards, decode_mesh, local_decode_mesh, make_mesh
from npr_jax.model import token_logp
from npr_jax.model.sharding import place_params, to_decode, train_shardings
from npr_jax.train import beta
from npr_jax.train.objective import Objective
from npr_jax.train.optimizer import OptimizerConfig, new_state, state_shardings
from npr_jax.train.packing import empty_row, make_rows
from npr_jax.train.step import TrainConfig, optimize

MESHES = {
    "data": MeshConfig(data=-1),
    "fsdp": MeshConfig(fsdp=8),
    "fsdp-tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "sequence": MeshConfig(data=2, sequence=4),
    "slices": MeshConfig(slices=2, fsdp=-1, tensor=2),
    "all-but-data": MeshConfig(fsdp=-1, sequence=2, tensor=2),
}
CONFIG = TrainConfig(OptimizerConfig(1e-3, weight_decay=0.1), row_len=256, micro_rows=1)
STEPS, DEPTH = 10, 3


def model():
    """The tiny model, in blocks so small that a row has several."""
    made = tiny()
    return dataclasses.replace(
        made, config=dataclasses.replace(made.config, attention_block=32, logp_chunk=64)
    )


@functools.cache
def batches():
    """Groups of ten steps, of several sizes; some steps have fewer rows than there are devices."""
    rng, made, toy = random.Random(1), [], model()
    for step in range(STEPS):
        groups = []
        for _ in range(2 + step % 3):
            prompt = problem(rng)[0]
            group = []
            for _ in range(4):
                one = example(toy, prompt, problem(rng, rng.choice((1, 2)))[1])
                old = np.array([-3.6 + 0.2 * rng.random() for _ in range(len(one.layout))])
                group.append(dataclasses.replace(one, advantage=rng.uniform(-2, 2), old_logp=old))
            groups.append(group)
        made.append(groups)
    return made


def new_state_on(mesh):
    toy, params, shardings = model(), model().params, None
    if mesh is not None:
        params = place_params(params, train_shardings(toy.config, mesh))
        shardings = state_shardings(toy.config, CONFIG.optimizer, mesh)
    return new_state(params, CONFIG.optimizer, shardings)


def train(objective: str, mesh):
    """Ten steps, each process with its share of the groups: the losses, and the last state."""
    toy, state, losses = model(), new_state_on(mesh), []
    for groups in batches():
        rows = make_rows(mine(groups), CONFIG.row_len, DEPTH) or [empty_row(CONFIG.row_len, DEPTH)]
        state, metrics = optimize(state, rows, toy.config, CONFIG, Objective(objective), 1e-3, mesh)
        figures = ("loss", "grad_norm", "entropy", "logp_gap_max")
        losses.append([metrics[name] for name in figures if name in metrics])
    return np.array(losses), state


@functools.cache
def one_device(objective: str):
    return train(objective, None)[0]


CASES = [
    ("all-but-data", "papo"),
    ("data", "papo"),
    ("fsdp", "sft"),
    ("fsdp-tensor", "papo"),
    ("sequence", "sft"),
    ("slices", "papo"),
    ("all-but-data", "sft"),
]


@pytest.mark.parametrize("case", spread(CASES, test=2), ids="-".join)
def test_a_mesh_trains_as_one_device(case):
    name, objective = case
    mesh = make_mesh(MESHES[name])
    losses, state = train(objective, mesh)
    np.testing.assert_allclose(losses, one_device(objective), rtol=1e-4, atol=1e-4)
    declared = state_shardings(model().config, CONFIG.optimizer, mesh)
    assert jax.tree.map(lambda x: x.sharding, state) == declared
    wq = state.opt_state[1].mu["layers"]["wq"]  # [layers, embed, heads]
    parts = 1, mesh.shape["fsdp"], mesh.shape["tensor"]
    assert {s.data.shape for s in wq.addressable_shards} == {
        tuple(size // part for size, part in zip(wq.shape, parts, strict=True))
    }


@pytest.mark.slow
def test_bfloat16_on_a_mesh_and_a_step_that_is_not_finite():
    toy, mesh = model(), make_mesh(MESHES["all-but-data"])
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    good = make_rows(batches()[0], CONFIG.row_len, DEPTH)
    bad = [row | {"advantages": np.full_like(row["advantages"], np.nan)} for row in good]

    def train(mesh, config, *steps):
        state, found = new_state_on(mesh), []
        for rows in steps:
            state, metrics = optimize(state, rows, toy.config, config, Objective("papo"), 0.1, mesh)
            found.append(metrics)
        return state, found

    _, (exact, _) = train(None, CONFIG, good, good)
    once, _ = train(mesh, config, good, good)
    state, (first, skipped, second) = train(mesh, config, good, bad, good)
    assert [m["nonfinite"] for m in (first, skipped, second)] == [0, 1, 0]
    np.testing.assert_allclose(first["grad_norm"], exact["grad_norm"], rtol=0.05)
    chex.assert_trees_all_equal(state, once)


@pytest.mark.nightly
def test_two_processes_train_as_one_device(tmp_path):
    found = [json.loads(out.splitlines()[-1]) for out in two_processes.run(__file__)]
    for objective in ("sft", "papo"):
        first, second = (np.array(losses[objective]) for losses in found)
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(first, one_device(objective), rtol=1e-4, atol=1e-4)
    # Each laid out its own share of the data, and decodes on its own devices.
    assert sorted(found[0]["shares"] + found[1]["shares"]) == list(range(STEPS * 3))
    assert found[0]["devices"] == [[0, 0], [0, 0]] and found[1]["devices"] == [[1, 1], [1, 1]]
    np.testing.assert_allclose(found[0]["logp"], found[1]["logp"], rtol=1e-5)


def test_parameters_reach_the_engine_without_the_host():
    mesh, toy = make_mesh(MeshConfig(fsdp=4, tensor=2)), model()
    params = place_params(toy.params, train_shardings(toy.config, mesh))
    local = local_decode_mesh(mesh)
    with jax.transfer_guard("disallow"):
        there = to_decode(toy.config, params, "float32", decode_mesh(mesh), local)
    assert local.shape == {"data": 4, "tensor": 2}
    assert there["layers"]["wq"].sharding.spec == P(None, None, "tensor")
    jax.tree.map(np.testing.assert_array_equal, there, toy.params)


def test_parameters_are_born_in_parts():
    """No device ever holds a whole matrix, neither of random nor of read parameters."""
    import npr_jax

    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    whole = npr_jax.load("tiny")
    made = npr_jax.load("tiny", mesh=mesh)
    chex.assert_trees_all_close(made.params, whole.params, rtol=1e-6)
    shardings = train_shardings(whole.config, mesh)
    assert jax.tree.map(lambda x: x.sharding, made.params) == shardings


@pytest.mark.parametrize(
    "sizes, error",
    [
        (
            {"data": 3, "fsdp": 3},
            "data=3,fsdp=3,sequence=1,tensor=1, which is 9 devices; there are 8",
        ),
        ({"data": 3, "fsdp": -1}, "8 devices do not divide by 3"),
        ({"data": -1, "fsdp": -1}, "-1 for one axis at most"),
        ({"tensor": 0}, "tensor is 0, needed is an integer, 1 or more, or -1"),
    ],
)
def test_meshes_that_cannot_be_are_refused(sizes, error):
    with pytest.raises(ValueError, match=error):
        make_mesh(MeshConfig(**sizes))


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"kv_heads=2 does not divide by tensor=4"):
        train_shardings(model().config, make_mesh(MeshConfig(tensor=4)))
    with pytest.raises(ValueError, match=r"row_len is 250.*mesh.sequence=4"):
        TrainConfig(OptimizerConfig(1e-3), row_len=250).check(make_mesh(MeshConfig(sequence=4)))


def test_beta_refuses_rows_before_it_samples(tmp_path, monkeypatch):
    changes = "fit.train.row_len=254", "mesh.sequence=4", "mesh.data=2"
    config = load_config(beta.BetaConfig, "tiny_beta", changes)
    monkeypatch.setattr(beta.loop, "run", lambda *_: pytest.fail("it has sampled"))
    with pytest.raises(ValueError, match=r"fit\.train\.row_len is 254, .* mesh\.sequence=4"):
        beta._train(config, tmp_path, None)


def test_one_device_needs_no_mesh():
    assert make_mesh(MeshConfig()) is None
    assert batch_shards(None) == 1 and local_decode_mesh(None) is None


def _process() -> None:
    """What each of two processes does."""
    jax.config.update("jax_default_matmul_precision", "highest")
    initialize()
    found: dict = {}
    for objective, config in (("sft", MeshConfig(fsdp=-1)), ("papo", MeshConfig(2, 2, 2))):
        mesh = make_mesh(config)
        losses, state = train(objective, mesh)
        found[objective] = losses.tolist()
    found["shares"] = list(mine(range(STEPS * 3)))
    local = local_decode_mesh(mesh)
    found["devices"] = [[device.process_index for device in row] for row in local.devices]
    toy = model()
    params = to_decode(toy.config, state.params, "float32", decode_mesh(mesh), local)
    (row,) = make_rows(batches()[0][:1], 256, DEPTH)
    names = ("tokens", "positions", "hidden", "pred")
    logp = jax.jit(functools.partial(token_logp, toy.config))(
        params, *(row[name][None] for name in names)
    )
    found["logp"] = np.asarray(logp)[row["loss_mask"][None]].tolist()
    assert gather(jax.process_index()) == [0, 1]
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(_process())
