"""`npr-jax demo`: a tiny model goes through the three stages, and then thinks in parallel.

    teacher -> seed model -> Zero -> Beta (from the seed, on Zero's answers) -> PAPO

Everything is made here and now from a task (task.py) and the seed: problems, weights, answers,
table and report. A run that was interrupted goes on where it stopped.
"""

import dataclasses
import json
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from npr_jax.answers import equal, extract
from npr_jax.base.config import dump_config, load_config
from npr_jax.base.files import json_text, read_text, write_atomically
from npr_jax.data.problems import Problem
from npr_jax.data.prompts import prompt_ids
from npr_jax.decode import Engine
from npr_jax.demo.page import write_page
from npr_jax.demo.table import MODES, NO_MORE, evaluate, shortfalls, table
from npr_jax.demo.task import Posed, Task, find_task, name_of
from npr_jax.evaluate.judge import Answer
from npr_jax.evaluate.traces import Trace, make_trace, read_traces, write_traces
from npr_jax.model.params import init_params
from npr_jax.model.pretrained import Model, load, save
from npr_jax.model.tokenizer import demo_tokenizer
from npr_jax.report import html
from npr_jax.report.svg import draw_tree
from npr_jax.runs.directory import alone_in, claim
from npr_jax.train import beta, fit, papo, zero
from npr_jax.train.packing import Example, loss_mask
from npr_jax.train.rollout import STAGES
from npr_jax.tree import TagIds, layout
from npr_jax.tree.format import check_format

TRAIN_PROBLEMS, EVAL_PROBLEMS = 4096, 512
SHOWN = 48  # answers of each row of the table that the report's viewer has


def run(task: str, seed: int, output: Path, check: bool = False) -> int:
    """Runs the demo of a task (`find_task`) into `output`; 1 if `check` is set and a result falls
    short, else 0."""
    found = find_task(task)
    with alone_in(output):
        return _run(found, seed, output, check)


def _run(task: Task, seed: int, output: Path, check: bool) -> int:
    console, begun = Console(), time.monotonic()
    output = claim(output, f"task: {name_of(task)}\nseed: {seed}\n{dump_config(task.FIT)}")
    problems = make_problems(task, seed, output)
    if not (output / "scripted.jsonl").exists():
        make_script(task, seed, output, problems)
    overrides = {
        stage: [f"seed={seed}", *_paths(task, stage, output), *task.SETTINGS.get(stage, ())]
        for stage in STAGES
    }
    of_zero = load_config(zero.ZeroConfig, "tiny_zero", overrides["zero"])
    of_beta = load_config(beta.BetaConfig, "tiny_beta", overrides["beta"])
    of_papo = load_config(papo.PapoConfig, "tiny_papo", overrides["papo"])
    results = _Results(output / "results.json")
    for stage, what, make in (
        (
            "seed",
            "learns from an imperfect teacher",
            lambda: make_seed(task, seed, output, problems),
        ),
        ("zero", "finds the format: DAPO on sequential answers", lambda: zero.run(of_zero)),
        ("beta", "learns branches from Zero's best answers", lambda: beta.run(of_beta)),
        ("papo", "learns from its parallel answers", lambda: papo.run(of_papo)),
    ):
        console.print(f"\n[bold]{stage}[/] {what}")
        if not (output / stage / "final" / "config.json").exists():
            start = time.monotonic()
            make()
            html.write(output / stage)
            results.seconds[stage] = time.monotonic() - start
        for mode in MODES:
            name = f"{stage} {mode}"
            traces = output / f"traces/{stage}.{mode}.jsonl"
            if name not in results.rows or not traces.exists():
                model = load(output / stage / "final")
                row, shown = measure(model, mode, problems, of_zero, seed, task.COLUMNS)
                write_traces(traces, shown)
                results.add(name, row)
            row = results.rows[name]
            console.print(
                f"  {name}: format {row['format']:.2f}, accuracy {row['accuracy']:.2f}, "
                f"tokens {row['tokens']:.0f}, critical path {row['critical_path']:.0f}"
            )

    shown = next(read_traces(output / "traces/papo.parallel.jsonl"))
    configs = {"seed model": task.FIT, "zero": of_zero, "beta": of_beta, "papo": of_papo}
    settings = {stage: dump_config(config) for stage, config in configs.items()}
    write_page(output, task.ABOUT, results.rows, shown, settings, results.seconds)
    console.print(table(results.rows, EVAL_PROBLEMS))
    tree = draw_tree(shown.pieces, shown.layout)
    console.print(tree, highlight=False, markup=False, emoji=False)
    missing = shortfalls(results.rows, task.CHECKS)
    console.print(f"\n{(time.monotonic() - begun) / 60:.1f} minutes. Report: {output}/index.html")
    for line in missing:
        console.print(f"[red]falls short[/] {line}")
    if check and not missing:
        console.print("All checks hold.")
    return 1 if check and missing else 0


