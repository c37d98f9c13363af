"""`npr-jax plan`: what it says is what the compiler and arithmetic say."""

import dataclasses
import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import spread
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from train_toy import example, write_problems
from typer.testing import CliRunner

import npr_jax
from npr_jax import tree
from npr_jax.base.chips import CHIPS, GIB
from npr_jax.base.mesh import local_decode_mesh, make_mesh, parse_mesh
from npr_jax.cli import app
from npr_jax.decode import runner as runner_module
from npr_jax.decode.steps import compiled_steps
from npr_jax.model import PRESETS, abstract_params, num_params
from npr_jax.model.config import REMAT, LoraConfig
from npr_jax.model.flops import train_flops
from npr_jax.model.lora import base_of, joined, plain, trained
from npr_jax.plan import arithmetic
from npr_jax.plan.hlo import collective_bytes
from npr_jax.plan.places import array_bytes, find_place
from npr_jax.plan.plan import STATE, plan, report, stage_config
from npr_jax.plan.programs import architecture, decode_step, train_step
from npr_jax.train import beta, papo, rl, zero
from npr_jax.train import step as step_module
from npr_jax.train.objective import Objective, loss_sums
from npr_jax.train.packing import empty_row
from npr_jax.train.rollout import engine_params
from npr_jax.train.step import compiled_step

TINY_MESHES = {
    "v5e:4x4": "data=8,tensor=2",
    "v5p:4x4x4": "data=4,fsdp=4,sequence=2,tensor=2",
    "v6e:16x16": "data=32,fsdp=4,tensor=2",
}


@functools.cache
def tiny_plan(topology, mesh, *changes):
    """Of PAPO with the tiny model; half a minute of compilation, once for all tests."""
    return plan("tiny", stage_config("papo", "tiny", changes), topology, parse_mesh(mesh))


def test_collectives_are_counted_as_often_as_they_run():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def shard(kind):
        return {
            "gather": lambda x: jax.lax.all_gather(x, "x", tiled=True),
            "reduce": lambda x: jax.lax.psum(x, "x"),
            "scatter": lambda x: jax.lax.psum_scatter(x, "x", tiled=True),
            "permute": lambda x: jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]),
        }[kind]

    def received(kind, times=1):
        def body(x):
            def once(carry, _):
                return carry + shard(kind)(x * carry).sum(), None

            return jax.lax.scan(once, jnp.float32(1), length=times)[0]

        whole = jax.shard_map(body, mesh=mesh, in_specs=P("x"), out_specs=P(), check_vma=False)
        x = jax.ShapeDtypeStruct((8 * 1024,), jnp.float32, sharding=NamedSharding(mesh, P("x")))
        return collective_bytes(jax.jit(whole).lower(x).compile().as_text())

    part = 1024 * 4
    assert received("gather") == 7 * part
    assert received("reduce") == 2 * part * 7 / 8
    assert received("scatter") == 7 * part / 8
    assert received("permute") == part
    assert received("gather", times=5) == 5 * 7 * part


LOOP_OF_A_TPU = """
%condition (p: (u32[], f32[1024])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8)
  %p = (u32[]{:T(128)}, f32[1024]{0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (p: (u32[], f32[1024])) -> (u32[], f32[1024]) {
  %p = (u32[]{:T(128)}, f32[1024]{0}) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[1024]{0} get-tuple-element(%p), index=1
  %sum = f32[1024]{0} all-reduce(%x), replica_groups=mesh['a'=16,'b'=4] {'b'}, to_apply=%add
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %result = (u32[]{:T(128)}, f32[1024]{0}) tuple(%next, %sum)
}

ENTRY %main (x: f32[1024]) -> f32[1024] {
  %start = (u32[], f32[1024]{0}) tuple(%zero, %x)
  %loop = (u32[], f32[1024]{0}) while(%start), condition=%condition, body=%body
}
"""


def test_loops_are_read_as_the_tpu_compiler_writes_them():
    assert collective_bytes(LOOP_OF_A_TPU) == 4 * 2 * 4096 * 3 / 4
    dynamic = LOOP_OF_A_TPU.replace("constant(8)", "get-tuple-element(%p), index=2")
    assert collective_bytes(dynamic) == 2 * 4096 * 3 / 4


