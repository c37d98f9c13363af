"""The recipe study: which runs its arms share, and that every arm is a valid recipe."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from npr_jax.base.config import load_config
from npr_jax.demo.sums import draw, ideal
from npr_jax.train.papo import ADVANTAGES, PapoConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import recipe

    return recipe


def test_an_arm_shares_the_stages_before_its_first_change(recipe):
    home = Path("runs")
    base = recipe.directories(home, recipe.ARMS["base"], "base")
    for name, own in (
        ("no_format_reward", ("zero", "beta", "papo")),
        ("causal_sft", ("beta", "papo")),
        ("group_std", ("papo",)),
    ):
        places = recipe.directories(home, recipe.ARMS[name], name)
        for stage, place in places.items():
            assert place == (home / name / stage if stage in own else base[stage])


def test_every_arm_is_a_config_that_its_stages_take(recipe):
    for name, arm in recipe.ARMS.items():
        for stage, cls in recipe.STAGES.items():
            changed = load_config(cls, f"tiny_{stage}", getattr(arm, stage))
            same = changed == load_config(cls, f"tiny_{stage}")
            assert same == (not getattr(arm, stage)), (name, stage)


def test_figures_take_shared_stages_from_the_base(recipe, tmp_path, monkeypatch):
    rows = {stage: {"both": number / 4} for number, stage in enumerate(recipe.STAGES)}
    for seed, shift in ((0, 0.0), (1, 0.25)):
        arms = {
            "base": {"rows": {s: {"both": r["both"] + shift} for s, r in rows.items()}},
            "clip": {"rows": {"papo": {"both": 1.0 - shift}}},
        }
        (tmp_path / f"{seed}.json").write_text(json.dumps({"arms": arms}))
    monkeypatch.setattr(recipe, "RESULTS", tmp_path)
    found = recipe.figures()
    assert found["clip"]["papo"]["both"] == {"0": 1.0, "1": 0.75}
    assert found["clip"]["beta"] == found["base"]["beta"] == {"both": {"0": 0.25, "1": 0.5}}
    assert recipe.differences(found, "clip") == [0.5, 0.0]
    assert recipe.spread([0.25, 0.5]) == "0.38 ± 0.18"


def test_stages_are_trained_once_and_what_is_measured_is_kept(recipe, tmp_path, monkeypatch):
    trained, measured = [], []

    def train(config):
        final = Path(config.output) / "final"
        if not final.exists():
            assert Path(config.model).exists(), "its model is trained before"
            trained.append((final.parent.parent.name, final.parent.name))
            final.mkdir(parents=True)

    def make_seed(task, seed, home, held_out):
        (home / "seed" / "final").mkdir(parents=True)
        (home / "seed" / "final" / "config.json").touch()

    def measure(model, mode, problems, config, seed):
        measured.append(mode)
        return {"both": 0.5, "seconds": 1.23456}, []

    for name, fake in (
        ("RESULTS", tmp_path / "results"),
        ("RUN", dict.fromkeys(recipe.STAGES, train)),
        ("use_cache", lambda path: None),
        ("make_problems", lambda task, seed, home: []),
        ("make_seed", make_seed),
        ("measure", measure),
        ("load", lambda path: path),
    ):
        monkeypatch.setattr(recipe, name, fake)
    command = ["recipe.py", "run", "--runs", str(tmp_path / "runs"), "--seeds", "3", "--arms"]
    monkeypatch.setattr("sys.argv", [*command, "base", "causal_sft", "clip"])
    recipe.main()
    stages = ("zero", "beta", "papo")
    assert trained[:3] == [("base", stage) for stage in stages]
    assert trained[3:] == [("causal_sft", "beta"), ("causal_sft", "papo"), ("clip", "papo")]
    assert measured == ["sequential", "parallel", "parallel"] + ["parallel"] * 3
    kept = json.loads((tmp_path / "results" / "3.json").read_text())["arms"]
    assert kept["clip"]["rows"] == {"papo": {"both": 0.5, "seconds": 1.2346}}
    recipe.main()  # all is there
    assert len(trained) == len(measured) == 6


@pytest.fixture
def acceleration(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import acceleration

    return acceleration


def test_half_of_the_longer_answers_are_in_two_blocks(acceleration):
    rng = np.random.default_rng(0)
    tasks = acceleration.two_blocks(draw(400, rng), rng)
    longer = [task for task in tasks if len(task.groups) > 2]
    blocks = [ideal(task).count("<guideline>") for task in longer]
    assert set(blocks) == {1, 2} and 0.4 < blocks.count(2) / len(longer) < 0.6
    assert all(ideal(task).count("<guideline>") == 1 for task in tasks if len(task.groups) == 2)


def test_the_acceleration_table_compares_seed_by_seed(acceleration, tmp_path, monkeypatch):
    def row(right, path):
        return {"both": right, "tokens": 80.0, "critical_path": path}

    found = {
        "0": {"start": row(0.9, 60), "off": row(0.9, 60.0), "on": row(0.91, 54.0)},
        "1": {"start": row(0.9, 60), "off": row(0.8, 50.0), "on": row(0.78, 40.0)},
    }
    results, docs = tmp_path / "acceleration.json", tmp_path / "recipe.md"
    results.write_text(json.dumps(found))
    docs.write_text(f"before\n{acceleration.BEGIN}\n{acceleration.END}\nafter\n")
    monkeypatch.setattr(acceleration, "RESULTS", results)
    monkeypatch.setattr(acceleration, "DOCS", docs)
    acceleration.table(None)
    text = docs.read_text()
    assert "15.0% shorter" in text and "(mean of 2 seeds)" in text and "-0.5 points" in text
    assert "| PAPO with the acceleration reward | 0.845 ± 0.092 | 80.0 ± 0.0 | 47.0 ± 9.9 |" in text
    assert text.startswith("before\n") and text.endswith("after\n")


def test_the_advantages_are_compared_seed_by_seed(acceleration, tmp_path, monkeypatch):
    def row(right, path):
        return {"both": right, "tokens": 80.0, "critical_path": path}

    found = {
        str(seed): {
            "start": row(0.9, 60),
            "batch_std": row(0.9 + seed / 10, 50.0 + seed),
            "mean": row(0.9 + seed / 10, 51.0 + seed),
            "group_std": row(0.85 + seed / 10, 52.0 + 3 * seed),
        }
        for seed in (0, 1)
    }
    docs, results = tmp_path / "recipe.md", tmp_path / "advantages.json"
    begin, end = acceleration.BEGIN_ADVANTAGES, acceleration.END_ADVANTAGES
    docs.write_text(f"before\n{begin}\n{end}\nafter\n")
    monkeypatch.setattr(acceleration, "DOCS", docs)
    monkeypatch.setattr(acceleration, "ADVANTAGES", results)
    acceleration.advantages_table(None)
    assert docs.read_text() == f"before\n{begin}\n{end}\nafter\n"  # it was not made yet
    results.write_text(json.dumps(found))
    acceleration.advantages_table(None)
    text = docs.read_text()
    assert "| before PAPO | 0.900 ± 0.000 | 80.0 ± 0.0 | 60.0 ± 0.0 |  |  |" in text
    assert "| 0.950 ± 0.071 | 80.0 ± 0.0 | 51.5 ± 0.7 | +0.000 ± 0.000 | +1.0 ± 0.0 |" in text
    assert "| 0.900 ± 0.071 | 80.0 ± 0.0 | 53.5 ± 2.1 | -0.050 ± 0.000 | +3.0 ± 1.4 |" in text


def test_all_arms_of_a_seed_go_on_from_one_model(acceleration, tmp_path, monkeypatch):
    """The recipe's stages up to Beta are made once, and the model with two blocks on top of it."""
    done, made = [], []

    def stage(config):
        done.append(Path(config.output).name)
        (Path(config.output) / "final").mkdir(parents=True)

    def begin(seed, home):
        home.mkdir(parents=True)
        (home / "problems.jsonl").write_text('{"problem": "A:1+2;B:3+4?", "answer": "0"}\n')

    def make_start(home, beta, seed, held_out):
        assert beta == tmp_path / "7/base/beta/final" and beta.exists()
        made.append((seed, len(held_out)))
        (home / "start" / "final").mkdir(parents=True)
        (home / "start" / "final" / "config.json").touch()

    def train(config):
        assert Path(config.model) == tmp_path / "7/acceleration_study/start/final"
        done.append((Path(config.output).name, config.advantage, config.acceleration))

    for name, fake in (
        ("RUN", {"zero": stage, "beta": stage}),
        ("begin", begin),
        ("make_start", make_start),
        ("load", lambda path: path),
        ("measure", lambda model, *_: ({"both": 0.12345, "at": len(done)}, [])),
    ):
        monkeypatch.setattr(acceleration, name, fake)
    monkeypatch.setattr(acceleration.papo, "run", train)
    monkeypatch.setattr(acceleration, "PROBLEMS", 3)
    rows = acceleration.run_seed(7, tmp_path, acceleration.STUDIES["advantages"])
    arms = [(name, name, 1.0) for name in ("batch_std", "mean", "group_std")]
    assert done == ["zero", "beta", *arms] and made == [(7, 3)]
    assert rows["start"] == {"both": 0.1235, "at": 2} and rows["group_std"]["at"] == 5
    acceleration.run_seed(7, tmp_path, acceleration.STUDIES["acceleration"])
    assert done[5:] == [("off", "batch_std", 0.0), ("on", "batch_std", 0.5)] and len(made) == 1


