"""Writes the tables of docs/performance.md and README.md from the files in bench/results/.

python bench/table.py            # rewrites them
python bench/table.py --check    # exit code 1 if one is not what the results say
"""

import argparse
import json
import sys
from pathlib import Path

from plot import line_chart, log_chart

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
TRAINING, LAPTOP = RESULTS / "train.json", RESULTS / "laptop.json"
PAGE = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "images" / "train_lengths.svg"
BEGIN, END = "<!-- performance: made by bench/table.py -->", "<!-- end of performance -->"
README, GAIN = ROOT / "README.md", ROOT / "docs" / "images" / "laptop.svg"
GAIN_BEGIN, GAIN_END = "<!-- gain: made by bench/table.py -->", "<!-- end of gain -->"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def markdown(head: list[str], rows: list[list]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def decoding() -> list[str]:
    found, roof = load("decode"), {(r["model"], r["batch"]): r for r in load("roofline")["rows"]}
    peers = [name for name in found["cases"][0]["sides"] if name != "npr_jax"]
    rows = []
    for case in found["cases"]:
        sides, limit = case["sides"], roof[case["model"], case["batch"]]
        rows.append(
            [
                case["model"],
                case["batch"],
                f"{sides['npr_jax']['tokens_per_s']:,}",
                *(f"{sides[name]['tokens_per_s']:,}" if name in sides else "" for name in peers),
                case.get("ratio", ""),
                case["date"],
                case["limits"]["gb_per_s"],
                case["limits"]["gflop_per_s"],
                f"{100 * limit['share_of_bandwidth']:.0f}%",
                f"{100 * limit['share_of_peak']:.0f}%",
            ]
        )
    versions = {name: found["cases"][0]["sides"][name]["version"] for name in peers}
    head = ["model", "batch", "npr_jax", *peers, "ratio to the best", "date", "GB/s", "GFLOP/s"]
    head += ["of bandwidth", "of peak"]
    return [
        "Tokens/s, prompt 128, 128 new tokens, greedy, float32, one core of a CPU, by turns; the "
        "machine's own GB/s and GFLOP/s are measured before each case; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ". The last two columns: what a decode step of npr_jax reaches of these limits.",
        "",
        *markdown(head, rows),
    ]


def parallel() -> list[str]:
    found = load("speedup")
    rows = [
        [
            row["model"],
            row["width"],
            row["branch_tokens"],
            f"{row['sequential_s']:.2f}",
            f"{row['parallel_s']:.2f}",
            row["speedup"],
            row["ideal"],
            f"{100 * row['share_of_ideal']:.0f}%",
        ]
        for row in found["rows"]
    ]
    head = ["model", "branches", "tokens each", "as text, s", "parallel, s", "speed-up", "ideal"]
    return [
        f"One answer, the same given tokens decoded as one line and with real branches "
        f"({found['device']}, {found['cores']} cores):",
        "",
        *markdown([*head, "reached"], rows),
    ]


def training() -> list[str]:
    """What bench/train.py has measured; a part that it has not is left out."""
    found = load("train") if TRAINING.exists() else {}
    parts = (("peers", steps), ("groups", sharing), ("lengths", row_lengths))
    lines = [line for part, show in parts if part in found for line in ["", *show(found[part])]]
    return lines[1:]


def steps(found: dict) -> list[str]:
    sides = found["sides"]
    rows = [
        [
            f"{name} {side['version']}" if name != "npr_jax" else name,
            f"{side['tokens_per_s']:,}",
            f"{side['step_s']:.1f}",
            f"{side['compile_s']:.1f}" if side["compile_s"] else "none",
            f"{side['peak_rss_mb'] / 1024:.1f}",
            f"{100 * side['share_of_peak']:.0f}%",
        ]
        for name, side in sides.items()
    ]
    ratio = f"; {found['ratio']} times the best of the others" if "ratio" in found else ""
    head = ["", "tokens/s", "step, s", "compilation, s", "peak memory, GiB", "of peak FLOP/s"]
    return [
        f"A training step, MID, {found['batch']} rows of {found['row_len']} tokens, float32, "
        f"AdamW, one core ({found['limits']['gflop_per_s']} GFLOP/s measured), "
        f"{found['date']}{ratio}:",
        "",
        *markdown(head, rows),
    ]


def sharing(found: dict) -> list[str]:
    seconds = {name: side["run_s"]["median"] for name, side in found["sides"].items()}
    return [
        "A step on 16 responses of 256 tokens to one prompt of 1,024, MID: "
        f"{seconds['group']:.1f} s with the prompt once, {seconds['unshared']:.1f} s with a prompt "
        f"for each, {found['time_ratio']} of the time for {found['token_ratio']} of the tokens; "
        f"the gradients differ by {found['gradients']['difference']:.1e} of their largest entry.",
    ]


LAYOUTS = {
    "one": "one document",
    "packed": "16 documents",
    "group": "one prompt, 16 responses",
    "unshared": "the same, a prompt each",
}


def row_lengths(found: dict) -> list[str]:
    rows = [
        [
            f"{row['row_len']:,}",
            *(f"{row['sides'][name]['run_s']['median']:.2f}" for name in LAYOUTS),
            f"{row['sides']['one']['temp_mb']:,.0f}",
        ]
        for row in found["rows"]
    ]
    return [
        f"A step on one row, {found['model']}, by its length and what is in it; seconds, and MiB "
        "of temporary arrays of the first:",
        "",
        *markdown(["tokens", *LAYOUTS.values(), "MiB"], rows),
        "",
        f"![Step time by row length]({PLOT.relative_to(PAGE.parent)})",
    ]


def draw_row_lengths(found: dict) -> str:
    """The same as an SVG."""
    lines = {
        LAYOUTS[name]: [(r["row_len"], r["sides"][name]["run_s"]["median"]) for r in found["rows"]]
        for name in LAYOUTS
    }
    title = f"Seconds of a training step by row length ({found['model']}, one core)"
    return log_chart(title, "tokens of the row", "s", lines)


def small_figures() -> list[str]:
    fork, programs = load("fork"), load("programs")
    tiny = next(
        case["sides"]["npr_jax"]
        for case in load("decode")["cases"]
        if (case["model"], case["batch"]) == ("tiny", 64)
    )
    short, long = fork["prefix_tokens"]["1024"], fork["prefix_tokens"]["16384"]
    happened = programs["happened"]
    return [
        f"- A fork into {fork['width']} branches costs the host {short['fork_us']:.0f} µs behind "
        f"1,024 tokens and {long['fork_us']:.0f} µs behind 16,384; a join {short['join_us']:.0f} "
        f"and {long['join_us']:.0f} µs. No key is copied.",
        f"- At 64 lanes of the tiny model the host works {tiny['host_us_per_visit']:,.0f} µs per "
        f"visit, with {1 / tiny['visits_per_token']:,.0f} tokens a visit; the device waits for at "
        f"most {100 * tiny['device_wait_share']:.1f}% of the time.",
        f"- {programs['programs']:,} random programs of the scheduler ({happened['operations']:,} "
        f"operations, {happened['forks']:,} forks, {happened['preemptions']:,} preemptions): "
        f"{programs['failures']} failures.",
    ]


def serving() -> list[str]:
    """What the server costs; nothing until bench/serve.py has run."""
    if not (RESULTS / "serve.json").exists():
        return []
    found = load("serve")
    rows, others = [], []
    for line in found.values():
        if not isinstance(line, dict):
            continue
        if line["model"] == "peer":
            others.append(
                f"{line['streams']} streams {line['npr_jax']:,.0f} and {line['transformers']:,.0f}"
            )
            continue
        alone, served, ratios = line["in process"], line["server"], line["ratios"]
        rows.append(
            [
                line["model"],
                line["streams"],
                f"{alone['tokens_per_s']:,.0f}",
                f"{served['tokens_per_s']:,.0f}",
                f"{100 * ratios['tokens_per_s']:.0f}%",
                f"{1e3 * served['first_s']:,.0f}",
                f"{ratios['first_s']:.2f}",
                f"{1e3 * served['between_s']:,.0f}",
                f"{ratios['between_s']:.2f}",
                line["date"],
            ]
        )
    head = ["model", "streams", "in process, tokens/s", "server, tokens/s", "share"]
    head += ["first piece, ms", "ratio", "between pieces, ms", "ratio", "date"]
    beside = f" Tokens/s of npr_jax and of `transformers serve`: {'; '.join(others)}."
    return [
        "A closed loop of streams over HTTP against the same requests in process: the engine has "
        "one core, the client another (`python bench/serve.py`). `tiny` is the demo's model with "
        "branches, `smollm2` SmolLM2-135M in float32, lines of 64 tokens. One round each."
        + (beside if others else ""),
        "",
        *markdown(head, rows),
    ]


def traffic() -> list[str]:
    """What the TPU compiler makes of a decode step."""
    found = load("traffic")
    rows = [
        [
            row["model"],
            row["chip"] if row["chips"] == 1 else f"{row['chips']} x {row['chip']}",
            row["batch"],
            f"{row['need_mb'] / 1e3:.2f}",
            f"{row['plain']['moved_mb'] / 1e3:.2f}",
            f"{row['plain']['ratio']:.3f}",
            f"{row['filtered']['ratio']:.3f}",
            f"{row['filtered']['ratio_beside_keys']:.3f}",
        ]
        for row in found["rows"]
    ]
    head = ["model", "chip", "rows", "must, GB", "moves, GB", "ratio", "with top-p and top-k"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return [
        f"A decode step as compiled for TPUs ({versions}), {found['context']:,} tokens a row, "
        "bfloat16: bytes that it moves through a chip's main memory over those that it must "
        "(weights once, the keys and values that each row sees, the new ones), read from the "
        "compiled text; nothing was run. The last column leaves the keys out.",
        "",
        *markdown([*head, "without keys"], rows),
    ]


def laptop() -> str:
    """A real model on a laptop, for the README; nothing until bench/laptop.py has run."""
    if not LAPTOP.exists():
        return ""
    found = load("laptop")
    rows = [
        [
            row["width"],
            f"{row['text_s']:.1f}",
            f"{row['branches_s']:.1f}",
            row["speedup"],
            row["bound"],
            f"{100 * row['share_of_bound']:.0f}%",
            f"{row['step_1_ms']:.1f}",
            f"{row['step_n_ms']:.1f}",
        ]
        for row in found["rows"]
    ]
    head = ["branches", "as text, s", "parallel, s", "speed-up", "bound", "reached"]
    return "\n".join(
        [
            f"{found['model']}, float32, {found['cores']} CPU cores, one answer at a time: the "
            f"same given tokens, {found['branch_tokens']} a branch, decoded as one line of text "
            f"and with real branches (medians of {found['repeats']}, by turns). The bound is what "
            "a step of one row and a step of n rows allow: every step reads all weights, and n "
            "rows read them once. (`python bench/laptop.py`.)",
            "",
            *markdown([*head, "step of 1 row, ms", "of n rows, ms"], rows),
            "",
            f"![Speed-up by branches]({GAIN.relative_to(ROOT)})",
        ]
    )


def draw_laptop() -> str:
    """The same as an SVG."""
    found = load("laptop")
    lines = {
        name: [(1.0, 1.0), *((row["width"], row[key]) for row in found["rows"])]
        for name, key in (("tokens in a row", "ideal"), ("bound", "bound"), ("measured", "speedup"))
    }
    title = f"Times faster than as text, {found['model']}, {found['cores']} CPU cores"
    return line_chart(title, "branches", "times", lines)


def text() -> str:
    parts = [decoding(), parallel(), serving(), traffic(), training(), small_figures()]
    return "\n".join(line for part in parts if part for line in [*part, ""])


def replace_between(path: Path, begin: str, end: str, new: str, check: bool = False) -> bool:
    """Puts `new` between two marks of a file, unless it is only to be checked; returns whether it
    stood there."""
    old = path.read_text(encoding="utf-8")
    head, tail = old[: old.index(begin) + len(begin)], old[old.index(end) :]
    whole = f"{head}\n{new.rstrip()}\n{tail}"
    if not check:
        path.write_text(whole, encoding="utf-8")
    return whole == old


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    same = replace_between(PAGE, BEGIN, END, text(), check)
    same &= replace_between(README, GAIN_BEGIN, GAIN_END, laptop(), check)
    if check:
        sys.exit(0 if same else 1)
    if LAPTOP.exists():
        GAIN.write_text(draw_laptop(), encoding="utf-8")
    if TRAINING.exists() and "lengths" in load("train"):
        PLOT.write_text(draw_row_lengths(load("train")["lengths"]), encoding="utf-8")


if __name__ == "__main__":
    main()
