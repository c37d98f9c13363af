"""A whole step of a stage, from what its programs take: rollouts, training, and what is around.

    lengths --> rollouts: prefill, then decode steps until the last replica is done
            --> rows --> micro-batches --> training
    hand-over of the weights, checkpoint; disk; hours for all steps

All of it is arithmetic: the least time that memory, products and links need, at the vendors'
figures. What is measured will be more.
"""

import heapq
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from npr_jax.model import ModelConfig, num_params
from npr_jax.plan.arithmetic import num_trained, prefill_flops, token_flops
from npr_jax.plan.places import Place
from npr_jax.train.beta import BetaConfig
from npr_jax.train.packing import best_fit
from npr_jax.train.rl import RLConfig

DISK_RATE = 1e9  # bytes/s that a host writes to where checkpoints go; an assumption
HOST_RATE = 10e9  # bytes/s from a chip to its host; an assumption


def read_lengths(text: str, number: int, most: int) -> list[int]:
    """That many lengths of answers, none longer than `most` tokens, spread evenly over a
    distribution.

    Args:
      text: "max"; "500,2000,8000", each as often as the others; "lognormal:MEDIAN:SIGMA"; or a file
        of numbers, one a line or with commas.

    Raises ValueError for other texts, FileNotFoundError where there is no such file.
    """
    shares = [(i + 0.5) / number for i in range(number)]
    if text == "max":
        return [most] * number
    if text.startswith("lognormal:"):
        try:
            median, sigma = map(float, text.split(":")[1:])
            normal = statistics.NormalDist(math.log(median), sigma)
            found = [math.exp(normal.inv_cdf(share)) for share in shares]
            if any(map(math.isnan, found)):
                raise ValueError("nan is no length")
        except (ValueError, OverflowError, statistics.StatisticsError) as error:
            raise ValueError(
                f"lengths is {text!r}, needed is lognormal:MEDIAN:SIGMA, as lognormal:4000:0.8"
            ) from error
    else:
        given = text.replace(",", "\n")
        if not all(part.strip().isdigit() for part in given.splitlines()):
            given = Path(text).read_text(encoding="utf-8").replace(",", "\n")
        try:
            known = sorted(float(line) for line in given.splitlines() if line.strip())
            if not known or not all(length >= 1 for length in known):  # NaN is not
                raise ValueError("a length is 1 or more")
        except ValueError as error:
            raise ValueError(
                f"lengths is {text!r}, needed are numbers of tokens, one a line or with commas"
            ) from error
        found = [known[int(share * len(known))] for share in shares]
    return [max(1, min(most, round(length))) for length in found]