def test_the_arms_of_each_study_differ_in_one_thing(acceleration):
    for arms in acceleration.STUDIES.values():
        made = [load_config(PapoConfig, "tiny_papo", settings) for settings in arms.values()]
        dumps = [dataclasses.asdict(config) for config in made]
        differ = {key for key in dumps[0] if len({str(dump[key]) for dump in dumps}) > 1}
        assert len(differ) == 1
    assert all(config.acceleration == 1 and config.acceleration_cap == 0.4 for config in made)
    assert {config.advantage for config in made} == {*ADVANTAGES}


@pytest.fixture
def credit(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import credit

    monkeypatch.setattr(credit, "RESULTS", tmp_path / "credit.json")
    monkeypatch.setattr(credit, "use_cache", lambda path: None)
    return credit


def test_steps_to_an_accuracy_by_hand(credit):
    assert credit.steps_to([0.8, 0.9, 1.0, 1.0], 0.9, 2) == 3
    assert credit.steps_to([1.0, 1.0, 0.0], 0.9, 2) == 2
    assert credit.steps_to([1.0, 0.5, 1.0], 0.9, 2) is None
    assert credit.steps_to([1.0], 0.9, 2) is None


def test_the_study_of_credit_trains_what_is_missing(credit, tmp_path, monkeypatch):
    trained = []

    def run(config):
        assert config.model == str(tmp_path / "runs/7/base/beta/final") and config.steps == 9
        assert config.branch_labels == "npr_jax.demo.steps"
        trained.append(config.branch_credit)
        if len(trained) == 3:
            raise KeyboardInterrupt  # the machine is wanted for something else

    def stage(config):
        (Path(config.output) / "final").mkdir(parents=True)

    monkeypatch.setattr(credit.papo, "run", run)
    monkeypatch.setattr(credit, "RUN", {"zero": stage, "beta": stage})
    monkeypatch.setattr(credit, "begin", lambda seed, home: None)
    rates = {"0.0": 0.8, "0.5": 0.9, "1.0": 0.95}
    monkeypatch.setattr(credit, "read_metrics", lambda path: [{"accuracy": rates[path.name]}] * 9)
    command = ["credit.py", "run", "--runs", str(tmp_path / "runs"), "--steps", "9", "--seeds", "7"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match=r"credit\.json has no seed with all arms: run first"):
        credit.table(None)
    with pytest.raises(KeyboardInterrupt):
        credit.main()
    credit.main()
    assert trained == [0.0, 0.5, 1.0, 1.0]
    assert credit.results(credit.RESULTS) == {"7": {arm: [rate] * 9 for arm, rate in rates.items()}}
    docs = tmp_path / "recipe.md"
    docs.write_text(f"before\n{credit.BEGIN}\n{credit.END}\nafter\n")
    monkeypatch.setattr(credit, "DOCS", docs)
    monkeypatch.setattr("sys.argv", ["credit.py", "table"])
    credit.main()
    text = docs.read_text()
    assert "| the answer alone | 9.0 | 0 of 1 |  | 0.800 |" in text
    assert "| `branch_credit` 1 | 8.0 | 1 of 1 | -1.0 | 0.950 |" in text
