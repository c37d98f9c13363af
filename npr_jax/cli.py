"""The command line: one verb, one function. Heavy modules are imported when a verb runs."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from npr_jax.base.files import DEMO, describe, lasting, read_text

LEFT_OUT = 4  # exit code of `generate`: done, but for lines that are no requests

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
data = typer.Typer(help="Data sets of problems.", no_args_is_help=True)
app.add_typer(data, name="data")

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file or name of a preset.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Override a key of the config; repeatable."),
]
Output = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Run directory, in place of the config's.")
]
Start = Annotated[
    str | None,
    typer.Option("--from", metavar="RUN@STEP", help="Begin with a checkpoint of another run."),
]
Instruction = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Replaces the instruction's text.")
]
Distributed = Annotated[
    bool, typer.Option("--distributed", help="One of several processes (docs/launch.md).")
]


def main() -> None:
    """Entry point of `npr-jax`: an error that a user can mend is one line, and an exit code."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it asks for PyTorch
    for stream in (sys.stdout, sys.stderr):  # a console may lack the characters of an answer
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="npr-jax")
    except SystemExit as ending:
        if not isinstance(ending.code, int) or ending.code not in (_TERMINATED, _INTERRUPTED):
            raise
        # All is saved. The interpreter's own clean-up can crash while the device still computes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ending.code)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(_tell(error))


# The exit codes of runs/sigterm.py, whose import would make `--help` wait for JAX.
_TERMINATED, _INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT


@contextlib.contextmanager
def _interruptible(kept: str) -> Iterator[None]:
    """Ctrl-C in here ends the command with one line, which says what is kept. A stage that has
    begun sees to that itself (runs/sigterm.py)."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"interrupted: {kept}; the same command goes on", err=True)
        raise SystemExit(_INTERRUPTED) from None


def _tell(error: BaseException) -> int:
    """Prints an error; 2 where the same command would fail again, 1 where it may not."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        typer.echo(f"error: {describe(error)}", err=True)
        return 2 if lasting(error) else 1
    traceback.print_exception(error)
    return 1


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"npr-jax {importlib.metadata.version('npr_jax')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it and end.")
    ] = False,
) -> None:
    """Native Parallel Reasoner in JAX: train a model to reason in parallel, and decode it so."""


@app.command()
def zero(
    config: Config,
    overrides: Overrides = None,
    output: Output = None,
    start: Start = None,
    distributed: Distributed = False,
) -> None:
    """Stage 1: DAPO on sequential answers teaches the format.

    Run again with the same arguments, it goes on where it stopped.
    """
    from npr_jax.train.zero import ZeroConfig, run

    with _stage(ZeroConfig, config, overrides, output, distributed, start) as settings:
        run(settings)


@app.command()
def beta(
    config: Config,
    overrides: Overrides = None,
    output: Output = None,
    start: Start = None,
    distributed: Distributed = False,
) -> None:
    """Stage 2: rejection sampling from Zero, then SFT of the seed model as trees.

    Run again with the same arguments, it goes on where it stopped.
    """
    from npr_jax.train.beta import BetaConfig, run

    with _stage(BetaConfig, config, overrides, output, distributed, start) as settings:
        run(settings)


@app.command()
def papo(
    config: Config,
    overrides: Overrides = None,
    output: Output = None,
    start: Start = None,
    distributed: Distributed = False,
) -> None:
    """Stage 3: reinforcement learning on answers decoded in parallel.

    Run again with the same arguments, it goes on where it stopped.
    """
    from npr_jax.train.papo import PapoConfig, run

    with _stage(PapoConfig, config, overrides, output, distributed, start) as settings:
        run(settings)


