"""Whether a run fits its chips, and how long it takes: told by the TPU compiler on a machine that
has no TPU, and for GPUs by arithmetic.

    preset, stage, chips, mesh --the real train step and decode step--> bytes, FLOPs, time

What is resident while a stage runs: parameters and optimizer state, the engine's copy of the
weights, the KV pool; beside them either a train step or a decode step needs room for what it
computes, or the engine's next weights. Pages are given what is left.
"""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from npr_jax.base.chips import GIB
from npr_jax.base.config import load_config
from npr_jax.base.mesh import MeshConfig, batch_shards
from npr_jax.model import PRESETS, num_params
from npr_jax.plan import arithmetic
from npr_jax.plan.arithmetic import num_trained
from npr_jax.plan.places import Place, array_bytes, find_place
from npr_jax.plan.programs import architecture, decode_figures, train_figures, train_step
from npr_jax.plan.whole import DISK_RATE, HOST_RATE, whole_step
from npr_jax.train.beta import BetaConfig
from npr_jax.train.configs import CONFIGS
from npr_jax.train.optimizer import abstract_base, abstract_state
from npr_jax.train.rl import RLConfig
from npr_jax.train.rollout import STAGES

STATE = ("params", "base", "optimizer", "reference")  # what is resident where a stage trains


def stage_config(stage: str, model: str, overrides: Sequence[str] = ()) -> RLConfig | BetaConfig:
    """A stage's preset, `tiny_<stage>` for the tiny model and `qwen3_4b_<stage>` for others, with
    `a.b=value` overrides. Raises ValueError for other stages and keys."""
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}, needed is one of {', '.join(STAGES)}")
    preset = "tiny" if model == "tiny" else "qwen3_4b"
    config = load_config(CONFIGS[stage], f"{preset}_{stage}", overrides)
    assert isinstance(config, RLConfig | BetaConfig)
    return config


def plan(
    model: str,
    config: RLConfig | BetaConfig,
    topology: str,
    mesh: MeshConfig | None = None,
    tell: Callable[[str], None] = lambda _: None,
    lengths: str = "max",
    prompt: int | None = None,
    problems: int | None = None,
) -> dict:
    """Plans a stage; figures per chip, in bytes, FLOPs and seconds.

    Args:
      model: name of a preset of `npr_jax.model.PRESETS`.
      config: of the stage; what it says of rows, loss, engine and mesh is what is planned.
      topology: kind and shape of a TPU slice, "v5p:4x4x4"; or GPUs of a node and nodes, "h100:8x2".
      mesh: of training; None is fsdp over all chips.
      tell: is told what is compiled.
      lengths: of answers, as `whole.read_lengths` takes them; "max" is as long as can be.
      prompt: tokens of a prompt; None is as long as can be.
      problems: that Beta samples; None is what its config says.

    Returns:
      compiled: whether the next ones are of compiled programs, or arithmetic.
      train_temp, decode_temp: of the steps; collectives: of one micro-batch; decode_bytes,
      decode_collectives: of a decode step. What follows is arithmetic.
      rollout: chips that do nothing but roll out, beside those of the mesh.
      params, base (frozen, of train.lora), optimizer, reference, engine_weights: resident, beside
      the pool; page, pages, pages_wanted: of the pool; flops, network: of one micro-batch;
      compute_s, collective_s, network_s, least_s: the least time of it; decode_least_s: of one
      decode step of few, short answers; engine_next: of the weights that are handed over; hbm,
      fits, advice; thin: what a run says where a step is smaller than the mesh;
      and what `whole_step` gives.

    Raises:
      ValueError: the model, the chips or the mesh is not what can be, or there is no TPU compiler.
    """
    if model not in PRESETS:
        raise ValueError(f"model is {model!r}, needed is one of {', '.join(PRESETS)}")
    mesh = mesh or MeshConfig(fsdp=-1)
    if mesh.rollout and not (isinstance(config, RLConfig) and config.staleness):
        raise ValueError(
            f"mesh.rollout is {mesh.rollout}, needed is zero or papo with staleness of 1 or more: "
            "--set staleness=1"
        )
    place = find_place(topology, mesh)
    chip, made = place.chip, place.mesh
    config.train.check(made)
    arch = architecture(PRESETS[model], config.train)
    state = abstract_state(arch, config.train.optimizer, made)
    slices, apart = mesh.slices, mesh.rollout > 0
    found: dict = {
        "model": model,
        "stage": config.command,
        "topology": topology,
        "slices": slices,
        "mesh": {axis: size for axis, size in made.shape.items() if size > 1},
        "compiled": place.compiled,
        "hosts": place.hosts,
        "rollout": mesh.rollout,
        "rollout_hosts": place.rollout_hosts,
        "hbm": chip.hbm,
        "params": array_bytes(state.params),
        "base": array_bytes(abstract_base(arch, config.train.compute_dtype, made)),
        "optimizer": array_bytes(state.opt_state),
        "reference": _reference_bytes(state.params, config),
        "row_len": config.train.row_len,
        "micro_batch": config.train.micro_rows * batch_shards(made),
    }
    if place.compiled:
        step, arguments = train_step(arch, config, made)
        tell(f"compiling the train step for {made.size} chips")
        found |= train_figures(arch, config.train, made, step.lower(*arguments))
        tell(f"compiling the decode step for the {place.local.size} chips of a host")
        found |= decode_figures(arch, config, place.local)
    else:
        found |= arithmetic.train_figures(arch, config.train, made, found["params"])
        found |= arithmetic.decode_figures(arch, config, place.local)
    found |= _times(found, place, slices)
    state = sum(found[n] for n in STATE)
    # When the engine gets new weights, both copies are there for a moment, and no step runs. Of a
    # model with adapters these alone are handed over.
    found["engine_next"] = found["engine_weights"] * num_trained(arch) / num_params(arch)
    temps = [found["decode_temp"], found["engine_next"]]
    if apart:  # the weights are also there while they are on their way
        trains = state + max(found["train_temp"], found["engine_next"]) <= chip.hbm
        resident = found["engine_weights"]
    else:
        trains, resident = True, state + found["engine_weights"]
        temps.append(found["train_temp"])
    room = chip.hbm - resident - max(temps)
    found["pages"] = max(0, math.floor(room / found["page"]))
    found["pages_wanted"] = config.engine.pages
    found["fits"] = trains and found["pages"] >= found["pages_wanted"]
    found["advice"] = "" if found["fits"] else _advice(found, place, config)
    found["thin"] = config.advice(batch_shards(made))
    run = found | {"pages": found["pages_wanted"]}
    found |= whole_step(run, arch, config, place, lengths, prompt, problems)
    return found


