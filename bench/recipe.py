"""What each part of the recipe does on the demo's task: three stages, several seeds, ablations.

    python bench/recipe.py run --runs runs/recipe --seeds 0 1 2 3 4      # hours; resumable
    python bench/recipe.py table                                         # docs/recipe.md, the plot

An arm is the demo's recipe with a few settings changed. Stages that an arm does not touch are
trained once per seed and shared. Every arm is measured on the same 512 fresh problems of its seed,
one answer each at temperature 1. What is measured goes to bench/results/recipe/SEED.json at once;
runs and measurements that are there are not made again. Several processes may work on different
seeds. The acceleration reward has a start of its own: acceleration.py.
"""

import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import jax
import study
from plot import dot_chart
from table import markdown, replace_between

from npr_jax.base.compile_cache import use_cache
from npr_jax.base.config import load_config
from npr_jax.demo import make_problems, make_seed, measure, sums
from npr_jax.model.pretrained import load
from npr_jax.train import beta, papo, zero

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "recipe"
DOCS = ROOT / "docs" / "recipe.md"
PLOT = ROOT / "docs" / "images" / "recipe.svg"
BEGIN, END = "<!-- made by bench/recipe.py -->", "<!-- end -->"
STAGES = {"zero": zero.ZeroConfig, "beta": beta.BetaConfig, "papo": papo.PapoConfig}
RUN = {"zero": zero.run, "beta": beta.run, "papo": papo.run}
NO_GAP = ["train.gap_warn=1e9", "train.gap_stop=1e9"]  # it is what these arms are about


@dataclasses.dataclass(frozen=True)
class Arm:
    """What an arm is called, and the settings that it changes in each stage."""

    title: str
    zero: tuple[str, ...] = ()
    beta: tuple[str, ...] = ()
    papo: tuple[str, ...] = ()


LION = "train.optimizer.name=lion"


def _rl(title: str, *settings: str) -> Arm:
    return Arm(title, zero=settings, papo=settings)


def _all(title: str, train: str, engine: str | None = None) -> Arm:
    more = (engine,) if engine else ()
    return Arm(title, (train, *more), (f"fit.{train}", *more), (train, *more))


def _rules(title: str, *settings: str) -> Arm:
    return Arm(title, beta=settings, papo=settings)


ARMS = {
    "base": Arm("the recipe"),
    "no_format_reward": Arm("Zero without format reward", zero=("reward=accuracy",)),
    "causal_sft": Arm("Beta under a causal mask", beta=("layout=causal",)),
    "reference": Arm(
        "`reference` layout in Beta and PAPO",
        beta=("layout=reference",),
        papo=("layout=reference", *NO_GAP),
    ),
    "forced": Arm(
        "forced tokens in the loss of Beta and PAPO",
        beta=("train_forced=true",),
        papo=("train_forced=true", *NO_GAP),
    ),
    "group_std": Arm("PAPO with each group's std", papo=("advantage=group_std",)),
    "off_policy": Arm("PAPO with 4 optimizer steps a batch", papo=("minibatches=4",)),
    "clip": Arm(
        "PAPO with 4 optimizer steps a batch, clipped",
        papo=("minibatches=4", "objective=dapo"),
    ),
    "lora": Arm(
        "adapters of rank 16",
        zero=("train.lora.rank=16", "train.optimizer.learning_rate=3e-3"),
        beta=(
            "fit.train.lora.rank=16",
            "fit.train.optimizer.learning_rate=1e-2",
            "fit.train.optimizer.final_learning_rate=1e-3",
        ),
        papo=("train.lora.rank=16", "train.optimizer.learning_rate=2e-3"),
    ),
    "staleness": _rl("rollouts one batch ahead", "staleness=1"),
    "oversample": _rl("half as many groups more, the last left out", "oversample=0.5"),
    "carry": Arm(
        "answers carried over after 24 tokens on a path",
        zero=("carry=24", "max_refills=0"),
        papo=("carry=24",),
    ),
    "refill": Arm("Zero's refills by the rate so far", zero=("refill=rate",)),
    "kl": _rl("KL of 0.01", "kl=0.01"),
    "sum": _rules(
        "the trunk goes on at the sum of the branches (ASPD)", "engine.rules.positions=sum"
    ),
    "last": _rules(
        "the trunk sees the steps' results only", 'engine.rules={join: last, marker: "="}'
    ),
    "fresh": _rules(
        "a branch sees the prompt and its plan only",
        "engine.rules.fork=fresh",
        "engine.max_blocks=2",
    ),
    "lion": Arm(
        "lion at a fifth of the learning rate",
        zero=(LION, "train.optimizer.learning_rate=6e-5"),
        beta=(
            f"fit.{LION}",
            "fit.train.optimizer.learning_rate=5e-4",
            "fit.train.optimizer.final_learning_rate=5e-5",
        ),
        papo=(LION, "train.optimizer.learning_rate=4e-5"),
    ),
    "moments": _all("moments in bfloat16", "train.optimizer.moments=bfloat16"),
    "exact": _all("exact log-probs", "train.exact=true", engine="engine.exact=true"),
}
# What is measured: (stage, how it is decoded), for the stages that an arm changes.
MEASURED = {"zero": "sequential", "beta": "parallel", "papo": "parallel"}


def directories(home: Path, arm: Arm, name: str) -> dict[str, Path]:
    """Where each stage of an arm lies: with the base's, as long as nothing before it differs."""
    places, changed = {}, False
    for stage in STAGES:
        changed = changed or bool(getattr(arm, stage))
        places[stage] = home / (name if changed else "base") / stage
    return places


