"""Shows that a change leaves every number as it was: two revisions, compared bit for bit.

    python scripts/same.py REVISION [--only CASE ...]        or: make same BASE=REVISION

Runs each tiny stage for a few steps, one evaluation and some batches of the engine, with the code
of REVISION and with the code of this working tree, uncommitted changes included. Both use the same
installed packages and start from the same files. Compared are metrics (but for times), tokens,
log-probs, traces and the trained parameters. Exit code: 0 all are equal, 1 something differs (the
first difference of every file is printed), 2 a run failed.

Results of REVISION are kept under build/same, so that comparing with it again runs this tree only.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "same"
JOBS = 2  # runs beside each other

ENGINE = ("engine.lanes=16", "engine.pages=256")
RL = (
    *ENGINE,
    "prompts=4",
    "samples=4",
    "max_prompt_tokens=16",
    "max_tokens=64",
    "train.row_len=256",
    "train.checkpoint_every=3",
)
# case -> arguments of `npr-jax`; HOME and OUT stand for the files to start from and the results.
CASES = {
    "zero": (
        *("zero", "tiny_zero", "problems=HOME/problems.jsonl", "output=OUT/run", *RL),
        *("model=HOME/seed", "seed=3", "steps=6", "minibatches=2", "overlong_buffer=16"),
    ),
    "beta": (
        *("beta", "tiny_beta", "problems=HOME/problems.jsonl", "output=OUT/run", *ENGINE),
        *("model=HOME/seed", "sampler_model=HOME/seed", "seed=3", "fit.steps=12", "fit.batch=4"),
        *("sample.num_problems=24", "sample.batch=8", "sample.tries=4", "sample.max_tokens=64"),
        *("fit.train.row_len=256", "fit.train.checkpoint_every=5"),
    ),
    "papo": (
        *("papo", "tiny_papo", "problems=HOME/problems.jsonl", "output=OUT/run", *RL),
        *("model=HOME/tree", "seed=3", "steps=8", "acceleration=0.1"),
    ),
    "eval": (
        *("eval", "--config", "tiny_eval", "--model", "HOME/tree", "--output", "OUT/run"),
        *("--benchmarks", "sums=HOME/sums.jsonl", "--samples", "2", "--sequential", *ENGINE),
        *("sampling.max_tokens=64", "compilation_cache=null"),
    ),
    "engine": (),  # `run_engine`
}

# What is never the same: times, what depends on them or on what was compiled before. Settings hold
# paths, and gain keys.
TIMES = ("seconds", "per_s", "time_share", "wall_clock", "host_share", "wait_share", "per_visit")
MACHINE = ("seconds/", "memory/", "engine/", "mfu")
UNLIKE = ("timing", "settings", "versions", "device", "compilations")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", metavar="REVISION", help="what this tree is compared with")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--engine", metavar="OUT", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.engine:  # this script as a process of a side
        run_engine(Path(given.base), given.engine)
        return 0
    cases = given.only or list(CASES)
    revision = _git("rev-parse", "--verify", f"{given.base}^{{commit}}").decode().strip()
    try:
        home = make_home()
        kept = BUILD / f"{revision[:12]}-{_key(home)}"
        code = check_out(revision, kept / "code")
        base, new = kept / "results", BUILD / "new"
        missing = [case for case in cases if not (base / case).exists()]
        run_side(f"{given.base} ({revision[:8]})", code, home, base, missing)
        shutil.rmtree(new, ignore_errors=True)
        run_side("this tree", ROOT, home, new, cases)
    except subprocess.CalledProcessError as error:
        print(f"failed: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 2
    return tell({case: compare(base / case, new / case) for case in cases})


def tell(findings: dict[str, tuple[int, list[str]]]) -> int:
    """Prints `compare`'s findings by case as a table, then the differences; returns 1 if there are
    any, else 0."""
    for case, (count, differences) in findings.items():
        found = f"{len(differences)} files differ" if differences else "equal"
        print(f"  {case:8} {count:8,} values  {found}")
    for case, (_, differences) in findings.items():
        for line in differences:
            print(f"{case}: {line}")
    return int(any(differences for _, differences in findings.values()))


# ---- runs


def make_home() -> Path:
    """Problems and two nearly trained models to start from, made by this tree's tests, once."""
    home = BUILD / "home"
    if not home.exists():
        print("making the models to start from")
        new = _emptied(BUILD / "home.tmp")
        make = f"import pathlib, train_toy; train_toy.make_home(pathlib.Path({str(new)!r}))"
        paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
        _run([sys.executable, "-c", make], paths, BUILD / "home.log")
        shutil.rmtree(new / "fit")
        lines = (new / "problems.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (new / "sums.jsonl").write_text("".join(lines[:12]), encoding="utf-8")
        new.replace(home)
    return home


def check_out(revision: str, directory: Path) -> Path:
    """The code of a revision, without its history."""
    if not directory.exists():
        new = _emptied(directory.with_name("code.tmp"))
        archive = new / "code.tar"
        archive.write_bytes(_git("archive", "--format=tar", revision, "npr_jax", "configs"))
        with tarfile.open(archive) as tar:
            tar.extractall(new, filter="data")
        archive.unlink()
        new.replace(directory)
    return directory


def run_side(name: str, code: Path, home: Path, results: Path, cases: list[str]) -> None:
    """Runs the cases with the code in `code`; a case that is done is a folder of `results`."""
    results.mkdir(parents=True, exist_ok=True)

    def run(case: str) -> None:
        out = _emptied(results / f"{case}.tmp")
        if case == "engine":
            command = [sys.executable, str(Path(__file__).resolve()), str(home), "--engine", out]
        else:
            words = [w.replace("HOME", str(home)).replace("OUT", str(out)) for w in CASES[case]]
            # KEY=VALUE is a change of the config, but where it belongs to an option.
            changes = [f"--set={w}" if "=" in w and "sums=" not in w else w for w in words]
            command = [sys.executable, "-m", "npr_jax", *changes]
        begun = time.monotonic()
        _run(command, str(code), results / f"{case}.log")
        out.replace(results / case)
        print(f"{name}: {case}, {time.monotonic() - begun:.0f} s", flush=True)

    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(run, cases))