@app.command()
def generate(
    model: Annotated[str, typer.Option(metavar="DIR", help="Model directory or hub id.")],
    source: Annotated[
        Path, typer.Option("--input", metavar="FILE", help='JSONL of "problem" or "prompt".')
    ],
    target: Annotated[
        Path, typer.Option("--output", metavar="FILE", help="JSONL of answers; is added to.")
    ],
    config: Annotated[
        str, typer.Option(metavar="CONFIG", help="YAML file or preset: engine and sampling.")
    ] = "generate",
    instruction: Instruction = None,
    overrides: Overrides = None,
) -> None:
    """Answer every line of a file; lines that the output has are skipped.

    Example: --set sampling.temperature=0.6 --set sampling.max_tokens=4096

    Exit code 4: answered, but for lines that failed or are no requests, which are named.
    """
    from npr_jax.base.config import load_config
    from npr_jax.evaluate.generate import GenerateConfig
    from npr_jax.evaluate.generate import generate as run

    settings = load_config(GenerateConfig, config, overrides or ())
    if instruction is not None:
        settings = dataclasses.replace(settings, instruction=_instruction(instruction))
    tell = functools.partial(typer.echo, err=True)
    with _interruptible(f"the answers so far are in {target}"):
        written, bad = run(model, source, target, settings, warn=tell, tell=tell)
    typer.echo(f"{written} answers written to {target}, {bad} bad lines left out")
    if bad:
        raise typer.Exit(LEFT_OUT)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(metavar="DIR", help="Model directory or hub id.")],
    benchmarks: Annotated[
        str, typer.Option(metavar="NAMES", help="aime25,amc23,... or NAME=FILE for your own.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Traces and results.json.")],
    samples: Annotated[
        int | None, typer.Option(metavar="K", help="Answers to each problem.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Local files: NAME.jsonl.")
    ] = None,
    instruction: Instruction = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Decode so too, for the speed-ups.")
    ] = False,
    config: Annotated[str, typer.Option(metavar="CONFIG", help="YAML file or preset.")] = "eval",
    overrides: Overrides = None,
) -> None:
    """Decode benchmarks and sum them up: accuracy, format, parallelism, speed.

    Run again with the same arguments, it goes on where it stopped.
    """
    from rich.console import Console

    from npr_jax.base.config import load_config
    from npr_jax.evaluate.results import tables
    from npr_jax.evaluate.run import EvalConfig
    from npr_jax.evaluate.run import evaluate as run
    from npr_jax.report.html import write as write_report

    names = [name.strip() for name in benchmarks.split(",")]
    text = instruction and _instruction(instruction)
    given = {
        "model": (f"--model {model}", model),
        "benchmarks": (f"--benchmarks {benchmarks}", names),
        "output": (f"--output {output}", str(output)),
        "samples": (f"--samples {samples}", samples),
        "data": (f"--data {data}", data and str(data)),
        "instruction": (f"--instruction {instruction}", text),
        "baseline": ("--sequential", sequential or None),
    }
    options = {key: option for key, option in given.items() if option[1] is not None}
    settings = load_config(EvalConfig, config, overrides or (), options)
    with _interruptible(f"the answers so far are in {output}"):
        results = run(settings, tell=functools.partial(typer.echo, err=True))
    Console().print(*tables(results))
    typer.echo(f"all figures: {output / 'results.json'}; report: {write_report(output)}")


@app.command()
def serve(
    model: Annotated[str, typer.Option(metavar="DIR", help="Model directory or hub id.")],
    host: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="By default the config's, 127.0.0.1.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(metavar="N", help="By default the config's, 8000.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar="NPR_API_KEY",
            help="That clients have to show.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the model, for clients.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="DIR", help="Adapters (LoRA) to the model.")
    ] = None,
    drain: Annotated[
        int | None,
        typer.Option(metavar="SECONDS", help="That answers get after SIGTERM; config's: 30."),
    ] = None,
    instruction: Instruction = None,
    config: Annotated[str, typer.Option(metavar="CONFIG", help="YAML file or preset.")] = "serve",
    overrides: Overrides = None,
) -> None:
    """Serve a model to clients of OpenAI's API, and a page to look at its branches.

    Ends with SIGTERM or Ctrl-C, after the answers under way.
    """
    with _extra("serve"):
        from npr_jax.serve.server import serve as run

    from npr_jax.base.config import load_config
    from npr_jax.serve.config import ServeConfig

    given = {
        "host": (f"--host {host}", host),
        "port": (f"--port {port}", port),
        "name": (f"--name {name}", name),
        "drain": (f"--drain {drain}", drain),
        "instruction": (f"--instruction {instruction}", instruction and _instruction(instruction)),
    }
    options = {key: option for key, option in given.items() if option[1] is not None}
    settings = load_config(ServeConfig, config, overrides or (), options)
    with _interruptible("nothing was served yet"):
        run(model, settings, api_key, adapter, tell=functools.partial(typer.echo, err=True))