def _times(found: dict, place: Place, slices: int) -> dict:
    """The least time of a micro-batch. Gradients are added up over `data`, and over the network
    where it joins slices or nodes; a copy of the parameters that lies on several nodes has all of
    its collectives there."""
    chip, sizes = place.chip, place.mesh.shape
    each = place.mesh.size // place.hosts
    copy = sizes["fsdp"] * sizes["sequence"] * sizes["tensor"]
    nodes = not place.compiled and place.hosts > 1
    links, network = found["collectives"], 0.0
    if sizes["data"] > 1 and (slices > 1 or (nodes and copy <= each)):
        between = slices if slices > 1 else sizes["data"]
        network = 2 * found["params"] * (between - 1) / between
    elif not place.compiled and sizes["data"] > 1:
        links += 2 * found["params"] * (sizes["data"] - 1) / sizes["data"]
    if nodes and copy > each:
        links, network = 0.0, network + links
    times = {
        "compute_s": found["flops"] / chip.flops,
        "collective_s": links / chip.link_rate,
        "network": network,
        "network_s": network / place.network,
        "decode_least_s": found["engine_weights"] / chip.hbm_rate,  # every step reads every weight
    }
    least = max(times[name] for name in ("compute_s", "collective_s", "network_s"))
    return times | {"least_s": least}


def report(found: dict) -> str:
    """What `plan` found, as text."""

    def gib(name: str) -> str:
        return f"{found[name] / GIB:10.2f} GiB"

    mesh = ",".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    slices = f", {found['slices']} slices" if found["slices"] > 1 else ""
    if found["rollout"]:
        mesh += f" to train and {found['rollout']} chips to roll out"
    how = "compiled" if found["compiled"] else "arithmetic"
    lines = [
        f"{found['model']}, {found['stage']}, {found['topology']}{slices}, mesh {mesh}; per chip:",
        f"  parameters (float32)        {gib('params')}",
        *([f"  frozen base (lora)          {gib('base')}"] if found["base"] else []),
        f"  optimizer                   {gib('optimizer')}",
        *([f"  reference (kl)              {gib('reference')}"] if found["reference"] else []),
        f"  engine's copy of weights    {gib('engine_weights')}",
        f"  train step: gradients, activations {gib('train_temp')[3:]} ({how})",
        f"  decode step                 {gib('decode_temp')} ({how})",
        f"  memory                      {gib('hbm')}",
        f"  KV pages that fit           {found['pages']:10,} of {found['page_tokens']} tokens, "
        f"{found['page'] / 2**20:.1f} MiB each; the config wants {found['pages_wanted']:,}",
        f"  micro-batch of {found['micro_batch']} rows of {found['row_len']} tokens:",
        f"    FLOPs                     {found['flops'] / 1e12:10.1f} TFLOP "
        f"(at least {found['compute_s']:.2f} s)",
        f"    collectives               {gib('collectives')} ({how}; at least "
        f"{found['collective_s']:.2f} s)"
        if found["collectives"] or not found["compiled"]
        else "    collectives               not known: the compiler found no room for the step",
    ]
    if found["network"]:
        lines.append(
            f"    between slices or nodes   {gib('network')} (at least {found['network_s']:.2f} s)"
        )
    lines += [
        f"  decode step: at least {found['decode_least_s'] * 1e3:.2f} ms, "
        f"{found['rollout_hosts']} hosts with {found['replicas']} replicas of {found['lanes']} "
        "lanes each",
        *_whole(found),
        "It fits." if found["fits"] else f"It does not fit: {found['advice']}.",
    ]
    return "\n".join(lines)