def run_engine(home: Path, out: Path) -> None:
    """Batches of the engine, the pool so small that answers have to make room for others."""
    import npr_jax

    model = npr_jax.load(home / "tree")
    engine = npr_jax.Engine(
        model, npr_jax.EngineConfig(lanes=12, pages=48, page_size=4, steps=8, max_depth=1)
    )
    lines = (home / "problems.jsonl").read_text(encoding="utf-8").splitlines()[:10]
    bos = model.tokenizer.bos_token_id
    prompts = [
        [bos, *model.tokenizer.encode(json.loads(line)["problem"], add_special_tokens=False)]
        for line in lines
    ]
    filters = {"top_k": 8, "top_p": 0.9, "min_p": 0.01}
    penalties = {"repetition_penalty": 1.05, "step_repetition_penalty": 1.1}
    batches = {
        "parallel": {"n": 2, "seed": 1},
        "filtered": {"n": 2, "seed": 2, "temperature": 1.3, **filters},
        "penalised": {"seed": 3, **filters, **penalties},
        "greedy": {"temperature": 0},
        "sequential": {"n": 2, "seed": 4, "parallel": False},
    }
    for name, values in batches.items():
        sampling = npr_jax.SamplingParams(max_tokens=64, **values)
        answers = engine.generate(prompts, sampling)
        _write_answers(out / f"{name}.jsonl", answers)
        if name == "parallel":
            _write_answers(out / "replay.jsonl", engine.replay(answers))
        engine.drop_prefix_cache()
    stats = engine.stats()
    if not stats["preemptions"]:
        raise SystemExit("no answer had to make room: the engine's pool is too large here")
    (out / "stats.json").write_text(json.dumps(stats), encoding="utf-8")