@contextlib.contextmanager
def _extra(name: str) -> Iterator[None]:
    """Around imports that need an extra of the package."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("npr_jax"):
            raise
        raise ValueError(
            f"{error.name} is not installed: pip install 'npr-jax[{name}]' brings it"
        ) from error


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of a stage.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="New model directory.")],
    step: Annotated[
        int | None, typer.Option(metavar="N", help="Of the checkpoint; by default the last.")
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="The best checkpoint (train.keep_best).")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Model that the run began with, if it has moved."),
    ] = None,
) -> None:
    """Make a model directory (Hugging Face) of a checkpoint of a run, also while it goes on.

    A run's last model needs no export: it is in RUN/final.
    """
    from npr_jax.train.export import export as write_model

    done = write_model(run, output, step, model, best)
    typer.echo(f"model of step {done}: {output}")


@app.command()
def mine(
    answers: Annotated[
        Path, typer.Argument(metavar="ANSWERS", help="JSONL of traces of sequential answers.")
    ],
    model: Annotated[
        str, typer.Option(metavar="DIR", help="That measures; best the one that has answered.")
    ],
    output: Annotated[Path, typer.Option(metavar="TRACES", help="JSONL; is added to.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
    config: Annotated[str, typer.Option(metavar="CONFIG", help="YAML file or preset.")] = "mine",
    overrides: Overrides = None,
) -> None:
    """Find the parallel structure that right sequential answers have, and give them branches.

    Run again with the same arguments, it goes on where it stopped.
    """
    from npr_jax.base.config import load_config
    from npr_jax.base.files import json_text
    from npr_jax.train.mine import MineConfig, report_lines
    from npr_jax.train.mine import mine as run

    settings = load_config(MineConfig, config, overrides or ())
    with _interruptible(f"the answers so far are in {output}"):
        found = run(model, answers, output, settings, functools.partial(typer.echo, err=True))
    typer.echo(json_text(found) if as_json else "\n".join(report_lines(found, output)))


@app.command()
def view(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="JSONL of traces.")],
    number: Annotated[
        int | None, typer.Option(help="Which one, from 1; by default the first.")
    ] = None,
    name: Annotated[str | None, typer.Option("--id", help="Or by the id of its problem.")] = None,
    sample: Annotated[int, typer.Option(help="With --id: which answer to it, from 0.")] = 0,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the tree as SVG.")] = None,
    visibility: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw what sees what as SVG.")
    ] = None,
) -> None:
    """Draw one answer: its branches side by side, its tokens by their log-probs.

    Traces are in the directories of evaluations and training runs.
    """
    from npr_jax.report.terminal import view as run

    for path in run(trace, number, name, sample, svg, visibility):
        typer.echo(f"written: {path}")


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Of an evaluation or a run.")],
    answers: Annotated[int, typer.Option(metavar="N", help="In the viewer, at most.")] = 1000,
) -> None:
    """Write DIR/index.html: tables, curves, settings, and a viewer of answers.

    Also of a run that is not over yet; it reads what is there.
    """
    from npr_jax.report.alarms import alarm_lines
    from npr_jax.report.html import write

    if answers < 0:
        raise ValueError(f"--answers is {answers}, needed is 0 or more")
    typer.echo(f"Report: {write(directory, answers)}")
    for line in alarm_lines(directory):
        typer.echo(line)


@app.command()
def scout(
    pool: Annotated[
        Path, typer.Argument(metavar="POOL", help="Recorded answers and probes (docs/scout.md).")
    ],
    policy: Annotated[
        str | None, typer.Option(metavar="NAME", help="sc, asc, esc, sac or probe; by default all.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Such as k=7, trials=10; repeatable."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="A line of JSON for each policy, no table.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write DIR/index.html, with pictures.")
    ] = None,
    draw: Annotated[
        list[int] | None,
        typer.Option("--question", metavar="N", help="Draw it alone, from 1; repeatable."),
    ] = None,
) -> None:
    """Try policies over many answers on recorded ones: what is right, and what it costs.

    Nothing is decoded: the same answers stop earlier, or are dropped, as each policy says.
    """
    from rich.console import Console

    from npr_jax.base.files import json_text
    from npr_jax.base.progress import Progress
    from npr_jax.evaluate.scout import read, settings, table
    from npr_jax.evaluate.scout import scout as run

    if draw and output is None:
        raise ValueError("--question says what is drawn, needed is a place for it: --output DIR")
    configs = settings(policy, overrides or ())
    questions = read(pool, configs, functools.partial(typer.echo, err=True))
    shown = sorted(set(draw or range(1, len(questions) + 1)))
    if wrong := [number for number in shown if not 1 <= number <= len(questions)]:
        raise ValueError(f"--question is {wrong[0]}, {pool} has 1 to {len(questions)}")
    total, console = len(questions) * len(configs), Console(stderr=True, quiet=as_json)
    with Progress("scout", total, "question", console=console) as progress:
        results = run(questions, configs, progress.advance)
    if as_json:
        for result in results:
            typer.echo(json_text(result.record()))
    else:
        Console().print(table(results))
    if output is not None:
        from npr_jax.report.scout import write

        typer.echo(f"report: {write(output, pool.name, questions, results, shown)}", err=as_json)


@app.command()
def plan(
    model: Annotated[str, typer.Option(metavar="PRESET", help="Such as qwen3-4b.")],
    stage: Annotated[str, typer.Option(help="zero, beta or papo.")],
    topology: Annotated[
        str, typer.Option(metavar="CHIPS", help="Such as v5p:4x4x4, h100:8 or h100:8x4 (4 nodes).")
    ],
    mesh: Annotated[
        str | None, typer.Option(metavar="AXIS=SIZE,...", help="By default fsdp over all chips.")
    ] = None,
    lengths: Annotated[
        str,
        typer.Option(
            metavar="TOKENS",
            help="Of answers: max, 500,2000,8000, lognormal:MEDIAN:SIGMA or a file of numbers.",
        ),
    ] = "max",
    prompt_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of a prompt; by default the most.")
    ] = None,
    problems: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="That Beta samples, if all are.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Say whether a stage fits TPUs or GPUs, and how long its steps take there at least.

    For TPUs its programs are compiled; none is needed, only the TPU compiler (libtpu). For GPUs it
    is arithmetic. Exit code 3: it does not fit.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # or JAX would look for a TPU
    from npr_jax.base.mesh import parse_mesh
    from npr_jax.plan.plan import plan as run
    from npr_jax.plan.plan import report, stage_config

    tell = functools.partial(typer.echo, err=True)
    sizes = parse_mesh(mesh) if mesh else None
    settings = stage_config(stage, model, overrides or ())
    found = run(model, settings, topology, sizes, tell, lengths, prompt_tokens, problems)
    typer.echo(report(found))
    sys.exit(0 if found["fits"] else 3)


@app.command()
def config(
    command: Annotated[
        str,
        typer.Argument(metavar="STAGE", help="A stage, eval, generate, serve or mine."),
    ],
) -> None:
    """Print every key of a stage's config: default, unit, meaning, as YAML to begin with.

    Example: npr-jax config zero > my_zero.yaml
    """
    from npr_jax.base.reference import template
    from npr_jax.train.configs import CONFIGS

    if command not in CONFIGS:
        raise ValueError(f"STAGE is {command!r}, needed is one of {', '.join(CONFIGS)}")
    typer.echo(template(CONFIGS[command]), nl=False)


@data.command()
def prepare(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Form of the file: orz57k, gsm8k, math or jsonl.")
    ],
    source: Annotated[Path, typer.Option(metavar="FILE", help="The raw file; may be gzip.")],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where it goes; by default data/NAME.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Directory or hub id; counts tokens.")
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Longer prompts are set aside.")
    ] = None,
) -> None:
    """Make a data set that every stage takes as its problems; set bad rows aside.

    Rows that are no problem with an answer are counted by reason and written to rejected.jsonl.
    """
    from npr_jax.data.prepare import prepare as run

    output = output or Path("data") / name
    report = run(name, source, output, tokenizer, max_prompt_tokens)
    typer.echo("\n".join(report.lines(output)))


@app.command()
def demo(
    task: Annotated[
        str, typer.Option(metavar="TASK", help="sums, countdown, or a Python file (docs/tasks.md).")
    ] = "sums",
    seed: Annotated[int, typer.Option(help="Of everything that is random.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where runs and report go; runs/demo, or runs/TASK."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 if a result falls short.")
    ] = False,
) -> None:
    """Teach a tiny model to reason in parallel: all stages, with a table and a report."""
    from npr_jax.demo import run

    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed is {seed}, needed is an integer from 0, below {2**32}")
    output = output or (DEMO if task == "sums" else Path("runs") / Path(task).stem)
    with _interruptible(f"what is done is in {output}"):
        code = run(task=task, seed=seed, output=output, check=check)
    sys.exit(code)


def _instruction(path: Path) -> str:
    return read_text(path, "the text of an instruction (--instruction)").strip()


@contextlib.contextmanager
def _stage(
    cls,
    config: str,
    overrides: list[str] | None,
    output: Path | None,
    distributed: bool,
    start: str | None = None,
) -> Iterator[Any]:
    """What is around a stage: its config, the other processes, and at its end the report."""
    from npr_jax.base.config import load_config

    options = {} if output is None else {"output": (f"--output {output}", str(output))}
    if start is not None:
        options["start"] = (f"--from {start}", start)
    settings = load_config(cls, config, overrides or (), options)
    from npr_jax.base.distributed import ends_together, initialize, is_main
    from npr_jax.base.mesh import describe, make_mesh
    from npr_jax.runs.directory import alone_in

    if distributed:
        initialize()
    kept = f"what is done is in {settings.output}"
    with ends_together(_tell), _interruptible(kept):
        if is_main():
            apart = settings.mesh.rollout
            more = f"; {apart} others do nothing but roll out" if apart else ""
            typer.echo(describe(make_mesh(settings.mesh)) + more, err=True)
        with alone_in(settings.output):
            yield settings
            if is_main():
                from npr_jax.report.alarms import alarm_lines
                from npr_jax.report.html import write as write_report

                report = write_report(settings.output)
                for line in alarm_lines(settings.output):
                    typer.echo(line, err=True)
                final = Path(settings.output) / "final"
                typer.echo(f"final model, a Hugging Face directory: {final}; report: {report}")
