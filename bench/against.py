"""Runs bench/decode.py and other libraries' scripts by turns on one core, and writes the ratios.

    python bench/against.py --scripts DIR --peer hf=PYTHON --peer tunix=PYTHON

DIR holds bench_hf_decode.py and bench_tunix_decode.py, which print one JSON line for a model, a
batch and the same prompts and lengths; PYTHON is the interpreter of the library's own environment.
Writes bench/results/decode.json after every case, with its date and the machine's own limits then.
Nothing else should run on the machine meanwhile.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "decode.json"
CASES = [("tiny", 1), ("tiny", 16), ("tiny", 64), ("mid", 1), ("mid", 16), ("mid", 64)]


def last_line(command: list[str], cwd: Path) -> dict:
    """The JSON that a script prints last; it runs on the first core that this process may use,
    where the system can say so."""
    pin = ["taskset", "-c", str(min(os.sched_getaffinity(0)))] if shutil.which("taskset") else []
    done = subprocess.run([*pin, *command], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scripts", type=Path, required=True)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--case", action="append", metavar="MODEL:BATCH", help="default: all")
    parser.add_argument("--rounds", type=int, default=2, help="of all sides, by turns")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs per round")
    args = parser.parse_args()
    peers = dict(peer.split("=", 1) for peer in args.peer)
    wanted = [(m, int(b)) for m, b in (case.split(":") for case in args.case or ())] or CASES
    cases = {}
    if args.case and RESULTS.exists():  # the others stay as they are
        found = json.loads(RESULTS.read_text(encoding="utf-8"))["cases"]
        cases = {(case["model"], case["batch"]): case for case in found}
    for model, batch in wanted:
        limits = last_line([sys.executable, str(HERE / "roofline.py"), "--measure"], HERE)
        large = model == "mid" and batch > 1  # minutes a run: one round, fewer runs of the others
        rounds, repeats = (1, max(1, 32 // batch)) if large else (args.rounds, args.repeats)
        runs: dict[str, list[dict]] = {"npr_jax": []} | {name: [] for name in peers}
        for _ in range(rounds):
            ours = [sys.executable, str(HERE / "decode.py"), "--model", model]
            ours += ["--batch", str(batch), "--repeats", str(args.repeats)]
            runs["npr_jax"].append(last_line(ours, HERE))
            for name, python in peers.items():
                theirs = [python, f"bench_{name}_decode.py", "--preset", model]
                theirs += ["--batch", str(batch), "--repeats", str(repeats)]
                runs[name].append(last_line(theirs, args.scripts.resolve()))
        case = {"model": model, "batch": batch, "limits": limits, "sides": {}}
        for name, lines in runs.items():
            medians = [line["tokens_per_s"]["median"] for line in lines]
            decode = [line["decode_tokens_per_s"] for line in lines]
            spread = [line["tokens_per_s"] for line in lines]
            case["sides"][name] = {
                "tokens_per_s": round(statistics.median(medians), 1),
                "decode_tokens_per_s": round(statistics.median(decode), 1),
                "best": max(s["best"] for s in spread),
                "rounds": medians,
                "compile_s": lines[-1]["compile_s"],
                "peak_rss_mb": lines[-1]["peak_rss_mb"],
                "version": lines[-1].get("peer_version") or lines[-1].get("jax"),
            }
        ours = runs["npr_jax"][-1]
        for name in ("visits_per_token", "host_us_per_visit", "device_wait_share", "prefill_s"):
            case["sides"]["npr_jax"][name] = ours[name]
        case["date"] = ours["date"]
        others = [case["sides"][name]["tokens_per_s"] for name in peers]
        if others:
            case["ratio"] = round(case["sides"]["npr_jax"]["tokens_per_s"] / max(others), 2)
        cases[model, batch] = case
        print(json.dumps(case), flush=True)
        record = {"device": ours["device"], "cores": 1}
        record["cases"] = [cases[key] for key in CASES if key in cases]
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
