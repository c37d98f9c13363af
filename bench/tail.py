"""What a batch of answers waits for, and what the options against it save: a simulation.

    python bench/tail.py --median 4000 --sigma 1.0 --max-tokens 30000 --replicas 64 --lanes 16
    python bench/tail.py --run runs/zero --replicas 64 --lanes 16

Lengths are lognormal, cut at `--max-tokens`; `--within` is the part of the variance of their
logarithm that lies between answers to one problem, the rest lies between problems. With `--run`
they are fitted to what the last lines of its metrics.jsonl say of mean length and truncated
answers, and sizes are those of its config.

Time is counted in decode steps of one row; `--row` is what each further row adds to one (0: a step
takes as long whatever its width, as where weights are what is read). Host work, prefill and
training are not in it. One JSON line for the setting, then one for each way to decode: `steps` a
batch, `steps_a_group` that is trained on, `saved` of these against the first line, `lanes_busy`
(rows that drew a token, of all lanes until the batch was over), `wasted` (drawn tokens that are not
trained on), `trained_length` (tokens of an answer that is trained on: the bias) and, where answers
are carried over, how many batches ago a trained token was drawn (`age`).

    prompts      problems are dealt to replicas (as up to 0.1.0)
    answers      answers are dealt, as it is now (decode/deal.py)
    spread       answers are dealt one by one, so that a prompt is computed by as many replicas as
                 can be. No stage does it
    oversample   the same, with this share of problems beyond those needed (train/race.py)
    carry        an answer that has drawn so many tokens in a batch goes on in the next one
                 (train/ask.py)
"""

import argparse
import json
import math
from pathlib import Path
from statistics import NormalDist, mean
from typing import NamedTuple

import numpy as np
import yaml

from npr_jax.decode.deal import deal_answers
from npr_jax.runs.metrics import read_metrics
from npr_jax.train.race import losers

VISIT = 16  # steps between two looks of the host


class Setting(NamedTuple):
    """Sizes of a batch and its decoders; lengths are lognormal (`mu`, `sigma`), at most `most`."""

    prompts: int
    samples: int
    replicas: int
    lanes: int
    mu: float
    sigma: float
    within: float
    most: int
    row: float

    def lengths(self, groups: int, rng: np.random.Generator) -> np.ndarray:
        """i64[groups, samples], the tokens of each answer."""
        between = rng.normal(size=(groups, 1)) * math.sqrt(1 - self.within)
        own = rng.normal(size=(groups, self.samples)) * math.sqrt(self.within)
        found = np.exp(self.mu + self.sigma * (between + own))
        return np.clip(np.rint(found), 1, self.most).astype(np.int64)


class Batch(NamedTuple):
    """What became of a batch: steps it took; of [groups, samples] the tokens drawn, and which
    answers are whole; rows that drew, and rows there were."""

    steps: float
    drawn: np.ndarray
    whole: np.ndarray
    busy: float
    rows: float


