"""Rollouts in two processes of four replicas: the answers, groups and metrics of one device, and
nobody idle, also where prompts do not divide by processes."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import two_processes
from train_toy import tiny, write_problems

from npr_jax.base.config import load_config
from npr_jax.base.distributed import initialize
from npr_jax.base.mesh import MeshConfig, local_decode_mesh, make_mesh
from npr_jax.data.problems import read_problems
from npr_jax.decode import Engine, EngineConfig, SamplingParams
from npr_jax.model.sharding import place_params, train_shardings
from npr_jax.train import papo, rl, zero
from npr_jax.train.rollout import encode_problems, engine_params, roll_out

CASES = [
    ("zero", 1, 5),
    ("zero", 3, 4),
    ("papo", 3, 4),
    ("zero", 3, 4, "oversample=0.7", "refill=rate"),
]
MESH = MeshConfig(fsdp=-1)
# Ends answers, which an untrained model hardly does.
ENDING = SamplingParams(3.0, n=3, max_tokens=60, parallel=False, stop_token_ids=(30,))


def reward(answer, *_):
    """Of PAPO, whose trees an untrained model does not write: some answers have none."""
    number = int(answer.trajectory.token_ids.sum()) % 5
    return None if number == 4 else float(number % 2)


def engine_on(mesh, lanes=4):
    model = tiny()
    params = model.params
    if mesh is not None:
        params = place_params(params, train_shardings(model.config, mesh))
    params = engine_params(model.config, params, "float32", mesh)
    model = dataclasses.replace(model, params=params)
    return Engine(
        model, EngineConfig(lanes=lanes, pages=32 * lanes, steps=8), local_decode_mesh(mesh)
    )


def collect(engine, problems, stage, prompts, samples, *changes):
    """What a process collects of a batch: metrics, groups by place, and tokens decoded."""
    module = {"zero": zero, "papo": papo}[stage]
    cls = {"zero": zero.ZeroConfig, "papo": papo.PapoConfig}[stage]
    changes = [*changes, f"prompts={prompts}", f"samples={samples}", "max_tokens=20", "seed=1"]
    changes += ["max_refills=1"] if stage == "zero" else ["malformed=penalty"]
    config = load_config(cls, f"tiny_{stage}", changes)
    kept, ids = encode_problems(engine.tokenizer, read_problems(problems), 16)
    feed, before = rl.Feed(kept, ids, 1), engine.stats()["sampled_tokens"]
    found = module.collect_groups(engine, feed, 1, config)
    groups = {
        place: [[e.token_ids.tolist(), e.old_logp.tolist(), float(e.advantage[0])] for e in group]
        for place, group in zip(found.places, found.groups, strict=True)
    }
    return {
        "metrics": dict(found.metrics),
        "groups": groups,
        "shown": [x.trajectory.token_ids.tolist() for x in found.shown.answers.values()],
        "decoded": engine.stats()["sampled_tokens"] - before,
        "position": feed.position,
    }


def collect_all(problems, mesh):
    engine = engine_on(mesh)
    papo.reward_of, before = reward, papo.reward_of
    try:
        found = [collect(engine, problems, *case) for case in CASES]
    finally:
        papo.reward_of = before
    kept, ids = encode_problems(engine.tokenizer, read_problems(problems), 16)
    won = roll_out(engine, ids[:5], [problem.answer for problem in kept[:5]], ENDING, (7,), 2)
    return found, [[*key, answer.trajectory.token_ids.tolist()] for key, answer in won.items()]


@pytest.mark.slow
def test_two_processes_collect_what_one_device_collects(tmp_path):
    problems = tmp_path / "problems.jsonl"
    write_problems(problems, 16)
    outs = two_processes.run(__file__, str(problems))
    (first, won), (second, also) = (json.loads(out.splitlines()[-1]) for out in outs)
    ones, winners = collect_all(problems, None)
    assert won and also and sorted([*won, *also]) == winners and len(winners) == 6
    trained = 0
    for (_, _, _, *options), one, a, b in zip(CASES, ones, first, second, strict=True):
        assert a["metrics"].keys() == b["metrics"].keys() == one["metrics"].keys()
        for name, value in one["metrics"].items():
            assert a["metrics"][name] == b["metrics"][name]
            assert a["metrics"][name] == pytest.approx(value, abs=1e-5), name
        assert a["position"] == b["position"] == one["position"]
        assert a["shown"] == one["shown"][: len(a["shown"])] and a["shown"]
        assert {*a["groups"], *b["groups"]} == {str(place) for place in one["groups"]}
        for place, group in one["groups"].items():
            ours, theirs = (found["groups"].get(str(place), []) for found in (a, b))
            trained += bool(ours) and bool(theirs)
            parts = [*ours, *theirs]
            for (tokens, logp, advantage), found in zip(group, parts, strict=True):
                assert tokens == found[0]
                np.testing.assert_allclose(found[1], logp, atol=1e-4)
                assert advantage == pytest.approx(found[2], abs=1e-5)
        if not options:  # when losers are given up is a matter of who decodes them
            assert a["decoded"] + b["decoded"] == one["decoded"]
        assert 0.3 < a["decoded"] / (a["decoded"] + b["decoded"]) < 0.7
    assert trained >= 2  # groups lie on both


if __name__ == "__main__":
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    initialize()
    print(json.dumps(collect_all(sys.argv[1], make_mesh(MESH))))
