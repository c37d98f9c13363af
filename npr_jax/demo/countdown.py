"""The demo's second task, Countdown: make the target of the numbers, each used once.

    problem   9,7,3~20?              or 9,7,3~20:4?, and then with at most four children
    answer    a plan for each child, an operation and the numbers that it leaves, 9*3=27|27,7; in
              its step the search from them; \\boxed{(9*3)-7}

Operations are + - * and exact /, the larger number first, so nothing is negative. A step ends
behind its last bar with what its parent needs of it: "none", or the operations that make the
target. Which children a parent has, and in which order, `best_moves` says. The same search as one
line, a child after another until one finds the target, is `search_line`, and what a budget of 0
asks for.

What a tiny model has to compare stands where it finds it: before the target a sign that stands
nowhere else, and behind each result, at once, how it compares with the target: ">" and "<" where it
is larger or smaller, and a bar where it is the target. Of two numbers that seldom are equal it
hardly learns whether they are; which is larger it learns from every result.

The task and both searches are those of Adaptive Parallel Reasoning (arXiv 2504.15466), in the tags
of this package.
"""

import ast
import dataclasses
import functools
import itertools
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np

from npr_jax.demo.blocks import DEFECTS, write_block
from npr_jax.demo.task import Posed
from npr_jax.model import PRESETS
from npr_jax.train.fit import FitConfig
from npr_jax.train.optimizer import OptimizerConfig
from npr_jax.train.step import TrainConfig

Numbers = tuple[int, ...]  # the largest first
Chain = tuple[str, ...]  # operations such as "12-3=9", one after the other
MOST_CHILDREN = 10
FEW_CHILDREN = 5  # that the teacher has at most where no budget is given


@dataclasses.dataclass(frozen=True)
class Game:
    """How large the problems are.

    Attributes:
      numbers: how many; highest: up to which, from 1.
      targets: the lowest and the highest.
      largest: results beyond it are left out of every search; numbers up to it are a word each.
      ranked: children are those that are best by `distance`, and in its order; else the first ones,
        as `moves` has them, which is easier to learn than it.
      width: children of a node of a search within a child, at most.
    """

    numbers: int = 3
    highest: int = 16
    targets: tuple[int, int] = (1, 30)
    largest: int = 30
    ranked: bool = False
    width: int = MOST_CHILDREN


LAPTOP = Game()
LARGE = Game(numbers=4, highest=99, targets=(10, 100), largest=100, ranked=True, width=5)
GAME = LAPTOP
ABOUT = """A problem is three numbers and a target, which + - * and / have to make of them, each
used once. A step searches from one first operation on."""
SYMBOLS = (
    "\\boxed{",
    "}",
    "\n",
    *map(str, range(GAME.largest + 1)),
    *"+-*/=()",
    *",:;|<>~?",
    "none",
)
MODEL = PRESETS["tiny"]
FIT = FitConfig(
    train=TrainConfig(
        optimizer=OptimizerConfig(
            learning_rate=4e-3, schedule="cosine", final_learning_rate=2e-4, warmup=15
        ),
        row_len=512,
        row_lengths=1,
        micro_rows=2,
        checkpoint_every=100,
    ),
    batch=16,
    steps=1200,
)
_ENGINE = ("engine.max_branches=12", "engine.pages=2048")  # all children that three numbers have
SETTINGS = {
    "zero": (*_ENGINE, "max_tokens=480"),
    "beta": (
        *_ENGINE,
        "sample.max_tokens=480",
        "sample.num_problems=1024",  # of fewer it would forget the rest
        "sample.batch=256",
        "fit.steps=100",
        "fit.train.optimizer.learning_rate=1e-3",
        "fit.train.optimizer.final_learning_rate=1e-4",
    ),
    "papo": (*_ENGINE, "max_tokens=480"),
}
COLUMNS = {"children": "branches"}

