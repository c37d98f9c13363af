"""The demo's first task: sums of small groups. With the imperfect teacher of its seed model.

    problem   A:7+4;B:6*2;C:7*6?       each group modulo 10; the answer is the sum of the groups
    answer    a plan and a step per group, a takeaway that adds the values up, \\boxed{5}

The teacher stands in for an instruction-tuned model. It has misconceptions (some facts have a fixed
wrong value that it believes most of the time: noise that is independent would be removed by greedy
decoding alone), and it breaks the format more often than not.
"""

import dataclasses
import itertools
from collections.abc import Collection

import numpy as np

from npr_jax.answers import equal
from npr_jax.demo.blocks import DEFECTS, write_block
from npr_jax.demo.task import Posed
from npr_jax.model import PRESETS
from npr_jax.model.tokenizer import DEMO_SYMBOLS
from npr_jax.train.fit import FitConfig
from npr_jax.train.optimizer import OptimizerConfig
from npr_jax.train.step import TrainConfig

ABOUT = """A problem has two to four groups, each a sum or a product modulo ten, and its answer is
the sum of their values modulo ten. A step works out one group."""
SYMBOLS, MODEL = DEMO_SYMBOLS, PRESETS["tiny"]
FIT = FitConfig(
    train=TrainConfig(
        optimizer=OptimizerConfig(
            learning_rate=4e-3, schedule="cosine", final_learning_rate=4e-4, warmup=15
        ),
        row_len=512,
        row_lengths=1,
        micro_rows=4,
        checkpoint_every=100,
    ),
    batch=32,
    steps=700,
)
SETTINGS: dict[str, tuple[str, ...]] = {}
COLUMNS: dict[str, str] = {}
check = equal

# (what it shows, measured from the rows by name, at least)
CHECKS = (
    (
        "Zero raises the format rate",
        lambda r: r["zero sequential"]["format"] - r["seed sequential"]["format"],
        0.3,
    ),
    (
        "Zero raises the accuracy",
        lambda r: r["zero sequential"]["accuracy"] - r["seed sequential"]["accuracy"],
        0.1,
    ),
    (
        "Zero, decoded in parallel, loses half of its accuracy",
        lambda r: 0.5 * r["zero sequential"]["accuracy"] - r["zero parallel"]["accuracy"],
        0.0,
    ),
    ("Beta, in parallel, keeps the format", lambda r: r["beta parallel"]["format"], 0.95),
    (
        "Beta, in parallel, is as accurate as Zero",
        lambda r: r["beta parallel"]["accuracy"] - r["zero sequential"]["accuracy"],
        -0.03,
    ),
    (
        "PAPO adds accuracy",
        lambda r: r["papo parallel"]["accuracy"] - r["beta parallel"]["accuracy"],
        0.05,
    ),
    ("Beta runs in parallel", lambda r: r["beta parallel"]["parallel"], 0.99),
    ("PAPO runs in parallel", lambda r: r["papo parallel"]["parallel"], 0.99),
    (
        "The critical path is short (share of tokens saved)",
        lambda r: 1 - r["papo parallel"]["critical_path"] / r["papo parallel"]["tokens"],
        0.2,
    ),
)

LETTERS = "ABCD"
TWO_BLOCKS = 0.15  # share of the problems of three or more groups that are answered in two blocks
MISCONCEIVED, BELIEVED = 0.25, 0.75  # share of facts with a wrong value; how often it is used
DEFECTIVE = 0.65  # share of the teacher's answers that break the format


@dataclasses.dataclass(frozen=True)
class Sum:
    """One problem: groups of (operation, a, b), and after how many of them a second block starts
    (0: one block)."""

    groups: tuple[tuple[str, int, int], ...]
    split: int = 0

    @property
    def problem(self) -> str:
        """The prompt."""
        groups = zip(LETTERS, self.groups, strict=False)
        return ";".join(f"{letter}:{a}{op}{b}" for letter, (op, a, b) in groups) + "?"

    @property
    def answer(self) -> str:
        """The right answer, a digit."""
        return str(sum(true_value(*group) for group in self.groups) % 10)

    @property
    def level(self) -> int:
        """How many groups there are."""
        return len(self.groups)


