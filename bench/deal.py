"""Says how full the rows of an optimizer step are, before and after dealing, from lengths alone.

    python bench/deal.py --processes 4 --stage papo [--model tiny] [--devices 4]

Prints one JSON line with means over rollout batches whose lengths are drawn from log-normal
distributions with the sizes of the preset: `slot_use`, tokens over slots; `undealt`, the same where
every process packs its own groups into rows of `row_len` and all run as many micro-batches as the
fullest; `best_packing`, a bound that no packing passes; `rows`, rows of tokens a shard and
minibatch; `shapes`, how often a micro-batch of [rows, row length] runs.
"""

import argparse
import json
from collections import Counter

import numpy as np

from npr_jax.plan.plan import stage_config
from npr_jax.train.deal import Item, deal, least_slots, used_tokens
from npr_jax.train.packing import best_fit
from npr_jax.train.rl import RLConfig

BATCHES = 4  # rollout batches
# Medians of prompt and response in tokens, and the spread of the responses' logarithm within a
# group and between groups.
LENGTHS = {"tiny": (12, 75, 0.25, 0.25), "qwen3-4b": (120, 5500, 0.5, 0.6)}


def rollout(config: RLConfig, model: str, processes: int, rng) -> list[list[Item]]:
    """The examples of a rollout batch, by minibatch."""
    prompt, response, within, between = LENGTHS[model]
    parts: list[list[Item]] = [[] for _ in range(config.minibatches)]
    for group in range(config.prompts):
        prompt_len = min(config.max_prompt_tokens, int(prompt * rng.lognormal(0.0, 0.5)) + 1)
        typical = response * rng.lognormal(0.0, between)
        for size in typical * rng.lognormal(0.0, within, config.samples):
            size = min(config.max_tokens, int(size) + 1)
            pairs = size * prompt_len + size * (size + 1) // 2
            item = Item(group % processes, group, prompt_len, size, pairs)
            parts[group % config.minibatches].append(item)
    return parts


def undealt(items: list[Item], config: RLConfig, processes: int, shards: int) -> tuple[int, int]:
    """Tokens and slots where every process packs its own groups."""
    row_len, tokens, used = config.train.row_len, 0, 1
    size = config.train.micro_rows * shards // processes
    for process in range(processes):
        rows: list[list[int]] = []
        for part_len in (row_len, row_len // 2):
            documents = []
            for group in {item.group for item in items if item.process == process}:
                members = [item for item in items if item.group == group]
                sizes = [item.response for item in members]
                room = max(part_len - members[0].prompt, *sizes)
                for part in best_fit(sizes, room):
                    documents.append(members[0].prompt + sum(sizes[i] for i in part))
            found = [[documents[i] for i in row] for row in best_fit(documents, row_len)]
            rows = min((rows or found, found), key=len)
        tokens += sum(map(sum, rows))
        used = max(used, -(-len(rows) // size))
    return tokens, used * size * processes * row_len


def measure(stage: str, model: str, processes: int, devices: int, changes: list[str]) -> dict:
    """What is printed."""
    config = stage_config(stage, "tiny" if model == "tiny" else model, changes)
    assert isinstance(config, RLConfig)
    train, shards, rng = config.train, processes * devices, np.random.default_rng(0)
    allowed = train.shapes(None)
    run, sums = Counter(), np.zeros(6)
    for _ in range(BATCHES):
        for items in rollout(config, model, processes, rng):
            dealt = deal(items, shards, processes, allowed)
            run.update(part.shape for part in dealt)
            tokens, slots = undealt(items, config, processes, shards)
            sums += (
                used_tokens(items, dealt),
                sum(part.slots for part in dealt),
                tokens,
                slots,
                least_slots(items, shards, train.row_len),
                least_slots(items, 1, 10**9),
            )
    number = BATCHES * config.minibatches
    return {
        "stage": stage,
        "model": model,
        "processes": processes,
        "shards": shards,
        "slot_use": round(sums[0] / sums[1], 4),
        "undealt": round(sums[2] / sums[3], 4),
        "best_packing": round(sums[5] / sums[4], 4),
        "rows": round(sums[0] / number / shards / train.row_len, 2),
        "shapes": {f"{rows}x{length}": times for (rows, length), times in sorted(run.items())},
    }


def main() -> None:
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--stage", choices=("zero", "papo"), required=True)
    parser.add_argument("--model", choices=tuple(LENGTHS), default="qwen3-4b")
    parser.add_argument("--devices", type=int, default=4, help="parts of the batch of a process")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes")
    args = parser.parse_args()
    print(json.dumps(measure(args.stage, args.model, args.processes, args.devices, args.changes)))


if __name__ == "__main__":
    main()
