"""The three stages from end to end on a model that can nearly do the task: what they train on is
what they say, and a run that was cut off ends as if nothing had happened."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from conftest import spread
from train_toy import encode, write_problems

import npr_jax
from npr_jax.answers import equal, extract
from npr_jax.base.config import load_config
from npr_jax.decode import Engine, SamplingParams
from npr_jax.evaluate.judge import Answer
from npr_jax.evaluate.traces import read_traces
from npr_jax.model.pretrained import load
from npr_jax.report import html
from npr_jax.runs import loop
from npr_jax.runs.metrics import is_measured, read_metrics
from npr_jax.train import beta, evaluation, papo, policy, zero
from npr_jax.train.export import export
from npr_jax.train.records import read_records
from npr_jax.tree import parse
from npr_jax.tree.format import check_format

pytestmark = pytest.mark.slow

COMMON = [
    "seed=3",
    "engine.lanes=16",
    "engine.pages=256",
    "train.row_len=256",
    "train.checkpoint_every=1",
    "max_prompt_tokens=16",
    "max_tokens=64",
    "prompts=4",
    "samples=4",
]


class Cut(Exception):
    """Stands for the end of the machine."""


def config(home, stage, output, *changes):
    cls = {"zero": zero.ZeroConfig, "papo": papo.PapoConfig}[stage]
    start = {"zero": "seed", "papo": "tree"}[stage]
    paths = {"model": home / start, "problems": home / "problems.jsonl", "output": output}
    paths = [f"{key}={json.dumps(str(value))}" for key, value in paths.items()]
    return load_config(cls, f"tiny_{stage}", [*COMMON, *paths, *changes])


def cut_after(step):
    def report(metrics):
        if metrics["step"] == step:
            raise Cut

    return report


def weights(path):
    return (path / "model.safetensors").read_bytes()


def without_times(directory):
    return [
        {k: v for k, v in line.items() if not is_measured(k)} for line in read_metrics(directory)
    ]


LORA = ("train.lora.rank=4", "train.optimizer.learning_rate=0.01")
CASES = [
    ("papo",),
    ("zero", *LORA),
    ("zero",),
    ("papo", "kl=0.1", "train.compute_dtype=bfloat16", *LORA),
    ("zero", "oversample=0.5", "refill=rate"),
    ("papo", "kl=0.1", "train.optimizer.name=lion", "train.optimizer.moments=bfloat16"),
]


@pytest.mark.parametrize("case", spread(CASES, test=2), ids=" ".join)
def test_a_cut_off_run_ends_as_if_nothing_had_happened(home, tmp_path, monkeypatch, case):
    stage, *changes = case
    run = {"zero": zero.run, "papo": papo.run}[stage]
    changes = (*changes, "steps=3")
    whole = run(config(home, stage, tmp_path / "whole", *changes))
    start = load({"zero": home / "seed", "papo": home / "tree"}[stage])
    assert not np.array_equal(load(whole).params["layers"]["wq"], start.params["layers"]["wq"])
    # The checkpoint of a step follows its metrics: the second step is done again.
    with pytest.raises(Cut):
        run(config(home, stage, tmp_path / "cut", *changes), cut_after(2))
    module, sampled = {"zero": zero, "papo": papo}[stage], []
    collect = module.collect_groups

    def collect_and_tell(engine, feed, step, settings):
        sampled.append(step)
        return collect(engine, feed, step, settings)

    monkeypatch.setattr(module, "collect_groups", collect_and_tell)
    with pytest.raises(Cut):
        run(config(home, stage, tmp_path / "cut", *changes), cut_after(3))
    assert sampled == [3]  # what was sampled for the second step is not sampled again
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "rollouts")
    resumed = run(config(home, stage, tmp_path / "cut", *changes))
    assert sampled == [3, 3]  # without it, it is sampled as before
    assert weights(resumed) == weights(whole)
    lines = without_times(tmp_path / "whole")
    assert without_times(tmp_path / "cut") == lines
    # The answers that are kept to look at, and the report on them.
    kept = sorted((tmp_path / "whole" / "traces").iterdir())
    assert [path.name for path in kept] == [f"step-00000{i}.jsonl" for i in (1, 2, 3)]
    for path in kept:
        assert path.read_bytes() == (tmp_path / "cut" / "traces" / path.name).read_bytes()
        traces = list(read_traces(path))
        assert len(traces) == 4 and len({trace.problem for trace in traces}) == 1
        for trace in traces:
            found = trace.prediction is not None and equal(trace.prediction, trace.reference)
            assert trace.correct == found
    page = html.write(tmp_path / "cut").read_text(encoding="utf-8")
    assert "12 answers." in page and "entropy" in page and "checkpoint_every" in page
    assert [line["step"] for line in lines] == [1, 2, 3]
    # The trainer sees what the engine saw.
    most = 0.3 if "train.compute_dtype=bfloat16" in changes else 1e-4
    assert max(line["logp_gap_max"] for line in lines if not line["skipped"]) < most
    assert run(config(home, stage, tmp_path / "cut", *changes)) == resumed
    assert sampled == [3, 3]  # it is done
    with pytest.raises(ValueError, match="samples was 4, is 5"):
        run(config(home, stage, tmp_path / "cut", *changes, "samples=5"))


def held_out(home, path, num=4):
    """Problems of the same kind that the stages do not train on."""
    known = (home / "problems.jsonl").read_text().splitlines()
    write_problems(path, 200, seed=9, groups=2)
    lines = [line for line in path.read_text().splitlines() if line not in known]
    path.write_text("\n".join(lines[:num]) + "\n")
    return f"evaluate={{every: 1, problems: {json.dumps(str(path))}, samples: 2}}"


@pytest.mark.parametrize("stage", spread(["papo", "zero"], test=1))
def test_evaluation_changes_no_number_of_training_and_resumes(home, tmp_path, stage):
    """A run with it, one that was cut off, and one without; the seconds of every step add up."""
    run = {"zero": zero.run, "papo": papo.run}[stage]
    on = held_out(home, tmp_path / "held.jsonl")
    plain = run(config(home, stage, tmp_path / "plain", "steps=3"))
    whole = run(config(home, stage, tmp_path / "whole", "steps=3", on, "train.keep_best=1"))
    assert weights(whole) == weights(plain)
    lines, without = without_times(tmp_path / "whole"), without_times(tmp_path / "plain")
    trained = [{k: v for k, v in x.items() if not k.startswith("eval/")} for x in lines]
    assert trained == without
    assert all(0 <= x["eval/score"] <= x["eval/accuracy"] <= 1 for x in lines)
    assert len({line["eval/baseline"] for line in lines}) == 1 and lines[0]["eval/baseline"] > 0
    for line in read_metrics(tmp_path / "whole"):
        named = sum(value for key, value in line.items() if key.startswith("seconds/"))
        assert 0.98 * line["seconds"] <= named <= line["seconds"] * (1 + 1e-9)
        assert 0 < line["engine/occupancy"] <= 1 and line["memory/bytes"] > 0
        assert line["rollout_age"] == 0 and (line["train_flops"] > 0) == ("mfu" in line)
    for step in (1, 3):
        with pytest.raises(Cut):
            run(config(home, stage, tmp_path / "cut", "steps=3", on), cut_after(step))
    assert weights(run(config(home, stage, tmp_path / "cut", "steps=3", on))) == weights(whole)
    assert without_times(tmp_path / "cut") == lines
    with pytest.raises(ValueError, match=r"evaluate\.samples was 2, is 3"):
        run(config(home, stage, tmp_path / "cut", "steps=3", on, "evaluate.samples=3"))
    # Some answers cannot be better than all: the best of these is exported, if one is.
    best = lines[-1]["eval/best_step"]
    if best:
        assert export(tmp_path / "whole", tmp_path / "best", best=True) == best
    else:
        with pytest.raises(ValueError, match="no best checkpoint"):
            export(tmp_path / "whole", tmp_path / "best", best=True)


def test_a_run_ends_by_patience_and_stays_so(home, tmp_path, monkeypatch):
    """With scores that are given; a kill after the end was saved changes nothing."""
    scores = iter([0.1, 0.3, 0.2, 0.2, 9, 9, 9])
    monkeypatch.setattr(evaluation.Evaluation, "_measure", lambda *_: {"eval/score": next(scores)})
    changes = "steps=9", held_out(home, tmp_path / "held.jsonl"), "evaluate.patience=2"
    settings = config(
        home, "zero", tmp_path / "run", *changes, "train.keep_best=1", "minibatches=1"
    )
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(policy, "publish_model", lambda *_: cut_after(0)({"step": 0}))
        zero.run(settings)
    final = zero.run(settings)
    lines = read_metrics(tmp_path / "run")
    assert [line["eval/score"] for line in lines] == [0.3, 0.2, 0.2]
    assert [line["eval/since_best"] for line in lines] == [0, 1, 2]
    assert export(tmp_path / "run", tmp_path / "best", best=True) == 1
    with pytest.raises(ValueError, match="--best and --step 1 are given"):
        export(tmp_path / "run", tmp_path / "other", 1, best=True)
    assert weights(tmp_path / "best") != weights(final)
    page = html.write(tmp_path / "run").read_text(encoding="utf-8")
    assert "Alarms" in page and "evaluation" in page and "seconds on the critical path" in page
    # Another run that goes on from there measures its own baseline, and has all patience.
    start = f"start={tmp_path / 'run'}@3"
    zero.run(config(home, "zero", tmp_path / "new", *changes, start, "minibatches=1", "steps=4"))
    (line,) = read_metrics(tmp_path / "new")
    assert (line["eval/baseline"], line["eval/best_step"], line["eval/since_best"]) == (9, 3, 1)


def test_a_run_that_failed_at_once_does_not_keep_its_directory(home, tmp_path):
    with pytest.raises(FileNotFoundError, match="no/such/model"):
        zero.run(config(home, "zero", tmp_path, "steps=1", "model=no/such/model"))
    zero.run(config(home, "zero", tmp_path, "steps=1"))


def test_zero_drops_groups_that_say_nothing(home, tmp_path):
    lines = []
    settings = config(home, "zero", tmp_path, "steps=1", "minibatches=2", "max_refills=2")
    zero.run(settings, lines.append)
    (line,) = lines
    assert 1 <= line["rounds"] <= 3
    assert line["groups"] <= 4
    assert line["off_policy_steps"] == 1
    assert line["parallel_rate"] == 0
    watched = (
        "logp_gap logp_gap_max entropy grad_norm groups_dropped truncated width depth "
        "critical_path reward/format reward/accuracy reward/overlong rollout_tokens_per_s "
        "train_tokens_per_s rollout_time_share"
    )
    assert set(watched.split()) <= line.keys()
    assert any(key.startswith("broken/") for key in line) == (line["format_rate"] < 1)


def test_papo_can_penalise_what_is_no_tree(home, tmp_path):
    """The untrained model again: with a penalty below the reward of a wrong answer."""
    model = load(home / "tree")
    engine = Engine(model, config(home, "papo", tmp_path).engine)
    prompt = encode(model, "A:1+2;B:3+4?", "")[0][:-1]
    whole = engine.generate([prompt], SamplingParams(n=16, max_tokens=64))
    whole = next(t for t in whole if papo.is_whole(t, model.tags, 1))
    (cut,) = engine.generate([prompt], SamplingParams(max_tokens=20))
    aborted = dataclasses.replace(cut, finish_reason="aborted")
    for malformed, rewards in (("filter", [None, None]), ("penalty", [-2.0, None])):
        settings = config(home, "papo", tmp_path, f"malformed={malformed}")
        found = [
            papo.reward_of(Answer(trajectory, [], None, True), model.tags, settings, 1)
            for trajectory in (cut, aborted)
        ]
        assert found == rewards
        for correct, reward in ((True, 1.0), (False, -1.0)):
            judged = Answer(whole, [], None, correct)
            assert papo.reward_of(judged, model.tags, settings, 1) == reward
    with pytest.raises(ValueError, match="malformed is 'drop'"):
        config(home, "papo", tmp_path, "malformed=drop")


def test_papo_trains_on_whole_trees_only_and_once(home, tmp_path):
    settings = config(home, "papo", tmp_path, "steps=1", "model=tiny", "malformed=filter")
    lines = []
    final = papo.run(settings, lines.append)
    (line,) = lines
    # An untrained model writes no tree: there is nothing to learn, and nothing changes.
    assert line["filtered"] == 16 and line["skipped"] == 1
    before = load("tiny", seed=3).with_tags().params
    after = load(final).params
    size = len(load(final).tokenizer)
    assert np.array_equal(after["embed"][:size], before["embed"][:size])
    model = load(home / "tree")
    engine = Engine(model, settings.engine)
    prompt = encode(model, "A:1+2;B:3+4?", "")[0][:-1]
    found = engine.generate([prompt], SamplingParams(n=16, max_tokens=64))
    cut = engine.generate([prompt], SamplingParams(n=4, max_tokens=20))
    for trajectory in found:
        try:
            parse(trajectory.token_ids, trajectory.prompt_len, model.tags, max_depth=1)
            tree = True
        except npr_jax.tree.TraceError:
            tree = False
        whole = papo.is_whole(trajectory, model.tags, 1)
        assert whole == (trajectory.finish_reason == "stop" and tree)
    assert any(papo.is_whole(t, model.tags, 1) for t in found)
    assert not any(papo.is_whole(t, model.tags, 1) for t in cut)


@pytest.mark.parametrize(
    "case",
    spread(
        [
            (["schedule=alternating"], [], 8),
            (["acceleration=1", "acceleration_until=9"], ["acceleration=1"], 1),
        ],
        test=1,
    ),
    ids=["alternating", "annealed"],
)
def test_the_step_is_the_only_clock_of_a_reward(home, tmp_path, case):
    """A run that was cut off in the ninth step pays in it what it would have paid."""
    clock, without, equal_steps = case

    def run(name, changes, end=None):
        changes = (*changes, "steps=10", "prompts=2", "train.checkpoint_every=4")
        papo.run(config(home, "papo", tmp_path / name, *changes), end)
        return without_times(tmp_path / name)

    whole, other = run("whole", clock), run("other", without)
    assert whole[:equal_steps] == other[:equal_steps]
    assert whole[equal_steps]["score"] != other[equal_steps]["score"]
    with pytest.raises(Cut):
        run("cut", clock, cut_after(9))
    assert run("cut", clock) == whole
    assert weights(tmp_path / "cut/final") == weights(tmp_path / "whole/final")


def test_beta_accepts_what_is_right_and_trains_it_as_trees(home, tmp_path, monkeypatch):
    def settings(output, *changes):
        paths = {
            "model": home / "seed",
            "sampler_model": home / "seed",
            "problems": home / "problems.jsonl",
            "output": tmp_path / output,
        }
        return load_config(
            beta.BetaConfig,
            "tiny_beta",
            [
                *(f"{key}={json.dumps(str(value))}" for key, value in paths.items()),
                *(c for c in COMMON if c.split(".")[0] in ("seed=3", "engine")),
                "sample.num_problems=24",
                "sample.batch=4",
                "sample.tries=6",
                "sample.keep=2",
                "sample.max_tokens=64",
                "fit.steps=3",
                "fit.batch=4",
                "fit.train.row_len=256",
                "fit.train.checkpoint_every=1",
                "fit.train.keep_checkpoints=3",
                *changes,
            ],
        )

    whole = beta.run(settings("whole"))
    path = tmp_path / "whole" / "accepted.jsonl"
    records, model = read_records(path), load(home / "seed")
    assert len(records) == 24
    assert len({record["problem"] for record in records}) == 24
    for record in records:
        assert len(record["accepted"]) <= 2 and record["tries"] <= 6
        assert len(record["accepted"]) == 2 or record["tries"] == 6
        for ids, text in zip(record["accepted"], record["texts"], strict=True):
            assert equal(extract(text), record["answer"])
            assert not check_format(ids, record["prompt_len"], model.tags)
    made = beta.make_examples(records, model.tags)
    assert len(made) == sum(len(record["accepted"]) for record in records) > 4
    for example in made:
        assert example.layout.width == 2
        assert not (example.loss_mask & example.layout.forced).any()
        assert (
            example.loss_mask.sum() == (~example.layout.forced[example.layout.prompt_len :]).sum()
        )

    # Cut off before metrics are written, while a line is, while training: the result is the same.
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(loop.RunLog, "write", lambda log, metrics: cut_after(1)(metrics))
        beta.run(settings("cut"))
    with pytest.raises(Cut):
        beta.run(settings("cut"), cut_after(2))
    cut = tmp_path / "cut" / "accepted.jsonl"
    cut.write_text(cut.read_text()[:-20])
    with pytest.raises(Cut):
        beta.run(settings("cut"), lambda m: cut_after(2)(m) if "loss" in m else None)
    assert cut.read_bytes() == path.read_bytes()
    assert weights(beta.run(settings("cut"))) == weights(whole)
    for part in ("sampling", "fit"):
        assert without_times(tmp_path / "cut" / part) == without_times(tmp_path / "whole" / part)

    # From a step of that run: its answers, of which none is drawn again, and its state.
    def draw(*_):
        pytest.fail("answers are drawn again")

    monkeypatch.setattr(beta, "_sample_batch", draw)
    start = f"start={tmp_path / 'whole'}@2"
    assert weights(beta.run(settings("new", start))) == weights(whole)
    (tmp_path / "whole").rename(tmp_path / "gone")
    fitted = without_times(tmp_path / "gone" / "fit")
    assert without_times(tmp_path / "new" / "fit") == fitted[2:]
    assert (tmp_path / "new" / "accepted.jsonl").read_bytes() == cut.read_bytes()
    beta.run(settings("new", start, "fit.steps=5"))  # it has a state of its own by now
    start = f"start={tmp_path / 'gone'}@2"
    changed = beta.run(settings("changed", start, "fit.train.optimizer.learning_rate=0.1"))
    assert weights(changed) != weights(tmp_path / "new" / "final-steps-3")
    (tmp_path / "less.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    for number, (change, message) in enumerate(
        {
            "fit.train.row_len=64": r"beta: .* tokens, fit\.train\.row_len is 64, needed is \d+ or",
            "sample.tries=5": r"sample\.tries is 5, needed is that of .*gone, 6: its accepted",
            f"start={tmp_path / 'gone'}@7": "no checkpoint of step 7, there are 1, 2, 3",
            f"problems={tmp_path / 'less.jsonl'}": "problems is .*, needed is that with which .*",
            "model=tiny": "model is .*, needed is that with which .*gone began",
            "fit.train.lora={rank: 2, alpha: 4, targets: [q_proj]}": r"fit\.train\.lora is .*, nee",
        }.items()
    ):
        with pytest.raises(ValueError, match=message):
            beta.run(settings(f"wrong{number}", start, change))
    answers = tmp_path / "gone" / "accepted.jsonl"
    answers.write_bytes(answers.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"accepted.jsonl is damaged, for it ends within a line"):
        beta.run(settings("damaged", start))
    answers.unlink()
    with pytest.raises(ValueError, match=r"there is no .*accepted.jsonl with its accepted answers"):
        beta.run(settings("none", start))


def test_beta_says_when_nothing_is_accepted(home, tmp_path):
    with pytest.raises(ValueError, match=r"none of 4 problems got an accepted answer"):
        beta.run(
            load_config(
                beta.BetaConfig,
                "tiny_beta",
                [
                    "model=tiny",
                    "sampler_model=tiny",
                    f"problems={json.dumps(str(home / 'problems.jsonl'))}",
                    f"output={json.dumps(str(tmp_path))}",
                    "sample.num_problems=4",
                    "sample.tries=1",
                    "sample.max_tokens=16",
                    "engine.lanes=4",
                ],
            )
        )
