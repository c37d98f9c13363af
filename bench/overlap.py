"""How long a step takes whose rollouts go on beside training: two processes, a core each.

    npr-jax demo && python bench/overlap.py runs/demo

PAPO of the tiny task from the demo's Beta model, with `staleness` 1: once with `mesh.rollout=1`,
where the second process rolls out, once in one process on one core, by turns. Prints a JSON line
for each, medians of the steps behind the first `--warm`: `seconds` of a step, `rollout`, `train`
(in their own process), `wait` (of the side that trains); for the first also `of_longer`, the step
over the longer of the two, step by step, and for the second `of_sum`, the step over their sum.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from npr_jax.runs.metrics import read_metrics


def run(demo: Path, home: Path, processes: int, sets: list[str]) -> list[dict]:
    """The metrics of a run on so many processes, each of which has a core."""
    output = home / f"run-{processes}"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    places = {"model": demo / "beta/final", "problems": demo / "problems.jsonl"}
    sets = [f"{key}={json.dumps(str(path.resolve()))}" for key, path in places.items()] + sets
    command = [sys.executable, "-m", "npr_jax", "papo", "tiny_papo", "--output", str(output)]
    command += [f"--set={text}" for text in sets]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    if processes > 1:
        command.append("--distributed")
        environment |= {"NPR_COORDINATOR": address, "NPR_PROCESSES": str(processes)}
    cores = sorted(os.sched_getaffinity(0))
    started = [
        subprocess.Popen(
            command,
            env=environment | ({"NPR_PROCESS": str(i)} if processes > 1 else {}),
            preexec_fn=lambda i=i: os.sched_setaffinity(0, {cores[i]}),
            stdout=subprocess.DEVNULL,
        )
        for i in range(processes)
    ]
    if any([process.wait() for process in started]):
        sys.exit("a process has failed")
    return read_metrics(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("demo", type=Path, help="directory of a finished demo")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm", type=int, default=10, help="steps that do not count")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the config")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    given = parser.parse_args()
    common = ["staleness=1", f"steps={given.steps}", "train.row_lengths=1", *given.set]
    found = []
    with tempfile.TemporaryDirectory() as home:
        for processes, more in ((2, ["mesh.rollout=1"]), (1, [])):
            lines = run(given.demo, Path(home), processes, [*common, *more])
            # The last step has no batch to wait for, and by turns it samples none.
            lines = [line for line in lines[given.warm : -1] if line.get("loss_tokens")]
            medians = {
                name: round(statistics.median(line.get(key, 0.0) for line in lines), 3)
                for name, key in (
                    ("seconds", "seconds"),
                    ("rollout", "rollout_seconds"),
                    ("train", "train_seconds"),
                    ("wait", "seconds/wait"),
                )
            }
            parts = [(line["rollout_seconds"], line["train_seconds"]) for line in lines]
            name, of = ("of_longer", max) if processes > 1 else ("of_sum", lambda pair: sum(pair))
            ratios = [line["seconds"] / of(pair) for line, pair in zip(lines, parts, strict=True)]
            medians[name] = round(statistics.median(ratios), 3)
            found.append({"processes": processes, "steps": len(lines), **medians})
            print(json.dumps(found[-1]), flush=True)
    if given.output:
        given.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