def _write_answers(path: Path, answers) -> None:
    arrays = ("token_ids", "logp", "logp_sampled", "margin", "step", "forced")
    records = [
        {name: getattr(answer, name).tolist() for name in arrays}
        | {name: getattr(answer.layout, name).tolist() for name in ("positions", "hidden", "pred")}
        | {name: getattr(answer, name) for name in ("text", "finish_reason", "detail", "stats")}
        for answer in answers
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def _run(command: list, python_path: str, log: Path) -> None:
    """Runs a process on the CPU with one device; where it fails, the end of its log is printed."""
    changes = {"PYTHONPATH": python_path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    cached = {
        "JAX_COMPILATION_CACHE_DIR": str(BUILD / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with log.open("wb") as file:
        done = subprocess.run(
            command, env=cached | os.environ | changes, stdout=file, stderr=file, cwd=log.parent
        )
    if done.returncode:
        print("\n".join(log.read_text(errors="replace").splitlines()[-30:]), file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, command)


def _key(home: Path) -> str:
    """Tells apart what results depend on beside the code."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(path for path in home.rglob("*") if path.is_file()):
        digest.update(path.read_bytes())
    for package in ("jax", "jaxlib", "numpy", "optax", "flax"):
        digest.update(importlib.metadata.version(package).encode())
    digest.update(f"{platform.python_version()} {os.cpu_count()}".encode())
    return digest.hexdigest()[:12]


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True).stdout


def _emptied(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


# ---- comparison


def compare(base: Path, new: Path) -> tuple[int, list[str]]:
    """(values compared, the first difference of every file that differs) of two folders of
    results: their files *.jsonl, *.json and *.safetensors."""
    names = sorted(_names(base) | _names(new), key=_order)
    count, differences = 0, []
    for name in names:
        for side, path in (("base", base / name), ("this tree", new / name)):
            if not path.exists():
                differences.append(f"{name}: {side} has no such file")
                break
        else:
            number, difference = _compare_file(base / name, new / name)
            count += number
            if difference:
                differences.append(f"{name}: {difference}")
    return count, differences


def _names(folder: Path) -> set[str]:
    """Results; a checkpoint holds nothing that the trained model does not."""
    kinds = {".json", ".jsonl", ".safetensors"}
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix in kinds)
    return {
        str(path) for path in paths if "checkpoints" not in path.parts and path.stem not in UNLIKE
    }


def _order(name: str) -> tuple:
    """Metrics come first, for they say in which step a difference begins."""
    kinds = ("metrics.jsonl", ".jsonl", ".json", ".safetensors")
    return next(i for i, kind in enumerate(kinds) if name.endswith(kind)), name


def _compare_file(base: Path, new: Path) -> tuple[int, str | None]:
    if base.suffix == ".safetensors":
        return _compare_tensors(base, new)
    sides = [path.read_text(encoding="utf-8") for path in (base, new)]
    if base.suffix == ".json":
        values = [list(_flat(json.loads(text), "")) for text in sides]
        return len(values[0]), _first(*values)
    count, lines = 0, [[json.loads(line) for line in text.splitlines()] for text in sides]
    for number, pair in enumerate(zip(*lines, strict=False), 1):
        values = [list(_flat(line, "")) for line in pair]
        count += len(values[0])
        if difference := _first(*values):
            step = f" (step {pair[0]['step']})" if type(pair[0].get("step")) is int else ""
            return count, f"line {number}{step}: {difference}"
    if len(lines[0]) != len(lines[1]):
        return count, f"{len(lines[0])} lines in base, {len(lines[1])} in this tree"
    return count, None


def _flat(value, name: str) -> Iterator[tuple[str, str]]:
    """(dotted key, value as Python writes it, which is exact for floats) but for what is unlike."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not key.endswith(TIMES) and not key.startswith(MACHINE) and key not in UNLIKE:
                yield from _flat(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        yield f"{name}.length", str(len(value))
        for i, item in enumerate(value):
            yield from _flat(item, f"{name}[{i}]")
    else:
        yield name, repr(value)


def _first(base: list[tuple[str, str]], new: list[tuple[str, str]]) -> str | None:
    """What differs first in two lists of (key, value), whose order does not matter."""
    if base == new:
        return None
    olds, news = dict(base), dict(new)
    for key in olds | news:
        old, now = (values.get(key, "nothing") for values in (olds, news))
        if old != now:
            return f"{key} is {old} in base, {now} in this tree"
    return None


def _compare_tensors(base: Path, new: Path) -> tuple[int, str | None]:
    import numpy as np
    from safetensors.numpy import load_file

    sides = [load_file(path) for path in (base, new)]
    count = sum(array.size for array in sides[0].values())
    for name in sorted(sides[0] | sides[1]):
        old, now = (side.get(name) for side in sides)
        if old is None or now is None:
            return count, f"{name}: {'base' if old is None else 'this tree'} has no such tensor"
        if (old.dtype, old.shape) != (now.dtype, now.shape):
            return count, f"{name} is {old.dtype}{old.shape} in base, {now.dtype}{now.shape} now"
        bits = [side[name].reshape(-1).view(f"u{old.itemsize}") for side in sides]
        differ = np.flatnonzero(bits[0] != bits[1])
        if len(differ):
            first = np.unravel_index(differ[0], old.shape)
            where = f"{name}[{', '.join(str(int(i)) for i in first)}]"
            return count, (
                f"{where} is {old[first]!r} in base, {now[first]!r} in this tree "
                f"({len(differ)} of {old.size} values differ)"
            )
    return count, None


if __name__ == "__main__":
    sys.exit(main())
