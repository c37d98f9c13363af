"""Plans PAPO for every preset on TPU slices, all stages for the presets' model on GPUs, and writes
the tables of docs/plan.md and launch.md.

    make libtpu
    PYTHONPATH=build/libtpu JAX_PLATFORMS=cpu python bench/plan.py

Writes bench/results/plan.json after every case; cases that it has are not compiled again, unless
they are named: `python bench/plan.py qwen3-4b`. No TPU is needed, and nothing is run. GPUs are
planned by arithmetic, anew each time.
"""

import argparse
import json
import math
from importlib.metadata import version
from pathlib import Path

from npr_jax.base.chips import GIB
from npr_jax.base.mesh import parse_mesh
from npr_jax.model import PRESETS
from npr_jax.plan.plan import plan, stage_config

RESULTS = Path(__file__).parent / "results" / "plan.json"
PAGE = Path(__file__).parents[1] / "docs" / "plan.md"
SLICES = ("v5e:4x4", "v5p:4x4x4", "v6e:16x16")
ONE_HOST = "v6e:2x4"  # of docs/launch.md, for the model of the presets
TINY = {"v5e:4x4": "data=8", "v5p:4x4x4": "data=32", "v6e:16x16": "data=128"}
BEGIN, END = "<!-- plans: made by bench/plan.py -->", "<!-- end of plans -->"
LAUNCH = PAGE.with_name("launch.md")
GPUS = ("h100:8", "h200:8", "h100:8x2", "h100:8x4", "h200:8x4")
LENGTHS, PROMPT, PROBLEMS = "lognormal:4000:0.8", 200, 8000  # of the table of whole steps
WHOLE = "<!-- steps: made by bench/plan.py -->", "<!-- end of steps -->"
MESHES = "<!-- meshes: made by bench/plan.py -->", "<!-- end of meshes -->"


def mesh_of(model: str, topology: str) -> str:
    """Hosts have four chips: a row is split among them, and the state over all hosts."""
    return f"{TINY[topology]},tensor=2" if model == "tiny" else "fsdp=-1,tensor=4"


def slices(model: str) -> tuple[str, ...]:
    """Those that a model is planned for."""
    return (ONE_HOST, *SLICES) if model == "qwen3-4b" else SLICES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", help="planned anew; default: what is missing")
    wanted = parser.parse_args().models
    cases = json.loads(RESULTS.read_text(encoding="utf-8"))["cases"] if RESULTS.exists() else []
    known = {(case["model"], case["topology"]): case for case in cases}
    for model in wanted or PRESETS:
        for topology in slices(model):
            if (model, topology) in known and not wanted:
                continue
            mesh = parse_mesh(mesh_of(model, topology))
            found = plan(model, stage_config("papo", model), topology, mesh)
            known[model, topology] = found
            print(json.dumps(found), flush=True)
            ordered = [known[m, t] for m in PRESETS for t in slices(m) if (m, t) in known]
            record = {
                "versions": {name: version(name) for name in ("jax", "libtpu")},
                "cases": ordered,
            }
            RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    put(PAGE, (BEGIN, END), table(known))
    put(PAGE, WHOLE, steps())
    put(LAUNCH, MESHES, meshes(known))


def put(path: Path, marks: tuple[str, str], lines: str) -> None:
    """Writes a table between two marks of a page."""
    text = path.read_text(encoding="utf-8")
    head, tail = text.split(marks[0])[0], text.split(marks[1])[1]
    path.write_text(f"{head}{marks[0]}\n{lines}{marks[1]}{tail}", encoding="utf-8")


def meshes(known: dict) -> str:
    """The slices on which the presets' model fits, and with which mesh, as Markdown."""
    lines = ["| slice | chips | mesh | KV pages that fit | wanted |", "| --- " * 5 + "|"]
    for topology in slices("qwen3-4b"):
        case = known["qwen3-4b", topology]
        if case["fits"]:
            others = [item for item in case["mesh"].items() if item[0] != "fsdp"]
            settings = " ".join(f"`--set mesh.{axis}={size}`" for axis, size in others)
            lines.append(
                f"| `{topology}` | {math.prod(case['mesh'].values())} "
                f"| {settings}: `fsdp` = {case['mesh']['fsdp']} "
                f"| {case['pages']:,} | {case['pages_wanted']:,} |"
            )
    return "\n".join(lines) + "\n"


def steps() -> str:
    """Whole steps of the presets on GPUs, with the longest answers and with such as are likely."""
    lines = [
        "| GPUs | stage | answers | KV pages | wanted | rollout, s | training, s | slots used "
        "| checkpoint, s | disk, GiB | hours | fits |",
        "| --- " * 12 + "|",
    ]
    for topology in GPUS:
        for stage in ("zero", "beta", "papo"):
            config = stage_config(stage, "qwen3-4b")
            for name, changes in (
                ("longest", {}),
                (LENGTHS, {"lengths": LENGTHS, "prompt": PROMPT}),
            ):
                found = plan("qwen3-4b", config, topology, problems=PROBLEMS, **changes)
                cells = [
                    f"`{topology}`",
                    stage,
                    name,
                    f"{found['pages']:,}",
                    f"{found['pages_wanted']:,}",
                    f"{found['rollout_s']:,.0f}",
                    f"{found['train_s']:,.0f}",
                    f"{100 * found['row_use']:.0f}%",
                    f"{found['checkpoint_write_s']:.0f}",
                    f"{found['disk'] / GIB:.0f}",
                    f"{found['hours']:.1f}",
                    "yes" if found["fits"] else f"no: {found['advice'].rsplit(' (', 1)[0]}",
                ]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def table(known: dict) -> str:
    """The cases as Markdown, in GiB and seconds per chip."""
    lines = [
        "| model | slice | mesh | parameters | optimizer | engine weights | train step "
        "| decode step | KV pages | wanted | collectives | TFLOP | micro-batch, s | step, s "
        "| fits |",
        "| --- " * 15 + "|",
    ]
    for model in PRESETS:
        for topology in slices(model):
            if (model, topology) not in known:
                continue
            case = known[model, topology]
            sizes = ("params", "optimizer", "engine_weights", "train_temp", "decode_temp")
            cells = [
                model,
                topology,
                " ".join(f"{axis} {size}" for axis, size in case["mesh"].items()),
                *(f"{case[name] / GIB:.2f}" for name in sizes),
                f"{case['pages']:,}",
                f"{case['pages_wanted']:,}",
                f"{case['collectives'] / GIB:.1f}" if case["collectives"] else "",  # no program
                f"{case['flops'] / 1e12:.1f}",
                f"{case['least_s']:.2f}",
                f"{case['train_s'] if 'train_s' in case else case['step_least_s']:.1f}",
                "yes" if case["fits"] else f"no: {case['advice'].rsplit(' (', 1)[0]}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
