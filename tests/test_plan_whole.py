"""The arithmetic of plans: of GPUs against what the TPU compiler has said, and of whole steps
against what is obviously so."""

import json
import math
import random
from pathlib import Path

import pytest
from train_toy import example, tiny
from typer.testing import CliRunner

from npr_jax.base.chips import GIB, GPU_FRACTION
from npr_jax.base.mesh import AXES, parse_mesh
from npr_jax.cli import app
from npr_jax.model import PRESETS
from npr_jax.plan import arithmetic
from npr_jax.plan.places import find_place
from npr_jax.plan.plan import plan, report, stage_config
from npr_jax.plan.programs import architecture
from npr_jax.plan.whole import read_lengths, rollout_seconds, rows_of
from npr_jax.train.packing import make_rows

ROOT = Path(__file__).parents[1]
COMPILED = [
    case
    for case in json.loads((ROOT / "bench/results/plan.json").read_text())["cases"]
    if case["collectives"] and case["model"] != "tiny"  # the compiler had room for it
]


def test_arithmetic_is_near_the_compiled_programs():
    assert len(COMPILED) > 12
    for case in COMPILED:
        train = stage_config("papo", case["model"]).train
        arch = architecture(PRESETS[case["model"]], train)
        sizes = {axis: case["mesh"].get(axis, 1) for axis in AXES}
        temp = arithmetic.train_temp(arch, train, sizes, case["params"])
        assert temp == pytest.approx(case["train_temp"], rel=0.1), (case["model"], case["topology"])
        moved = arithmetic.train_collectives(arch, train, sizes)
        assert moved == pytest.approx(case["collectives"], rel=0.15), case["topology"]
        config = stage_config("papo", case["model"])
        local = find_place("h100:8", parse_mesh("fsdp=-1,tensor=4")).local
        decode = arithmetic.decode_figures(arch, config, local)
        for name in ("engine_weights", "page", "page_tokens", "lanes"):
            assert decode[name] == case[name], name


@pytest.mark.parametrize("stage", ["zero", "beta", "papo"])
@pytest.mark.parametrize("topology", ["h100:8", "h200:8", "h100:8x2", "h200:8x4"])
def test_the_presets_fit_gpus_and_say_what_is_arithmetic(stage, topology):
    found = plan("qwen3-4b", stage_config(stage, "qwen3-4b"), topology, problems=8000)
    assert found["fits"] and not found["compiled"], found["advice"]
    text = report(found)
    assert "(arithmetic)" in text and "compiled" not in text and " hours" in text
    state = 4.02e9 * 12 / math.prod(found["mesh"].values())
    assert found["params"] + found["optimizer"] == pytest.approx(state, rel=0.01)
    assert found["hbm"] < GPU_FRACTION * (80 if "h100" in topology else 141) * GIB
    # Two optimizer steps' worth of chips: half the micro-batches.
    assert found["micro_batches"] >= 1 and 0 < found["row_use"] <= 1


def test_what_does_not_fit_gpus_says_what_to_change():
    command = "plan --model qwen3-32b --stage papo --topology h100:8"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 3 and "It does not fit: make mesh." in result.output


def test_nodes_share_what_crosses_the_network():
    config = stage_config("papo", "qwen3-4b")
    wide = plan("qwen3-4b", config, "h100:8x2")
    inside = plan("qwen3-4b", config, "h100:8x2", parse_mesh("data=2,fsdp=8"))
    assert wide["network"] == wide["collectives"] and wide["collective_s"] == 0
    assert inside["network"] == inside["params"]  # a sum over two nodes
    assert inside["collective_s"] > 0 and inside["params"] == pytest.approx(
        2 * wide["params"], rel=1e-3
    )


def test_a_plan_and_a_run_say_alike_that_a_step_is_smaller_than_the_mesh():
    config = stage_config("zero", "qwen3-4b", ["minibatches=32"])
    few = plan("qwen3-4b", config, "h100:8x4", lengths="3000", prompt=200)
    assert config.advice(32) and few["thin"] == config.advice(32)
    assert f"\n  {few['thin']}\n" in report(few)
    helped = plan("qwen3-4b", config, "h100:8x4", parse_mesh("fsdp=16,tensor=2"))
    assert helped["thin"] == "" and "empty rows" not in report(helped)
    beta = stage_config("beta", "qwen3-4b", ["fit.batch=8"])
    assert plan("qwen3-4b", beta, "h100:8x4", problems=1000)["thin"] == beta.advice(32) != ""