def _whole(found: dict) -> list[str]:
    """The lines on a whole step; all of it is arithmetic on the figures above."""
    beta = found["stage"] == "beta"
    whole = "round of sampling, and training on it" if beta else "step"
    idle = f"; {found['idle_replicas']} replicas have no answer" if found["idle_replicas"] else ""
    total = "?" if found["steps"] is None else f"{found['steps']:,.0f}"
    lines = [
        f"  a whole {whole} (arithmetic, at least):",
        f"    prefill                   {found['prefill_s']:10.1f} s",
        f"    decoding                  {found['decode_s']:10.1f} s for "
        f"{found['rollout_tokens']:,} tokens, a step of {found['decode_bytes'] / GIB:.2f} GiB "
        f"({found['decode_counted']}) beside the keys{idle}",
        f"    training                  {found['train_s']:10.1f} s, "
        f"{found['micro_batches']} micro-batches"
        + (" an optimizer step" if beta else f" for {sum(found['rows'])} rows"),
        f"    hand-over of weights      {found['handover_s']:10.2f} s",
        f"    together                  {found['step_s']:10.1f} s: "
        + (
            f"the longer of rollouts, on {found['rollout']} chips of their own, and training"
            if found["rollout"]
            else "rollouts, hand-over and training come one after another"
        ),
        f"  a checkpoint of {found['checkpoint_bytes'] / GIB:.1f} GiB: "
        f"{found['checkpoint_copy_s']:.1f} s to the hosts at {HOST_RATE / 1e9:.0f} GB/s a chip, "
        f"{found['checkpoint_write_s']:.0f} s to disk at {DISK_RATE / 1e9:.0f} GB/s a host, beside "
        f"the next steps; the run waits {found['checkpoint_wait_s']:.1f} s",
        f"  disk                        {found['disk'] / GIB:10.1f} GiB for checkpoints and model",
    ]
    if "hours" in found:
        lines.append(
            f"  {total} {'rounds' if beta else 'steps'}: at least {found['hours']:.1f} hours"
        )
    else:
        lines.append("  hours: say with --problems how many the file has")
    if found["thin"]:
        lines.append(f"  {found['thin']}")
    return lines


def _reference_bytes(params, config: RLConfig | BetaConfig) -> int:
    """Of the copy of the parameters from which `kl` keeps the policy; with adapters it is the
    base."""
    if config.train.lora:
        return 0
    dtype = jnp.dtype(config.train.compute_dtype)
    return array_bytes(params) * dtype.itemsize // 4 if config.loss.kl else 0


def _advice(found: dict, place: Place, config: RLConfig | BetaConfig) -> str:
    """Which setting to change: that of the largest part."""
    mesh, host = place.mesh, place.local.size
    state = sum(found[name] for name in STATE)
    sizes = {
        "state": state,
        "weights": found["engine_weights"],
        "train": found["train_temp"],
        "decode": found["decode_temp"],
    }
    shares = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in sizes.items())
    # What is resident has to fit before anything is computed.
    resident = state + found["engine_weights"] >= found["hbm"]
    match max(("state", "weights") if resident else sizes, key=sizes.__getitem__):
        case "state":
            what = "make mesh.fsdp larger, which takes more chips (mesh.data should be 1)"
        case "weights":
            what = f"make mesh.tensor larger (sequence x tensor is {host} at most here)"
        case "train" if config.train.remat != "full":
            what = "set train.remat to full"
        case "train" if config.train.micro_rows > 1:
            what = "make train.micro_rows smaller"
        case "train" if mesh.shape["sequence"] * mesh.shape["tensor"] < host:
            what = "make mesh.sequence or mesh.tensor larger"
        case "train":
            what = "make train.row_len (and max_tokens) smaller, or take chips with more memory"
        case _:
            what = "make engine.lanes smaller"
    if state + found["engine_weights"] + max(sizes["train"], sizes["decode"]) < found["hbm"]:
        return f"{found['pages']:,} pages fit: set engine.pages to that, or {what} ({shares})"
    return f"{what} ({shares})"