def config_of(seed: int, name: str, home: Path, stage: str):
    """What a stage of an arm is trained with."""
    places = directories(home, ARMS[name], name)
    before = {
        "zero": {"model": home / "seed"},
        "beta": {"model": home / "seed", "sampler_model": places["zero"]},
        "papo": {"model": places["beta"]},
    }[stage]
    values = {key: f"{path}/final" for key, path in before.items()}
    values |= {"problems": str(home / "problems.jsonl"), "output": str(places[stage])}
    changes = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    changes = [f"seed={seed}", *changes, *getattr(ARMS[name], stage)]
    return load_config(STAGES[stage], f"tiny_{stage}", changes)


def begin(seed: int, home: Path) -> list:
    """Makes the problems of a seed and its seed model, as far as they are not there; returns the
    problems to measure on."""
    home.mkdir(parents=True, exist_ok=True)
    problems = make_problems(sums, seed, home)
    if not (home / "seed" / "final" / "config.json").exists():
        make_seed(sums, seed, home, problems)
    return problems


def run_arm(seed: int, name: str, home: Path, problems: list) -> dict:
    """Trains what is missing of an arm, and measures it: {"rows": {...}, "seconds": {...}}."""
    places, rows, seconds = directories(home, ARMS[name], name), {}, {}
    settings = None
    for stage in STAGES:
        config = config_of(seed, name, home, stage)
        settings = settings or config  # the first stage's lanes and lengths measure all
        engine = dataclasses.replace(settings.engine, rules=config.engine.rules)
        begun = time.monotonic()
        done = (places[stage] / "final").exists()
        RUN[stage](config)
        if not done:
            seconds[stage] = round(time.monotonic() - begun, 1)
        if name == "base" or places[stage].parent.name != "base":
            model = load(places[stage] / "final")
            measured = dataclasses.replace(settings, engine=engine)
            row, _ = measure(model, MEASURED[stage], problems, measured, seed)
            rows[stage] = {key: round(value, 4) for key, value in row.items()}
            print(f"seed {seed}, {name}, {stage}: {rows[stage]}", flush=True)
    return {"rows": rows, "seconds": seconds}


def recorded(path: Path) -> dict:
    """What was measured of a seed so far: {"arms": {arm: what `run_arm` gives}} and more."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"arms": {}}


def run(args) -> None:
    use_cache(args.runs / "compiled")
    RESULTS.mkdir(parents=True, exist_ok=True)
    for arm in args.arms:  # arm by arm: a study that is cut off is balanced
        for seed in args.seeds:
            path = RESULTS / f"{seed}.json"
            if arm in recorded(path)["arms"]:
                continue
            home = args.runs / str(seed)
            result = run_arm(seed, arm, home, begin(seed, home))
            jax.clear_caches()  # or the programs of many runs come to the system's limit of maps
            record = recorded(path)  # anew: another process may have added an arm
            record["arms"][arm] = result
            record["platform"] = platform.platform()
            record["versions"] = {name: version(name) for name in ("jax", "optax", "numpy")}
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def figures() -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """{arm: {stage: {column: {seed: value}}}}; stages that an arm shares are the base's."""
    found: dict = {}
    for path in sorted(RESULTS.glob("*.json")):
        arms = json.loads(path.read_text(encoding="utf-8"))["arms"]
        for arm, result in arms.items():
            for stage in STAGES:
                row = result["rows"].get(stage) or arms["base"]["rows"][stage]
                for column, value in row.items():
                    columns = found.setdefault(arm, {}).setdefault(stage, {})
                    columns.setdefault(column, {})[path.stem] = value
    return found


def differences(found: dict, arm: str) -> list[float]:
    """What PAPO's share of right answers differs by from the recipe's, seed by seed."""
    ours, base = (found[name]["papo"]["both"] for name in (arm, "base"))
    return [value - base[seed] for seed, value in ours.items()]


def spread(values: Iterable[float], digits: int = 2, sign: str = "") -> str:
    """Mean and, of several seeds, sample standard deviation."""
    values = list(values)
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(args) -> None:
    found, rows = figures(), []
    for arm in (arm for arm in ARMS if arm in found):
        zero, beta, papo = (found[arm][stage] for stage in STAGES)
        change = "" if arm == "base" else spread(differences(found, arm), sign="+")
        rows.append(
            [
                ARMS[arm].title,
                len(papo["both"]),
                spread(zero["format"].values()),
                spread(beta["both"].values()),
                *(spread(papo[name].values()) for name in ("format", "both")),
                change,
                spread(papo["parallel"].values()),
                spread(papo["tokens"].values(), 0),
                spread(papo["critical_path"].values(), 1),
            ]
        )
    head = ["", "seeds", "Zero: format", "Beta: right", "PAPO: format", "PAPO: right"]
    head += ["against the recipe", "PAPO: parallel", "tokens", "critical path"]
    lines = [*markdown(head, rows), "", f"![A dot per seed]({PLOT.relative_to(DOCS.parent)})"]
    replace_between(DOCS, BEGIN, END, "\n".join(lines))
    points = {
        ARMS[arm].title.replace("`", ""): list(found[arm]["papo"]["both"].values())
        for arm in ARMS
        if arm in found
    }
    title = "Right and well-formed after PAPO, a dot per seed"
    PLOT.write_text(dot_chart(title, points), encoding="utf-8")


def main() -> None:
    """The command line."""
    arms = lambda parser: parser.add_argument(  # noqa: E731
        "--arms", nargs="+", choices=ARMS, default=list(ARMS)
    )
    study.main(__doc__, run, table, range(5), arms)


if __name__ == "__main__":
    main()