def test_lengths_are_spread_over_what_is_given(tmp_path):
    assert read_lengths("max", 3, 50) == [50, 50, 50]
    assert read_lengths("10,20,90", 6, 50) == [10, 10, 20, 20, 50, 50]
    for text in ("20\n10\n", "20, 10"):
        (tmp_path / "lengths").write_text(text)
        assert read_lengths(str(tmp_path / "lengths"), 4, 50) == [10, 10, 20, 20]
    drawn = read_lengths("lognormal:1000:0.5", 999, 10**6)
    assert drawn[499] == 1000 and drawn[839] == pytest.approx(1000 * math.exp(0.5), rel=0.02)
    (tmp_path / "nan").write_text("5\nnan\n")
    for text in ("lognormal:0:1", "lognormal:5", "lognormal:nan:1", str(tmp_path / "nan")):
        with pytest.raises(ValueError, match="lengths is"):
            read_lengths(text, 2, 50)
    with pytest.raises(FileNotFoundError):
        read_lengths("1,x", 2, 50)


def test_rows_are_those_that_packing_lays_out():
    rng, model = random.Random(0), tiny()
    for _ in range(20):
        groups, sizes = [], []
        for _ in range(rng.randint(1, 5)):
            group = [
                example(model, "A:1+2?", "x" * rng.randint(1, 60)) for _ in range(rng.randint(1, 6))
            ]
            prompt = group[0].layout.prompt_len
            groups.append(group)
            sizes.append([len(e.layout) - prompt for e in group])
        for row_len in (80, 128):
            assert rows_of(sizes, prompt, row_len) == len(make_rows(groups, row_len, 3))


FOUND = {
    "page": 64.0,
    "page_tokens": 64,
    "pages": 10**9,
    "lanes": 4,
    "replicas": 2,
    "decode_bytes": 1e9,
    "decode_collectives": 0.0,
}


def seconds(lengths, **changes):
    place = find_place("h100:8x2", parse_mesh("fsdp=4,tensor=4"))
    found = FOUND | changes
    return rollout_seconds(found, PRESETS["qwen3-4b"], place, lengths, len(lengths), 1)


def test_a_replica_takes_as_long_as_its_answers():
    """Two hosts of two replicas, with four lanes each; one decode step reads 1 GB of weights, and
    next to nothing of keys."""
    step = 1e9 / 3350e9
    assert seconds([100])["decode_s"] == pytest.approx(100 * step, rel=0.01)
    assert seconds([100])["idle_replicas"] == 3
    for lengths, steps in (
        ([100] * 16, 100),  # one after another where there are too few lanes
        ([100] * 17, 200),
        ([400, *[100] * 15], 400),
        ([100] * 32, 200),
    ):
        found = seconds(lengths)
        assert found["decode_s"] == pytest.approx(steps * step, rel=0.02), lengths
        assert found["idle_replicas"] == 0 and found["rollout_tokens"] == sum(lengths)
    # Pages for one answer at a time, and keys that weigh as much as the weights.
    assert seconds([100] * 16, pages=2)["decode_s"] == pytest.approx(400 * step, rel=0.02)
    heavy = seconds([100], page=64 * 1e9 / 51)  # 51 keys are there in the middle
    assert heavy["decode_s"] == pytest.approx(200 * step, rel=0.02)


def test_the_scripts_leave_as_much_memory_as_is_planned_for():
    scripts = ["gpu_node.sh", "slurm.sbatch", "jobset_gpu.yaml"]
    for script in scripts:
        text = (ROOT / "scripts" / "launch" / script).read_text()
        assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in text and str(GPU_FRACTION) in text, script


def test_sides_are_planned_beside_each_other():
    def planned(mesh, *sets):
        config = stage_config("papo", "qwen3-4b", sets)
        return plan("qwen3-4b", config, "h100:8x8", parse_mesh(mesh), lengths="lognormal:4000:0.8")

    turns, apart = planned("fsdp=-1"), planned("fsdp=-1,rollout=32", "staleness=1")
    assert turns["step_s"] == turns["rollout_s"] + turns["train_s"] + turns["handover_s"]
    longer = max(apart["rollout_s"], apart["train_s"])
    assert apart["step_s"] == longer + apart["handover_s"]
    # Half of the chips train, and half of the replicas answer; each has its memory to itself.
    assert apart["hosts"] == apart["rollout_hosts"] == turns["hosts"] / 2
    assert apart["params"] == pytest.approx(2 * turns["params"], rel=0.01)
    assert apart["pages"] > turns["pages"]
    assert "32 chips of their own" in report(apart)
    with pytest.raises(ValueError, match=r"mesh\.rollout is 32.*--set staleness=1"):
        planned("fsdp=-1,rollout=32")
    with pytest.raises(ValueError, match=r"mesh\.rollout is 4, needed is a multiple of 8"):
        planned("fsdp=-1,rollout=4", "staleness=1")