# (what it shows, measured from the rows by name, at least)
CHECKS = (
    (
        "Zero raises the format rate",
        lambda r: r["zero sequential"]["format"] - r["seed sequential"]["format"],
        0.3,
    ),
    ("Beta, in parallel, keeps the format", lambda r: r["beta parallel"]["format"], 0.9),
    (
        "PAPO searches from more children",
        lambda r: r["papo parallel"]["children"] - r["beta parallel"]["children"],
        1.0,
    ),
    (
        "PAPO adds accuracy",
        lambda r: r["papo parallel"]["accuracy"] - r["beta parallel"]["accuracy"],
        0.05,
    ),
    (
        "PAPO is more accurate than the seed model",
        lambda r: r["papo parallel"]["accuracy"] - r["seed sequential"]["accuracy"],
        0.1,
    ),
    ("PAPO keeps the format", lambda r: r["papo parallel"]["format"], 0.9),
    ("PAPO runs in parallel", lambda r: r["papo parallel"]["parallel"], 0.95),
    (
        "The critical path is short (share of tokens saved)",
        lambda r: 1 - r["papo parallel"]["critical_path"] / r["papo parallel"]["tokens"],
        0.3,
    ),
)
ALONE = 0.5  # share of the lessons that are what one child has to search
DEFECTIVE = 0.65  # share of the teacher's answers that break the format


class Puzzle(NamedTuple):
    """A problem, with a `budget` of children or without one."""

    numbers: Numbers
    target: int
    budget: int | None = None

    @property
    def answer(self) -> str:
        """What `check` needs of it."""
        return f"{','.join(map(str, self.numbers))}={self.target}"

    @property
    def problem(self) -> str:
        """The prompt."""
        budget = "" if self.budget is None else f":{self.budget}"
        return f"{','.join(map(str, self.numbers))}~{self.target}{budget}?"

    @property
    def level(self) -> int:
        """How many numbers there are."""
        return len(self.numbers)


# ---- the game


class Move(NamedTuple):
    """An operation on two of the numbers, "12-3=9", and all numbers that it leaves."""

    operation: str
    numbers: Numbers

    @property
    def text(self) -> str:
        """The operation, and behind a bar what it leaves."""
        return f"{self.operation}|{','.join(map(str, self.numbers))}"


def _sorted(numbers: Iterable[int]) -> Numbers:
    return tuple(sorted(numbers, reverse=True))


@functools.lru_cache(1 << 16)
def moves(numbers: Numbers, largest: int) -> tuple[Move, ...]:
    """All moves in the order of the pairs and of + * - /; of those that leave the same numbers the
    first."""
    found: dict[Numbers, Move] = {}
    for i, j in itertools.combinations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]  # b is no larger, for they are sorted
        others = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
        results = {"+": a + b, "*": a * b, "-": a - b}
        if b and a % b == 0:
            results["/"] = a // b
        for sign, result in results.items():
            if result <= largest:
                left = _sorted((*others, result))
                found.setdefault(left, Move(f"{a}{sign}{b}={result}", left))
    return tuple(found.values())


@functools.lru_cache(1 << 16)
def reachable(numbers: Numbers, largest: int) -> frozenset[int]:
    """Every number that all of them together make."""
    if len(numbers) == 1:
        return frozenset(numbers)
    return frozenset().union(*(reachable(m.numbers, largest) for m in moves(numbers, largest)))


def distance(numbers: Numbers, target: int) -> int:
    """How far the numbers are from divisors of the target above 1 (the heuristic of APR)."""
    divisors = [f for f in range(2, target + 1) if target % f == 0] or [target]
    return sum(min(abs(number - f) for f in divisors) for number in numbers)


def best_moves(numbers: Numbers, target: int, most: int, game: Game) -> list[Move]:
    """The moves that become children, at most so many; by what, says `Game.ranked`."""
    found = list(moves(numbers, game.largest))
    if game.ranked:
        found.sort(key=lambda move: distance(move.numbers, target))
    return found[:most]