def rows_of(groups: Sequence[Sequence[int]], prompt: int, row_len: int) -> int:
    """Rows that answers of these lengths fill, group by group behind a prompt that they share: as
    `packing.make_rows` lays them out, by their lengths alone."""

    def lay(part: int) -> int:
        documents = []
        for group in groups:
            bins = best_fit(group, max(part - prompt, *group))
            documents += [prompt + sum(group[i] for i in members) for members in bins]
        return len(best_fit(documents, row_len))

    return min(lay(row_len), lay(row_len // 2))


def rollout_seconds(
    found: dict, arch: ModelConfig, place: Place, lengths: Sequence[int], prompts: int, prompt: int
) -> dict:
    """The least time to sample answers of these lengths: their prompts are prefilled once on each
    replica, and the answers dealt to the replicas by their lengths; a replica decodes as many at a
    time as it has lanes and pages for, and a decode step takes as long as memory, products or links
    need, whichever is most, for the lanes at work."""
    chips = place.local.shape["tensor"]
    replicas = found["replicas"] * place.rollout_hosts
    shares: list[list[int]] = [[] for _ in range(replicas)]
    loads = [(0, number) for number in range(replicas)]
    for length in sorted(lengths, reverse=True):
        load, number = heapq.heappop(loads)
        shares[number].append(length)
        heapq.heappush(loads, (load + length, number))
    each = min(prompts, max(map(len, shares)))  # prompts that a replica answers, at most
    prefill = each * prefill_flops(arch, prompt) / (chips * place.chip.flops)
    seconds = [_decode(found, arch, place, share, prompt) for share in shares if share]
    busy = [len(share) for share in shares if share]
    return {
        "prefill_s": prefill,
        "decode_s": max(seconds),
        "rollout_s": prefill + max(seconds),
        "idle_replicas": replicas - len(busy),
        "rollout_tokens": sum(lengths),
    }


def _decode(found, arch: ModelConfig, place: Place, lengths: list[int], prompt: int) -> float:
    """Seconds for a replica: the next answer begins where one has ended."""
    chip, chips = place.chip, place.local.shape["tensor"]
    entry = found["page"] / found["page_tokens"]
    room = found["pages"] * found["page_tokens"]
    waiting, active, seconds, now = sorted(lengths, reverse=True), [], 0.0, 0
    held = kept = 0  # tokens that will be held at most; sum of the steps at which answers began
    while waiting or active:
        while waiting and len(active) < found["lanes"]:
            if active and held + prompt + waiting[0] > room:
                break
            length = waiting.pop(0)
            held += prompt + length
            kept += now
            heapq.heappush(active, (now + length, length, now))
        end = active[0][0]
        steps, width = end - now, len(active)
        seen = width * (prompt + (now + end) / 2) - kept  # keys, in the middle of these steps
        memory = (found["decode_bytes"] + seen * entry) / chip.hbm_rate
        attention = 4 * arch.num_layers * arch.num_heads * arch.head_dim * seen
        products = (width * token_flops(arch) + attention) / chips / chip.flops
        links = found["decode_collectives"] * width / found["lanes"] / chip.link_rate
        seconds += steps * (max(memory, products) + links)
        now = end
        while active and active[0][0] == now:
            _, length, begun = heapq.heappop(active)
            held -= prompt + length
            kept -= begun
    return seconds


def whole_step(
    found: dict,
    arch: ModelConfig,
    config: RLConfig | BetaConfig,
    place: Place,
    lengths: str = "max",
    prompt: int | None = None,
    problems: int | None = None,
) -> dict:
    """Seconds of the parts of a step, bytes on disk, and hours for all steps.

    Args:
      found: figures of the programs (`plan.plan`).
      lengths: of answers (`read_lengths`).
      prompt: tokens of a prompt; None is the most that there may be.
      problems: that Beta samples; None is what its config says.

    Raises ValueError for lengths that cannot be read.
    """
    if isinstance(config, BetaConfig):
        made = _beta(found, arch, config, place, lengths, prompt, problems)
    else:
        made = _rl(found, arch, config, place, lengths, prompt)
    state = found["params"] + found["optimizer"]
    whole = 4.0 * 3 * num_trained(arch)
    train = config.train
    copies = place.mesh.size // (place.mesh.shape["fsdp"] * place.mesh.shape["tensor"])
    made |= {
        # Each chip receives its part of the engine's weights from those that hold them.
        "handover_s": found["engine_next"] / place.chip.link_rate,
        "checkpoint_bytes": whole,
        "checkpoint_copy_s": state / HOST_RATE,
        "checkpoint_write_s": whole / place.hosts / DISK_RATE,
        # One more is there while it is written, and the model at the end.
        "disk": whole * (train.keep_checkpoints + train.keep_best + 1) + 4.0 * num_params(arch),
        "copies": copies,
    }
    if found["rollout"]:
        made["step_s"] = max(made["rollout_s"], made["train_s"])
    else:
        made["step_s"] = made["rollout_s"] + made["train_s"]
    made["step_s"] += 0 if isinstance(config, BetaConfig) else made["handover_s"]
    saves = made["train_steps"] / train.checkpoint_every
    write = made["checkpoint_write_s"]
    between = made["train_step_s"] * train.checkpoint_every  # while it is written in the background
    made["checkpoint_wait_s"] = made["checkpoint_copy_s"] + max(0.0, write - between)
    if made["steps"]:
        seconds = made["steps"] * made["step_s"] + saves * made["checkpoint_wait_s"]
        made["hours"] = seconds / 3600
    return made


def _rl(found, arch, config: RLConfig, place, lengths: str, prompt: int | None) -> dict:
    prompt = config.max_prompt_tokens if prompt is None else prompt
    number = config.prompts * config.samples
    answers = read_lengths(lengths, number, config.max_tokens)
    # Groups of answers of all lengths, as a problem's are.
    groups = [answers[i :: config.prompts] for i in range(config.prompts)]
    minibatches = min(config.minibatches, config.prompts)
    parts = [groups[i::minibatches] for i in range(minibatches)]
    rows = [rows_of(part, prompt, config.train.row_len) for part in parts]
    training = _training(found, rows, place)
    return {
        **rollout_seconds(found, arch, place, answers, config.prompts, prompt),
        **training,
        "steps": config.steps,
        "train_steps": config.steps,
        "train_step_s": training["train_s"],
    }


def _beta(found, arch, config: BetaConfig, place, lengths, prompt, problems) -> dict:
    """A step is a round of sampling and the optimizer steps on what it accepts, if all problems get
    their answers at the first try; examples are one a row."""
    sample = config.sample
    prompt = sample.max_prompt_tokens if prompt is None else prompt
    answers = read_lengths(lengths, sample.batch, sample.max_tokens)
    rows = rows_of([[length] for length in answers[: config.fit.batch]], prompt, found["row_len"])
    one = _training(found, [rows], place)
    problems = problems or sample.num_problems
    accepted = sample.batch * sample.keep
    epochs = config.fit.epochs or 1.0
    updates = accepted * epochs / config.fit.batch
    return {
        **rollout_seconds(found, arch, place, answers, sample.batch, prompt),
        **one,
        "train_s": one["train_s"] * updates,
        "steps": problems / sample.batch if problems else None,
        "train_steps": (problems or 0) * sample.keep * epochs / config.fit.batch,
        "train_step_s": one["train_s"],
    }


def _training(found: dict, rows: Sequence[int], place: Place) -> dict:
    """Optimizer steps on so many rows each, which are dealt evenly to the parts of the batch."""
    micro = [math.ceil(number / found["micro_batch"]) for number in rows]
    state = found["params"] + found["optimizer"]
    update = 2 * state / place.chip.hbm_rate  # read and written
    slots = sum(micro) * found["micro_batch"]
    return {
        "rows": list(rows),
        "micro_batches": sum(micro),
        "row_use": sum(rows) / slots,
        "train_s": sum(micro) * found["least_s"] + len(micro) * update,
    }