def decode(
    setting: Setting, left: np.ndarray, dealt: str, wanted: int | None = None, limit: int = 0
) -> Batch:
    """Decodes answers with `left` i64[groups, samples] tokens to go, to their ends; with `wanted`
    until so many groups have won the race, with `limit` at most so many tokens of each."""
    groups, samples = left.shape
    goal = np.minimum(left, limit) if limit else left
    asked = [group * samples + np.flatnonzero(x) for group, x in enumerate(left)]
    queues: list[list[int]] = [[] for _ in range(setting.replicas)]
    if dealt == "prompts":
        for group, answers in enumerate(asked):
            queues[group % setting.replicas] += answers.tolist()
    elif dealt == "spread":
        for place, answer in enumerate(np.concatenate(asked).tolist()):
            queues[place % setting.replicas].append(answer)
    else:
        parts = deal_answers([len(x) for x in asked], [1] * groups, [0] * setting.replicas)
        queues = [[asked[part.prompt][i] for part in own for i in part.samples] for own in parts]
    longest = max(map(len, queues))
    where = np.full((setting.replicas, longest), -1)
    for queue, row in zip(queues, where, strict=True):
        row[: len(queue)] = queue
    there, drawn = where >= 0, np.zeros((setting.replicas, longest), np.int64)
    ends = np.where(there, goal.reshape(-1)[where], 0)
    given_up = np.zeros_like(there)
    clocks, busy = np.zeros(setting.replicas), 0.0
    while True:
        open_ = there & (drawn < ends) & ~given_up
        if not open_.any():
            break
        at_work = open_ & (np.cumsum(open_, axis=1) <= setting.lanes)
        widths = at_work.sum(axis=1)
        new = np.where(at_work, np.minimum(VISIT, ends - drawn), 0)
        clocks += new.max(axis=1) * np.where(widths, 1 + setting.row * (widths - 1), 0)
        drawn += new
        busy += new.sum()
        if wanted is not None:
            length, unfinished = np.zeros(groups, np.int64), np.zeros(groups, np.int64)
            group_of = where[there] // samples
            np.maximum.at(length, group_of, drawn[there])
            np.add.at(unfinished, group_of, (drawn < ends)[there] & ~given_up[there])
            lost = list(losers(length.tolist(), unfinished.tolist(), wanted))
            given_up |= there & np.isin(where // samples, lost) & (drawn < ends)
    flat = np.zeros(groups * samples, np.int64)
    flat[where[there]] = drawn[there]
    flat = flat.reshape(groups, samples)
    rows = clocks.max() * setting.lanes * setting.replicas
    return Batch(float(clocks.max()), flat, flat == left, busy, rows)


def once(setting: Setting, lengths: np.ndarray, dealt: str, wanted: int | None) -> dict:
    """Figures of a batch that ends with its answers."""
    batch = decode(setting, lengths, dealt, wanted)
    longest = np.where(batch.whole, lengths, np.iinfo(np.int64).max).max(axis=1)
    groups = np.argsort(longest, kind="stable")[: wanted or len(lengths)]
    trained = int(lengths[groups].sum())
    return {
        "steps": batch.steps,
        "groups": len(groups),
        "busy": batch.busy,
        "rows": batch.rows,
        "drawn": int(batch.drawn.sum()),
        "trained": trained,
        "answers": len(groups) * setting.samples,
    }


def carried(setting: Setting, limit: int, batches: int, rng: np.random.Generator) -> list[dict]:
    """Figures of batches in a row, each of which takes up what the one before has left. The first
    ones, in which there is less to carry than later, are left out."""
    found = []
    lengths = np.zeros((0, setting.samples), np.int64)
    left, ages = lengths, np.zeros_like(lengths)
    warm = math.ceil(setting.most / limit)
    for number in range(warm + batches):
        new = setting.lengths(setting.prompts, rng)
        lengths, left = np.concatenate([lengths, new]), np.concatenate([left, new])
        ages = np.concatenate([ages, np.zeros_like(new)])
        batch = decode(setting, left, "answers", limit=limit)
        left = left - batch.drawn
        over = (left == 0).all(axis=1)
        if number >= warm:
            found.append(
                {
                    "steps": batch.steps,
                    "groups": int(over.sum()),
                    "busy": batch.busy,
                    "rows": batch.rows,
                    "drawn": int(lengths[over].sum()),
                    "trained": int(lengths[over].sum()),
                    "answers": int(over.sum()) * setting.samples,
                    "aged": float(ages[over].sum()),
                }
            )
        # A token waits for the last answer of its group.
        ages = ages + (lengths - left)
        lengths, left, ages = lengths[~over], left[~over], ages[~over]
    return found


def _a_group(found: list[dict]) -> float:
    return sum(one["steps"] for one in found) / sum(one["groups"] for one in found)


def line(way: str, value: float, found: list[dict], first: float) -> dict:
    """The means of some batches as one line; `first`: steps a group to compare with."""
    total = {key: sum(one[key] for one in found) for key in found[0]}
    a_group = _a_group(found)
    made = {
        "decode": way,
        "value": value,
        "steps": round(mean(one["steps"] for one in found), 1),
        "steps_a_group": round(a_group, 1),
        "saved": round(1 - a_group / first, 4),
        "lanes_busy": round(total["busy"] / total["rows"], 4),
        "wasted": round(1 - total["trained"] / total["drawn"], 4),
        "trained_length": round(total["trained"] / total["answers"], 1),
    }
    if "aged" in total:
        made["age"] = round(total["aged"] / total["trained"], 3)
    return made


def simulate(
    setting: Setting, oversample: list[float], carry: list[int], batches: int, seed: int
) -> list[dict]:
    """The lines of all ways to decode, for the same lengths."""
    ways: list[tuple[str, float]] = [("prompts", 0), ("answers", 0), ("spread", 0)]
    ways += [("oversample", share) for share in oversample]
    lines, first = [], 0.0
    for way, share in ways:
        rng, found = np.random.default_rng(seed), []
        for _ in range(batches):
            lengths = setting.lengths(4 * setting.prompts, rng)  # as many for all, to compare
            asked = setting.prompts + math.ceil(share * setting.prompts)
            dealt = "answers" if way == "oversample" else way
            wanted = setting.prompts if asked > setting.prompts else None
            found.append(once(setting, lengths[:asked], dealt, wanted))
        first = first or _a_group(found)
        lines.append(line(way, share, found, first))
    for limit in carry:
        found = carried(setting, limit, batches, np.random.default_rng(seed))
        lines.append(line("carry", limit, found, first))
    return lines


def fit(average: float, cut: float, most: int) -> tuple[float, float]:
    """(mu, sigma) of the lognormal lengths of which a share `cut` reaches `most`, and which have
    that average once they are cut there.

    Raises ValueError where there is none.
    """
    if not 0 < cut < 1:
        raise ValueError(f"truncated is {cut}, needed is more than 0: give --median and --sigma")
    normal = NormalDist()
    z = normal.inv_cdf(1 - cut)

    def of(sigma: float) -> float:
        mu = math.log(most) - sigma * z
        below = math.exp(mu + sigma**2 / 2) * normal.cdf(z - sigma)
        return below + most * cut

    low, high = 1e-3, 1e-3
    while of(high) > average:
        high += 0.01
        if high > 5:
            raise ValueError(
                f"no lognormal has a mean of {average:g} tokens and a share of {cut:g} that "
                f"reaches {most}: give --median and --sigma"
            )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if of(middle) > average else (low, middle)
    return math.log(most) - high * z, high


def read_run(directory: Path) -> dict:
    """mu, sigma, most, prompts and samples of a run of Zero or PAPO."""
    config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    lines = [one for one in read_metrics(directory) if "critical_path" in one][-20:]
    if not lines:
        raise ValueError(f"{directory}/metrics.jsonl has no line with a critical_path")
    average = mean(float(one["critical_path"]) for one in lines)
    cut = mean(float(one["truncated"]) for one in lines)
    mu, sigma = fit(average, cut, config["max_tokens"])
    sizes = {name: config[name] for name in ("prompts", "samples")}
    return sizes | {"mu": mu, "sigma": sigma, "most": config["max_tokens"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, help="directory of a run of Zero or PAPO")
    parser.add_argument("--median", type=float, default=4000, help="tokens")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of lengths")
    parser.add_argument("--within", type=float, default=0.5, help="share of sigma^2 in a group")
    parser.add_argument("--max-tokens", type=int, default=30000)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--replicas", type=int, default=64, help="of all processes together")
    parser.add_argument("--lanes", type=int, default=16, help="of a replica")
    parser.add_argument("--row", type=float, default=0.0, help="what a row adds to a step")
    parser.add_argument("--oversample", type=float, nargs="*", default=[0.25, 0.5, 1.0])
    parser.add_argument("--carry", type=int, nargs="*", default=[4096, 8192])
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if any(not 0 < share <= 3 for share in args.oversample):
        parser.error(f"--oversample is {args.oversample}, needed are shares above 0, at most 3")
    known = {
        "mu": math.log(args.median),
        "sigma": args.sigma,
        "most": args.max_tokens,
        "prompts": args.prompts,
        "samples": args.samples,
    }
    known |= read_run(args.run) if args.run else {}
    sizes = {name: getattr(args, name) for name in ("replicas", "lanes", "within", "row")}
    setting = Setting(**known, **sizes)
    print(json.dumps(setting._asdict() | {"batches": args.batches, "seed": args.seed}))
    for made in simulate(setting, args.oversample, args.carry, args.batches, args.seed):
        print(json.dumps(made), flush=True)


if __name__ == "__main__":
    main()