@pytest.mark.parametrize("lora", [None, LoraConfig(8)], ids=["all", "adapters"])
@pytest.mark.parametrize("remat", REMAT)
def test_flops_are_those_of_the_program(remat, lora):
    config = dataclasses.replace(
        PRESETS["tiny"], num_layers=1, hidden_size=256, intermediate_size=512, remat=remat
    )
    config = dataclasses.replace(config, lora=lora)
    rows, row_len = 2, 64
    row = empty_row(row_len, 2)
    batch = {
        name: jax.ShapeDtypeStruct((rows, *value.shape), value.dtype) for name, value in row.items()
    }
    grad = jax.jit(
        jax.grad(
            lambda p, base, b: loss_sums(joined(base, p), b, config, Objective("sft"), "float32")[
                0
            ],
        )
    )

    def unrolled(params):
        one = params["layers"].items()
        return {
            **params,
            "layers": ({name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in one},),
        }

    params = abstract_params(config)
    base = unrolled(base_of(params)) if lora else None
    params = unrolled(trained(config, params))
    counted = grad.lower(params, base, batch).compile().cost_analysis()["flops"]
    assert train_flops(config, rows, row_len) == pytest.approx(counted, rel=0.2)


def test_rows_of_a_step_hold_the_longest_answers():
    run = stage_config("papo", "qwen3-4b")
    assert run.rows == 16 * 16  # a row of 32k holds one answer of 30k
    assert stage_config("papo", "qwen3-4b", ["max_tokens=10000"]).rows == 16 * 6  # and three of 10k
    assert stage_config("zero", "tiny").rows == 16 * 6 // 2  # two minibatches
    assert stage_config("beta", "tiny").rows == 32


RUNS = [
    ("zero", [], 2, "dapo"),
    ("zero", ["clip_high=0.3"], 2, "dapo"),
    ("beta", [], 2, "sft"),
    ("beta", ["layout=reference"], 5, "sft"),
    ("papo", [], 3, "papo"),
    ("papo", ["layout=reference"], 6, "papo"),
    ("papo", ["objective=dapo"], 3, "dapo"),
    ("papo", ["train.lora.rank=4", "train.compute_dtype=bfloat16"], 3, "papo"),
    ("beta", ["fit.train.lora.targets=[q_proj]"], 2, "sft"),
]


@pytest.mark.parametrize("stage, overrides, depth, loss", RUNS)
def test_what_is_planned_is_the_program_of_the_run(
    tmp_path, monkeypatch, stage, overrides, depth, loss
):
    """A stage runs up to its first train step, on an answer that is put in for sampled ones."""
    model = npr_jax.load("tiny")
    ((prompt, response, answer),) = write_problems(tmp_path / "problems.jsonl", 1, groups=2)
    settings = [f"problems={tmp_path / 'problems.jsonl'}", f"output={tmp_path / 'run'}"]
    settings += ["model=tiny", "mesh.data=4", "mesh.tensor=2", *overrides]
    # A row that the one answer nearly fills: a run computes no more of larger ones than it needs.
    if stage == "beta":
        settings += ["sampler_model=tiny", "fit.batch=1"]
        settings += ["fit.train.row_len=96", "fit.train.micro_rows=1"]
    else:
        settings += ["minibatches=1", "train.row_len=96", "train.micro_rows=1", "max_tokens=64"]
    config = stage_config(stage, "tiny", settings)
    trace = example(model, prompt, response, advantage=1.0)
    ids = trace.token_ids.tolist()
    assert 64 < len(ids) <= 96
    record = {"problem": prompt, "answer": answer, "prompt_len": trace.layout.prompt_len}
    record |= {"tries": 1, "accepted": [ids], "texts": [response]}
    if getattr(config, "layout", "strict") == "reference":
        rule = tree.parse(ids, trace.layout.prompt_len, model.tags, rule="reference")
        trace = dataclasses.replace(trace, layout=rule)
    collected = rl.Collected([[trace]], [0], {})
    monkeypatch.setattr(beta, "_sample_batch", lambda *_: ([record], {}))
    monkeypatch.setattr(zero, "collect_groups", lambda *_: collected)
    monkeypatch.setattr(papo, "collect_groups", lambda *_: collected)

    class Reached(Exception):
        pass

    asked = []

    def recorded(*key):
        """In place of the compiled step of a run: remembers what it is of, and its arguments."""

        def step(*arguments):
            asked.append((key, arguments))
            raise Reached

        return step

    monkeypatch.setattr(step_module, "compiled_step", recorded)
    with pytest.raises(Reached):
        {"zero": zero, "beta": beta, "papo": papo}[stage].run(config, lambda _: None)
    ((arch, *key), arguments) = asked[0]
    mesh = make_mesh(config.mesh)
    planned = architecture(PRESETS["tiny"], config.train)
    planned = dataclasses.replace(planned, attention=arch.attention)  # which is the device's
    assert planned == arch
    step, abstract = train_step(planned, config, mesh)
    assert step is compiled_step(arch, *key)

    def aval(x):
        return x.shape, x.dtype

    assert jax.tree.map(aval, abstract) == jax.tree.map(aval, arguments)
    for part in (slice(2), slice(5, None)):  # state and batch, and a base
        assert [x.sharding for x in jax.tree.leaves(abstract[part])] == [
            x.sharding for x in jax.tree.leaves(arguments[part])
        ]
    # And both are what is meant.
    assert arguments[1]["hidden"].shape[-2] == depth and key[1].name == loss