def make_problems(task: Task, seed: int, output: Path) -> list[Problem]:
    """The problems to evaluate on; those to train on, which differ, go to problems.jsonl."""
    held_out = task.draw(EVAL_PROBLEMS, np.random.default_rng((seed, 2)))
    drawn = task.draw(TRAIN_PROBLEMS, np.random.default_rng((seed, 1)), held_out)
    _write_lines(output / "problems.jsonl", map(_line, drawn))
    return [Problem(one.problem, one.answer, one.level) for one in held_out]


def make_script(task: Task, seed: int, output: Path, held_out: Collection[Posed]) -> None:
    """Writes scripted.jsonl: right and well-formed answers of the teacher to problems of the lowest
    level, for a cold start (configs/tiny_cold.yaml)."""
    tokenizer: Any = demo_tokenizer(task.SYMBOLS)
    tags, end = TagIds.from_tokenizer(tokenizer), tokenizer.eos_token_id
    rng, teacher = np.random.default_rng((seed, 6)), task.Teacher(seed)
    drawn = task.draw(TRAIN_PROBLEMS, rng, held_out)
    lowest = min(one.level for one in drawn)
    lines = []
    for one in (one for one in drawn if one.level == lowest):
        text = teacher.answer(one, rng)
        formed = not check_format([*tokenizer.encode(text), end], 0, tags)
        if formed and task.check(extract(text) or "", one.answer):
            lines.append(_line(one) | {"response": text})
    _write_lines(output / "scripted.jsonl", lines)


def _line(one: Posed) -> dict[str, Any]:
    return {"problem": one.problem, "answer": one.answer, "level": one.level}


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def measure(
    model: Model,
    mode: str,
    problems: Sequence[Problem],
    config: zero.ZeroConfig,
    seed: int,
    columns: Mapping[str, str] = NO_MORE,
) -> tuple[dict[str, float], list[Trace]]:
    """A row of the table, and answers to look at, the one that is worth showing most first."""
    prompts = [prompt_ids(model.tokenizer, problem.problem) for problem in problems]
    engine = Engine(model, config.engine)
    parallel = mode == "parallel"
    row, answers = evaluate(
        engine, problems, prompts, parallel, config.max_tokens, seed, config.check, columns
    )
    best = max(range(len(answers)), key=lambda i: _worth_showing(answers[i]))
    chosen = [best, *(i for i in range(min(SHOWN, len(answers))) if i != best)]
    return row, [
        make_trace(answers[i], model.tokenizer, problems[i], id=f"problem {i}") for i in chosen
    ]


def make_seed(task: Task, seed: int, output: Path, held_out: Collection[Posed]) -> None:
    """Trains the seed model on the teacher's answers, as plain text."""
    model = seed_model(task, seed)
    rng, teacher = np.random.default_rng((seed, 3)), task.Teacher(seed)
    examples = []
    for one in task.lessons(task.FIT.steps * task.FIT.batch, rng, held_out):
        prompt = prompt_ids(model.tokenizer, one.problem)
        text = teacher.answer(one, rng)
        ids = [*prompt, *model.tokenizer.encode(text), model.tokenizer.eos_token_id]
        tree = layout(len(ids), prompt_len=len(prompt))
        examples.append(Example(np.array(ids, np.int32), tree, loss_mask(tree)))
    trained = fit.fit(model, examples, task.FIT, output / "seed", seed, "seed")
    save(trained, output / "seed" / "final")


def seed_model(task: Task, seed: int) -> Model:
    """A model with random weights that has the words of a task."""
    tokenizer = demo_tokenizer(task.SYMBOLS)
    config = dataclasses.replace(task.MODEL, vocab_size=len(tokenizer))
    params = init_params(config, jax.random.key(seed))
    return Model(config, params, tokenizer, TagIds.from_tokenizer(tokenizer))


def _paths(task: Task, stage: str, output: Path) -> list[str]:
    """The overrides of a stage: its files go under `output`, and rows have one length."""
    before = {"zero": "seed", "beta": "seed", "papo": "beta"}[stage]
    values = {
        "model": str(output / before / "final"),
        "problems": str(output / "problems.jsonl"),
        "output": str(output / stage),
    }
    if stage == "beta":
        values["sampler_model"] = str(output / "zero" / "final")
    if task.check is not equal:
        values["checker"] = task.__name__
    # Its steps are short against compiling one.
    short = "fit.train.row_lengths=1" if stage == "beta" else "train.row_lengths=1"
    return [short, *(f"{key}={json.dumps(value)}" for key, value in values.items())]


def _worth_showing(answer: Answer) -> tuple:
    figures = answer.figures
    return figures.correct and figures.formed, figures.branches, figures.tokens


class _Results:
    """Rows and times that are kept from run to run in one JSON file."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[str, dict] = {}
        self.seconds: dict[str, float] = {}
        if path.exists():
            try:
                kept = json.loads(read_text(path, "results.json of a demo"))
                self.rows, self.seconds = dict(kept["rows"]), dict(kept["seconds"])
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path} is no results.json of a demo ({error!r}): remove it, and the demo "
                    "measures again"
                ) from error

    def add(self, name: str, row: dict) -> None:
        self.rows[name] = row
        content = {"rows": self.rows, "seconds": self.seconds}
        write_atomically(self.path, json_text(content, indent=1).encode())