def check(prediction: str, reference: str) -> bool:
    """Whether an expression makes the target of numbers, `Puzzle.answer`: each number used once,
    no difference below 0, no quotient that is not whole."""
    numbers, _, target = reference.partition("=")
    if len(prediction) > 100 or not re.fullmatch(r"[\d+*/()-]+", prediction, re.ASCII):
        return False
    try:
        tree = ast.parse(prediction, mode="eval").body
    except (SyntaxError, MemoryError, RecursionError):
        return False
    used: list[int] = []
    made = _value(tree, used)
    return made == int(target) and sorted(used) == sorted(map(int, numbers.split(",")))


def _value(node: ast.expr, used: list[int]) -> int | None:
    """What an expression is worth, or None; the numbers in it are added to `used`."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return node.value
    if not isinstance(node, ast.BinOp):
        return None
    a, b = _value(node.left, used), _value(node.right, used)
    if a is None or b is None:
        return None
    match node.op:
        case ast.Add():
            return a + b
        case ast.Mult():
            return a * b
        case ast.Sub() if a >= b:
            return a - b
        case ast.Div() if b and a % b == 0:
            return a // b
    return None


# ---- problems


def draw(
    num: int, rng: np.random.Generator, exclude: Collection[Posed] = (), game: Game | None = None
) -> list[Puzzle]:
    """`num` solvable puzzles without a budget, other numbers or another target each, and than those
    of `exclude`."""
    seen, found = {one.answer for one in exclude}, []
    while len(found) < num:
        puzzle = _draw(rng, game or GAME)
        if puzzle.answer not in seen:
            seen.add(puzzle.answer)
            found.append(puzzle)
    return found


def lessons(num: int, rng: np.random.Generator, exclude: Collection[Posed] = ()) -> list[Puzzle]:
    """`num` puzzles to be taught, none of `exclude`, and of these half have a budget; every other
    one is left to one of its children: what the child has to search is the puzzle. It is short, and
    half of such children find the target, as few children of an answer do."""
    seen, found = {one.answer for one in exclude}, []
    while len(found) < num:
        puzzle = _draw(rng, GAME)
        if puzzle.answer not in seen:
            budget = int(rng.integers(MOST_CHILDREN + 1)) if rng.random() < 0.5 else None
            found.append(
                _child(puzzle, rng) if rng.random() < ALONE else puzzle._replace(budget=budget)
            )
    return found


def _child(puzzle: Puzzle, rng: np.random.Generator) -> Puzzle:
    left = [move.numbers for move in moves(puzzle.numbers, GAME.largest)]
    if rng.random() < 0.5:
        left = [numbers for numbers in left if puzzle.target in reachable(numbers, GAME.largest)]
    return Puzzle(left[rng.integers(len(left))], puzzle.target)


def _draw(rng: np.random.Generator, game: Game) -> Puzzle:
    target = int(rng.integers(game.targets[0], game.targets[1] + 1))
    while True:
        numbers = _sorted(rng.integers(1, game.highest + 1, game.numbers).tolist())
        if target in reachable(numbers, game.largest):
            return Puzzle(numbers, target)


# ---- the searches


def search(
    numbers: Numbers, target: int, chain: Chain, most: int, game: Game
) -> tuple[str, Chain | None]:
    """A depth-first search as text, and the operations that it found, or None.

    Of two numbers all results are tried, behind each that is not the target whether it is larger
    or smaller; of more, children are a line each, and behind its colon is the search from there.

    Args:
      chain: the operations that led to the numbers; most: children at most, that of others being
        `game.width`.
    """
    if len(numbers) == 1:
        return str(numbers[0]), chain if numbers[0] == target else None
    last, parts, found = len(numbers) == 2, [], None
    for move in moves(numbers, game.largest) if last else best_moves(numbers, target, most, game):
        longer = (*chain, move.operation)
        if last:
            (result,) = move.numbers
            found = longer if result == target else None
            parts.append(move.operation + ("" if found else ">" if result > target else "<"))
        else:
            text, found = search(move.numbers, target, longer, game.width, game)
            parts.append(
                f"{move.text}:{text}" if len(move.numbers) == 2 else f"{move.text}:\n{text}"
            )
        if found:
            break
    return ("" if last else "\n").join(parts), found


def spawn(
    numbers: Numbers,
    target: int,
    chain: Chain,
    most: int,
    game: Game,
    depth: int = 1,
    defect: str | None = None,
    hit: int = 0,
) -> tuple[str, Chain | None]:
    """A block whose steps search from a child each, and what the first that found something did.

    Args:
      chain, most: as in `search`; depth: levels of blocks, of which steps have those below the
        first; defect, hit: as in `write_block`.
    """
    children, steps, first = best_moves(numbers, target, most, game), [], None
    for move in children:
        arguments = move.numbers, target, (*chain, move.operation)
        if depth > 1 and len(move.numbers) > 1:
            text, found = spawn(*arguments, game.width, game, depth - 1)
            text = f"\n{text}\n"
        else:
            text, found = search(*arguments, game.width, game)
        steps.append(f"{text}|{outcome(found)}")
        first = first or found
    plans, hit = [move.text for move in children], hit % len(children)
    return write_block(plans, steps, outcome(first), defect, hit, plans[hit]), first


def outcome(chain: Chain | None) -> str:
    """What a search has found, as it is told."""
    return ";".join(chain) if chain else "none"


def expression(numbers: Numbers, chain: Chain) -> str:
    """The operations of a chain as one expression of the numbers."""
    texts = [(number, str(number)) for number in numbers]

    def take(value: int) -> str:
        place = max(i for i, (known, _) in enumerate(texts) if known == value)
        return texts.pop(place)[1]

    for operation in chain:
        a, sign, b, result = re.findall(r"\d+|[-+*/]", operation)
        texts.append((int(result), f"({take(int(a))}{sign}{take(int(b))})"))
    return texts[0][1][1:-1]


def boxed(puzzle: Puzzle, chain: Chain | None) -> str:
    """The last line of an answer."""
    return f"\\boxed{{{expression(puzzle.numbers, chain) if chain else 'none'}}}"


def search_line(puzzle: Puzzle, most: int = MOST_CHILDREN, game: Game | None = None) -> str:
    """An answer without tags: at most so many children, one after the other."""
    text, found = search(puzzle.numbers, puzzle.target, (), most, game or GAME)
    return f"{text}|{outcome(found)}\n{boxed(puzzle, found)}"


def search_tree(
    puzzle: Puzzle, most: int = MOST_CHILDREN, depth: int = 1, game: Game | None = None, **defect
) -> str:
    """An answer with a block of at most so many children; `defect`: as in `spawn`."""
    start = puzzle.numbers, puzzle.target, ()
    text, found = spawn(*start, most, game or GAME, depth, **defect)
    return f"{text}\n{boxed(puzzle, found)}"


class Teacher:
    """Searches without a mistake, with the puzzle's budget of children or with a few of them,
    and breaks the format more often than not. A budget of 0 is a line, and so is what a child has
    to search."""

    def __init__(self, seed: int):
        self.defective = DEFECTIVE

    def answer(self, puzzle: Puzzle, rng: np.random.Generator) -> str:
        """A response to the puzzle, up to and without the end-of-text token."""
        most = puzzle.budget
        if most == 0 or puzzle.level < GAME.numbers:
            return search_line(puzzle)
        if most is None:
            most = int(rng.integers(1, FEW_CHILDREN + 1))
        defect = DEFECTS[rng.integers(len(DEFECTS))] if rng.random() < self.defective else None
        if defect == "untagged":
            return search_line(puzzle, most)
        return search_tree(puzzle, most, defect=defect, hit=int(rng.integers(MOST_CHILDREN)))