def test_the_decode_step_that_is_planned_is_the_one_of_the_run(monkeypatch):
    """An engine of a run on a mesh, up to its first decode step, as a device other than a CPU has
    its weights."""
    config = stage_config("papo", "tiny", ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"])
    model, mesh = npr_jax.load("tiny"), make_mesh(config.mesh)
    dtype, decoding = config.train.compute_dtype, local_decode_mesh(mesh)
    monkeypatch.setattr(runner_module, "_unstack", lambda params: params)
    params = engine_params(model.config, model.params, dtype, mesh)
    engine = npr_jax.Engine(dataclasses.replace(model, params=params), config.engine, decoding)
    step, planned = decode_step(model.config, config, decoding)
    asked = []

    class Reached(Exception):
        pass

    def recorded(*arguments):
        asked.append(arguments)
        raise Reached

    steps = engine.runner._steps._replace(decode=recorded, prefill=lambda _, pool, *__: pool)
    engine.runner._steps = engine.runner._prompt_steps = steps
    with pytest.raises(Reached):
        engine.generate([[1, 5, 6]] * len(engine.runner._lanes))  # the widest step
    (arguments,) = asked
    attention = engine.config.attention or "blockwise"  # on this machine's device
    assert step is compiled_steps(model.config, attention, engine.config.steps, decoding, 0).decode

    def story(x):
        return x.shape, x.dtype, x.sharding

    ours, theirs = list(planned), list(arguments)
    pool, limit = ours.pop(1), ours.pop()
    real_pool, real_limit = theirs.pop(1), theirs.pop()
    assert jax.tree.map(story, ours) == jax.tree.map(story, theirs)
    pages = 2 * 4, config.engine.pages * 4  # of four replicas
    assert [a for a in zip(pool.shape, real_pool.shape, strict=True) if a[0] != a[1]] == [pages]
    assert (pool.dtype, pool.sharding) == (real_pool.dtype, real_pool.sharding)
    assert (limit.shape, limit.dtype) == (real_limit.shape, real_limit.dtype)


@pytest.mark.nightly
def test_a_good_plan_is_quiet_about_the_host_that_is_not_there(tpu_compiler):
    command = "plan --model tiny --stage papo --topology v5e:2x2 --mesh data=2,tensor=2"
    ours = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    result = subprocess.run(
        [sys.executable, "-m", "npr_jax", *command.split()],
        capture_output=True,
        text=True,
        timeout=900,
        env=ours,
    )
    assert result.returncode == 0 and "It fits." in result.stdout, result.stderr
    assert "compiling the decode step" in result.stderr
    assert not re.search("INVALID_ARGUMENT|Failed|WARNING|Error", result.stderr), result.stderr


def test_adapters_take_a_fifth_of_the_state_of_all_weights():
    """Parameters, base and optimizer of the 4B preset, by shapes alone."""
    mesh, lora = parse_mesh("fsdp=8"), ["train.lora.rank=16"]
    whole, some = (
        plan("qwen3-4b", stage_config("papo", "qwen3-4b", changes), "h100:8", mesh)
        for changes in ([], lora)
    )

    def state(found):
        return sum(found[name] for name in STATE)

    assert state(whole) == pytest.approx(12 * 4.02e9 / 8, rel=0.01)
    assert state(some) < state(whole) / 5 and some["base"] == pytest.approx(8.04e9 / 8, rel=0.01)
    assert some["params"] < 0.01 * whole["params"] and some["reference"] == 0
    assert 0.75 * whole["flops"] < some["flops"] < 0.9 * whole["flops"]
    assert some["train_temp"] < whole["train_temp"] - 2 * 0.98 * whole["params"]
    assert some["checkpoint_bytes"] < 0.01 * whole["checkpoint_bytes"]
    assert some["handover_s"] < 0.01 * whole["handover_s"]
    assert "frozen base (lora)" in report(some) and "frozen base" not in report(whole)
    kl = plan("qwen3-4b", stage_config("papo", "qwen3-4b", [*lora, "kl=0.1"]), "h100:8", mesh)
    assert kl["reference"] == 0  # it is the base


def test_the_state_of_adapters_is_what_the_program_takes():
    """The arguments of the compiled step on the host's devices, to the byte."""
    changes = ["train.lora.rank=4", "train.compute_dtype=bfloat16", "mesh.data=2", "mesh.fsdp=4"]
    config = stage_config("papo", "tiny", changes)
    mesh = make_mesh(config.mesh)
    arch = config.train.model(PRESETS["tiny"])
    step, arguments = train_step(arch, config, mesh)
    state, *_, base = arguments
    memory = step.lower(*arguments).compile().memory_analysis()
    assert memory.argument_size_in_bytes == array_bytes(arguments)
    assert array_bytes(base) == pytest.approx(2 * num_params(plain(arch)) / 4, rel=0.01)
    adapters = num_params(arch) - num_params(plain(arch))
    assert array_bytes(state) <= 12 * adapters and array_bytes(state) > 12 * adapters / 4
    # Neither a gradient nor another copy of what is frozen.
    whole, rest = stage_config("papo", "tiny", changes[1:]), memory.temp_size_in_bytes
    step, arguments = train_step(whole.train.model(PRESETS["tiny"]), whole, mesh)
    temp = step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert rest < temp


@pytest.mark.parametrize("topology", spread(TINY_MESHES, test=1))
def test_tiny_is_planned_for(tpu_compiler, topology):
    mesh = parse_mesh(TINY_MESHES[topology])
    found = tiny_plan(topology, TINY_MESHES[topology])
    assert found["fits"] and found["collectives"] > 0
    state = sum(x.size for x in jax.tree.leaves(abstract_params(PRESETS["tiny"]))) * 4
    assert state / mesh.tensor / max(1, mesh.fsdp) <= found["params"] <= state
    assert 2 * found["params"] <= found["optimizer"] < 2.1 * found["params"]
    chip = CHIPS[topology[:3]]
    used = found["params"] + found["optimizer"] + found["engine_weights"]
    used += found["pages"] * found["page"] + max(found["train_temp"], found["decode_temp"])
    assert chip.hbm - found["page"] < used <= chip.hbm
    text = report(found)
    assert "It fits." in text and f"{found['pages']:,} of 16 tokens" in text


@pytest.mark.slow
def test_adapters_send_no_more_between_chips_than_all_weights(tpu_compiler):
    """Sums over `tensor` go once for all matrices that share an input, as without adapters."""
    whole = tiny_plan("v5e:4x4", "data=8,tensor=2")
    some = tiny_plan("v5e:4x4", "data=8,tensor=2", "train.lora.rank=4")
    assert some["collectives"] < 1.1 * whole["collectives"]
    assert some["train_temp"] < 1.1 * whole["train_temp"]


@pytest.mark.nightly
def test_qwen3_4b_with_adapters_takes_what_arithmetic_says(tpu_compiler):
    mesh, config = parse_mesh("fsdp=16,tensor=4"), ["train.lora.rank=16"]
    config = stage_config("papo", "qwen3-4b", config)
    found = plan("qwen3-4b", config, "v5p:4x4x4", mesh)
    assert sum(found[name] for name in STATE) < 12 * 4.02e9 / 64 / 5
    arch = architecture(PRESETS["qwen3-4b"], config.train)
    made = find_place("v5p:4x4x4", mesh).mesh
    said = arithmetic.train_figures(arch, config.train, made, found["params"])
    assert said["train_temp"] == pytest.approx(found["train_temp"], rel=0.1)
    assert said["collectives"] == pytest.approx(found["collectives"], rel=0.15)


PLACES = ["h100:8 --mesh data=4,tensor=2", "v5e:4x4 --mesh data=8,tensor=2"]


@pytest.mark.parametrize("place", spread(PLACES, check=1, test=1))
def test_what_does_not_fit_is_told_with_the_setting_to_change(request, place):
    if place.startswith("v5e"):
        request.getfixturevalue("tpu_compiler")
    command = f"plan --model tiny --stage papo --topology {place}"
    changes = ["--set", "engine.pages=2000000000", "--set", "engine.table_pages=64"]
    result = CliRunner().invoke(app, [*command.split(), *changes])
    assert result.exit_code == 3, result.output
    assert "It does not fit:" in result.output and "set engine.pages to that" in result.output


@pytest.mark.nightly
def test_qwen3_4b_is_planned_for_64_chips(tpu_compiler, report):
    mesh = parse_mesh("fsdp=16,tensor=4")
    found = plan("qwen3-4b", stage_config("papo", "qwen3-4b"), "v5p:4x4x4", mesh)
    report(
        f"{found['train_compile_s']:.0f} s and {found['decode_compile_s']:.0f} s of compilation, "
        f"{found['train_temp'] / GIB:.2f} GiB temporary, {found['pages']:,} pages"
    )
    assert found["fits"]
    assert found["params"] == pytest.approx(4.02e9 * 4 / 64, rel=0.01)
    assert found["engine_weights"] == pytest.approx(4.02e9 * 2 / 4, rel=0.01)
    # FSDP gathers every weight for the forward pass, for its repetition and for the backward pass.
    assert found["collectives"] > 3 * found["engine_weights"] * 15 / 16


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("qwen3-5b", "v5p:4x4x4", None), "model is 'qwen3-5b', needed is one of qwen3-0.6b"),
        (("tiny", "v7:4x4", None), "topology is 'v7:4x4', needed is one of v5e, v5p, v6e"),
        (("tiny", "h100:8x", None), "topology is 'h100:8x'.*; or one of h100, h200, how many"),
        (("tiny", "h100:8", "fsdp=4"), "h100:8x1 are 8 GPUs, and the mesh takes 4"),
        (
            ("tiny", "h100:8x2", "data=1,sequence=8,tensor=2"),
            "16 GPUs share a row, and a node has 8",
        ),
        (("tiny", "v5e", None), "and a shape"),
        (("tiny", "v5p:4x4x4", "fsdp=-1"), "embed=96 does not divide by fsdp=64"),
        (("tiny", "v5e:4x4", "tensor=8,fsdp=2"), "a process has 4"),
        (("tiny", "v5e:3x5", None), "the TPU compiler says"),
    ],
)
def test_what_cannot_be_is_refused(tpu_compiler, arguments, message):
    model, topology, mesh = arguments
    with pytest.raises(ValueError, match=message):
        plan(model, stage_config("papo", "tiny"), topology, mesh and parse_mesh(mesh))