def true_value(op: str, a: int, b: int) -> int:
    """a + b or a * b modulo 10."""
    return (a + b if op == "+" else a * b) % 10


def draw(num: int, rng: np.random.Generator, exclude: Collection[Posed] = ()) -> list[Sum]:
    """`num` random tasks whose problems differ from each other and are not in `exclude`."""
    seen, tasks = {one.problem for one in exclude}, []
    while len(tasks) < num:
        size = int(rng.integers(2, 5))
        groups = tuple(
            ("+*"[rng.integers(2)], int(rng.integers(10)), int(rng.integers(10)))
            for _ in range(size)
        )
        split = int(rng.integers(2, size)) if size > 2 and rng.random() < TWO_BLOCKS else 0
        task = Sum(groups, split)
        if task.problem not in seen:
            seen.add(task.problem)
            tasks.append(task)
    return tasks


lessons = draw


class Teacher:
    """Answers tasks with misconceptions, which `seed` fixes, and format defects."""

    def __init__(self, seed: int):
        rng = np.random.default_rng((seed, 0))
        facts = [(op, a, b) for op in "+*" for a in range(10) for b in range(10)]
        chosen = rng.permutation(len(facts))[: int(MISCONCEIVED * len(facts))]
        self.wrong = {
            facts[i]: (true_value(*facts[i]) + int(rng.integers(1, 10))) % 10 for i in chosen
        }

    def value(self, fact: tuple[str, int, int], rng: np.random.Generator) -> int:
        """What the teacher takes a fact to be, this time."""
        if fact in self.wrong and rng.random() < BELIEVED:
            return self.wrong[fact]
        return true_value(*fact)

    def answer(self, task: Sum, rng: np.random.Generator) -> str:
        """A response to the task, up to and without the end-of-text token."""
        defect = DEFECTS[rng.integers(len(DEFECTS))] if rng.random() < DEFECTIVE else None
        return write(task, lambda fact: self.value(fact, rng), defect, rng)


def ideal(task: Sum) -> str:
    """The right response in the right format."""
    return write(task, lambda fact: true_value(*fact), None, None)


def write(task: Sum, value, defect: str | None, rng: np.random.Generator | None) -> str:
    """A response in which facts have the values `value(fact)`, with one defect in one block."""
    size = len(task.groups)
    cuts = [0, task.split, size] if task.split else [0, size]
    blocks, total = [], None
    for start, end in itertools.pairwise(cuts):
        lines = []
        chain = "S:" if total is None else f"S:{total}"
        for i in range(start, end):
            op, a, b = task.groups[i]
            result = value((op, a, b))
            lines.append((LETTERS[i], f"{a}{op}{b}={result}"))
            if total is None:
                total = result
                chain += f"{total}"
            else:
                total = value(("+", total, result))
                chain += f"+{result}={total}"
        blocks.append((lines, chain))
    broken = -1
    if defect:
        assert rng is not None  # it says where the defect is
        broken = int(rng.integers(len(blocks)))
    texts = [
        _block(lines, chain, defect if i == broken else None, rng)
        for i, (lines, chain) in enumerate(blocks)
    ]
    if defect == "untagged":
        texts = [_untagged(lines, chain) for lines, chain in blocks]
    return "\n".join(texts) + f"\n\\boxed{{{total}}}"


def _untagged(lines, chain: str) -> str:
    return "\n".join([*(f"{letter}:{line}" for letter, line in lines), chain])


def _block(lines, chain: str, defect: str | None, rng) -> str:
    hit = int(rng.integers(len(lines))) if defect else 0
    letters = [letter for letter, _ in lines]
    steps = [f"{letter}:{line}" for letter, line in lines]
    return write_block(letters, steps, chain, defect, hit, stray=f"{letters[hit]};")
