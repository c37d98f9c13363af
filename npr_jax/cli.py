"""The command line: one verb, one function. Heavy modules are imported when a verb runs."""

import functools
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Native Parallel Reasoner in JAX: train a model to reason in parallel, and decode it so.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file or name of a preset.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Override a key of the config; repeatable."),
]
Output = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Run directory, in place of the config's.")
]


def main() -> None:
    """Entry point of `npr-jax`: a user's error is one line and exit code 2."""
    from npr_jax.train.preempt import Preempted

    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it asks for PyTorch
    try:
        app(prog_name="npr-jax")
    except Preempted as ending:
        # All is saved. The interpreter's own clean-up can crash while the device still computes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ending.code)
    except (ValueError, OSError, FloatingPointError) as error:
        typer.echo("error: " + "; ".join(str(error).splitlines()), err=True)
        sys.exit(2)


@app.command()
def zero(config: Config, overrides: Overrides = None, output: Output = None) -> None:
    """Stage 1: DAPO on sequential answers teaches the format.

    Run again with the same arguments, it goes on where it stopped.
    """
    from npr_jax.train.zero import ZeroConfig, run

    _run_stage(ZeroConfig, run, config, overrides, output)


@app.command()
def beta(config: Config, overrides: Overrides = None, output: Output = None) -> None:
    """Stage 2: rejection sampling from Zero, then SFT of the seed model as trees.

    Run again with the same arguments, it goes on where it stopped.
    """
    from npr_jax.train.beta import BetaConfig, run

    _run_stage(BetaConfig, run, config, overrides, output)


@app.command()
def papo(config: Config, overrides: Overrides = None, output: Output = None) -> None:
    """Stage 3: reinforcement learning on answers decoded in parallel.

    Run again with the same arguments, it goes on where it stopped.
    """
    from npr_jax.train.papo import PapoConfig, run

    _run_stage(PapoConfig, run, config, overrides, output)


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
    overrides: Overrides = None,
) -> None:
    """Answer every line of a file; lines that the output has are skipped.

    Example: --set sampling.temperature=0.6 --set sampling.max_tokens=4096 --set engine.lanes=64
    """
    from npr_jax.config import load_config
    from npr_jax.generate import GenerateConfig
    from npr_jax.generate import generate as run

    settings = load_config(GenerateConfig, config, overrides or ())
    tell = functools.partial(typer.echo, err=True)
    written, bad = run(model, source, target, settings, warn=tell, tell=tell)
    typer.echo(f"{written} answers written to {target}, {bad} bad lines left out")


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Of everything that is random.")] = 0,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where runs and report go.")] = Path(
        "runs/demo"
    ),
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 if a result falls short.")
    ] = False,
) -> None:
    """Teach a tiny model to reason in parallel: all stages, with a table and a report."""
    from npr_jax.demo import run

    sys.exit(run(seed=seed, output=output, check=check))


def _run_stage(cls, run, config: str, overrides: list[str] | None, output: Path | None) -> None:
    from npr_jax.config import load_config

    changes = list(overrides or ())
    if output is not None:
        changes.append(f"output={json.dumps(str(output))}")
    final = run(load_config(cls, config, changes))
    typer.echo(f"trained model: {final}")