@pytest.mark.slow
def test_two_slices_are_compiled_for(tpu_compiler):
    two = tiny_plan("v5e:2x2", "slices=2,fsdp=2,tensor=2")
    one = tiny_plan("v5e:2x2", "fsdp=2,tensor=2")
    assert two["compiled"] and two["hosts"] == 2 and two["micro_batch"] == 2 * one["micro_batch"]
    same = "params", "optimizer", "engine_weights", "page", "flops", "decode_temp"
    assert {name: two[name] for name in same} == {name: one[name] for name in same}
    # Within a slice a part of the sum over both is made: at most a gradient for each of two.
    assert 0 <= two["collectives"] - one["collectives"] < 0.2 * one["collectives"]
    assert (one["network"], two["network"]) == (0, one["params"])  # a sum over two
    assert "2 slices, mesh data=2,fsdp=2,tensor=2" in report(two)


def test_settings_that_are_not_understood_are_refused():
    with pytest.raises(ValueError, match="stage is 'sft', needed is one of zero, beta, papo"):
        stage_config("sft", "tiny")
    with pytest.raises(ValueError, match="mesh 'fsdp': 'fsdp' is not understood"):
        parse_mesh("fsdp")
    with pytest.raises(ValueError, match="'model=2' is not understood, needed is AXIS=SIZE"):
        parse_mesh("fsdp=2,model=2")
