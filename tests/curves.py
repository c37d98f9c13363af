"""Golden curves: the first optimizer steps of the tiny model on texts that lie beside them.

    python tests/curves.py        writes tests/data/curves/*.json anew

A file holds its texts and what every step measured. `sft` is supervised training as stage Beta
does it; `papo` has rollouts that are fixed, with their advantages. Without log-probs of a sampler
its `logp_gap` is the mean of -log p.
"""

import json
import random
import tempfile
from pathlib import Path

from train_toy import example, problem, tiny

from npr_jax.runs.metrics import read_metrics
from npr_jax.train.fit import FitConfig, fit
from npr_jax.train.objective import Objective
from npr_jax.train.optimizer import OptimizerConfig, learning_rate, new_state
from npr_jax.train.packing import make_rows
from npr_jax.train.step import TrainConfig, optimize

FOLDER = Path(__file__).parent / "data" / "curves"
NAMES = ("sft", "papo")
RL_STEPS = 4
OPTIMIZER = OptimizerConfig(
    learning_rate=4e-3,
    schedule="cosine",
    final_learning_rate=4e-4,
    warmup=3,
    weight_decay=0.1,
    clip=0.5,  # below the norm of most steps
)
TRAIN = TrainConfig(OPTIMIZER, row_len=256, micro_rows=2)
FIT = FitConfig(TRAIN, batch=8, steps=20)


def make_data(name: str) -> list:
    """Texts of a curve: [prompt, response] for `sft`; groups of [prompt, response,
    advantage] for `papo`."""
    rng = random.Random(7)
    if name == "sft":
        return [problem(rng, groups=2)[:2] for _ in range(32)]
    groups = []
    for _ in range(4):
        prompt = problem(rng)[0]
        responses = [problem(rng, rng.choice((1, 2)))[1] for _ in range(3)]
        advantages = [round(rng.uniform(-2, 2), 2) for _ in responses]
        groups.append([[prompt, *pair] for pair in zip(responses, advantages, strict=True)])
    return groups


def measure(name: str, data: list, directory: Path) -> list[dict[str, float]]:
    """What every step measures, times left out; `directory` is for the files of a run."""
    model = tiny()
    if name == "sft":
        fit(model, [example(model, *texts) for texts in data], FIT, directory)
        return [
            {key: line[key] for key in ("step", "loss", "grad_norm", "learning_rate", "entropy")}
            for line in read_metrics(directory)
        ]
    # Smaller logits: an untrained model is as sure of itself as no model that samples.
    params = model.params | {"final_norm": 0.1 * model.params["final_norm"]}
    groups = [
        [example(model, prompt, response, advantage=a) for prompt, response, a in group]
        for group in data
    ]
    rows = make_rows(groups, TRAIN.row_len, depth=3)
    state, history = new_state(params, OPTIMIZER), []
    for step in range(RL_STEPS):
        rate = learning_rate(OPTIMIZER, step, FIT.steps)
        state, metrics = optimize(state, rows, model.config, TRAIN, Objective(name), rate)
        history.append({"step": step + 1} | metrics)
    return history


def read(name: str) -> dict:
    """A golden file: {"data": `make_data`'s, "steps": `measure`'s}."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def main() -> None:
    for name in NAMES:
        data = make_data(name)
        with tempfile.TemporaryDirectory() as directory:
            steps = measure(name, data, Path(directory))
        lines = [
            f' "{key}": [\n' + ",\n".join(f"  {json.dumps(x)}" for x in values) + "\n ]"
            for key, values in (("data", data), ("steps", steps))
        ]
        FOLDER.mkdir(parents=True, exist_ok=True)
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")
        print(f"{name}: {len(steps)} steps, loss {steps[0]['loss']:.4f} to {steps[-1]['loss']:.4f}")


if __name__ == "__main__":
    main()
