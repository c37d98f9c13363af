"""Countdown: its check, its generator, and the two searches, whose texts are executed anew here by
an interpreter that shares nothing with them."""

import dataclasses
import itertools
import random
import re
from fractions import Fraction

import numpy as np
import pytest

from npr_jax import demo
from npr_jax.answers import extract
from npr_jax.base.config import load_config
from npr_jax.demo import countdown
from npr_jax.demo.blocks import DEFECTS
from npr_jax.demo.countdown import (
    LAPTOP,
    LARGE,
    Game,
    Puzzle,
    Teacher,
    check,
    draw,
    expression,
    lessons,
    moves,
    reachable,
    search_line,
    search_tree,
)
from npr_jax.demo.table import cells, shortfalls
from npr_jax.demo.task import find_task
from npr_jax.train import beta, papo, zero
from npr_jax.tree import TagIds
from npr_jax.tree.format import check_format

OPERATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
SMALL = Game(numbers=4, highest=12, targets=(5, 40), largest=99, ranked=True, width=3)


# ---- the interpreter


def compute(text, numbers):
    """The numbers after an operation, which has to be true and use two of them."""
    a, sign, b, c = OPERATION.fullmatch(text).groups()
    a, b, c = int(a), int(b), int(c)
    assert {"+": a + b, "-": a - b, "*": a * b, "/": b and Fraction(a, b)}[sign] == c >= 0, text
    left = list(numbers)
    left.remove(a)
    left.remove(b)
    return sorted([*left, c], reverse=True)


def node(text, numbers):
    """The numbers of a child, "12-3=9|9,7": its parent's, two replaced by one that they make."""
    operation, _, left = text.partition("|")
    stated = [int(n) for n in left.split(",")]
    assert stated == compute(operation, numbers), text
    return operation, stated


def execute_line(text, numbers, chain, target):
    """The operations that a search in one line finds from numbers, or None."""
    stack, found = {len(numbers): (numbers, chain)}, None
    for line in text.split("\n"):
        assert found is None, "the search goes on behind what it found"
        head, colon, leaves = line.rpartition(":")
        size = len(numbers)
        if colon:
            size = 1 + head.count(",")
            above, known = stack[size + 1]
            operation, stated = node(head, above)
            stack[size] = stated, (*known, operation)
        if leaves and size == 2:
            own, known = stack[2]
            for leaf, sign in re.findall("([^<>]+)([<>]?)", leaves):
                assert found is None
                (made,) = compute(leaf, own)
                assert sign == {True: ">", False: "<"}.get(
                    made > target if made != target else None, ""
                )
                if not sign:
                    found = (*known, leaf)
        elif leaves:
            assert stack[1][0] == [int(leaves)] if size == 1 and colon else numbers == [int(leaves)]
            found = (stack[1][1] if colon else chain) if int(leaves) == target else None
        else:
            assert size > 2
    return found


def execute_block(text, numbers, chain, target):
    """What the first step of a block that finds something finds, or None; and the children."""
    guideline, rest = re.fullmatch(
        r"<guideline>\n(.*?)\n</guideline>\n(.*)", text, re.DOTALL
    ).groups()
    plans = re.findall(r"<plan>(\d+):(.*?)</plan>\n?", guideline)
    assert [int(n) for n, _ in plans] == [*range(1, len(plans) + 1)]
    assert len({plan for _, plan in plans}) == len(plans)
    first, here = None, rest
    for number, plan in plans:
        operation, stated = node(plan, numbers)
        body, here = step_of(here, number)
        work, _, told = body.rpartition("|")
        longer = (*chain, operation)
        if work.startswith("\n"):
            found, _ = execute_block(work.strip("\n"), stated, longer, target)
        else:
            found = execute_line(work, stated, longer, target)
        assert told == (";".join(found) if found else "none")
        if found:  # all of it, from the numbers of the problem
            first = first or found
    takeaway = re.fullmatch(r"<takeaway>\n(.*)\n</takeaway>", here).group(1)
    assert takeaway == (";".join(first) if first else "none")
    return first, len(plans)


def step_of(text, number):
    """The body of the step that a text begins with, and what follows it."""
    head = f"<step>\n{number}:"
    assert text.startswith(head)
    depth = 0
    for match in re.finditer(r"</?step>", text):
        depth += 1 if match.group() == "<step>" else -1
        if not depth:
            body = text[len(head) : match.start()].removesuffix("\n")
            return body, text[match.end() :].removeprefix("\n")
    raise AssertionError("a step has no end")


def execute(puzzle, text):
    """Whether an answer finds the target, and how many children it has at the top (0: a line)."""
    body, _, box = text.rpartition("\n")
    numbers, children = list(puzzle.numbers), 0
    if body.startswith("<"):
        found, children = execute_block(body, numbers, (), puzzle.target)
    else:
        work, _, told = body.rpartition("|")
        found = execute_line(work, numbers, (), puzzle.target)
        assert told == (";".join(found) if found else "none")
    boxed = extract(box)
    assert box == f"\\boxed{{{boxed}}}"
    if found:
        assert check(boxed, puzzle.answer)
        left = numbers
        for operation in found:
            left = compute(operation, left)
        assert left == [puzzle.target]
    else:
        assert boxed == "none"
    return found is not None, children


# ---- the searches


@pytest.mark.parametrize("game", [LAPTOP, SMALL, LARGE], ids=["laptop", "small", "large"])
@pytest.mark.parametrize("depth", [0, 1, 2], ids=["line", "block", "nested"])
def test_what_a_search_writes_is_true(game, depth):
    right = []
    many = {LAPTOP: 200, SMALL: 40, LARGE: 10}[game]
    for puzzle in draw(many, np.random.default_rng(depth), game=game):
        most = 1 + puzzle.target % 10
        if depth:
            text = search_tree(puzzle, most, depth, game)
            assert text.count("<guideline>") > 1 or depth == 1
        else:
            text = search_line(puzzle, most, game)
        found, children = execute(puzzle, text)
        assert children == (min(most, len(moves(puzzle.numbers, game.largest))) if depth else 0)
        right.append(found)
    assert np.mean(right) > 0.2 and (game is LARGE or not all(right))


def test_line_and_block_search_the_same():
    """With all children both find what there is; with some, both find it or both do not."""
    for puzzle in draw(60, np.random.default_rng(3)):
        assert execute(puzzle, search_line(puzzle))[0]
        for most in (1, 3, 12):
            line, tree = search_line(puzzle, most), search_tree(puzzle, most)
            nested = search_tree(puzzle, most, depth=2)
            assert len({execute(puzzle, text)[0] for text in (line, tree, nested)}) == 1
            assert extract(line) == extract(tree) == extract(nested)


def test_the_interpreter_finds_faults():
    puzzle = Puzzle((9, 7, 3), 20)
    text = search_tree(puzzle, 4)
    assert execute(puzzle, text) == (True, 4)
    digits = [i for i, c in enumerate(text) if c.isdigit()]
    for i in digits:
        broken = f"{text[:i]}{(int(text[i]) + 1) % 10}{text[i + 1 :]}"
        with pytest.raises((AssertionError, ValueError, AttributeError)):
            execute(puzzle, broken)


# ---- the game


def brute_force(numbers):
    """Every value of every expression of all numbers, by all orders, shapes and signs."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for cut in range(1, len(numbers)):
        for left in itertools.combinations(range(len(numbers)), cut):
            others = [i for i in range(len(numbers)) if i not in left]
            for a, b in itertools.product(
                brute_force([numbers[i] for i in left]), brute_force([numbers[i] for i in others])
            ):
                found |= {a + b, a * b}
                if a >= b:
                    found.add(a - b)
                if b and Fraction(a, b).denominator == 1:
                    found.add(a // b)
    return found


def test_what_is_solvable_is_what_some_expression_makes():
    rng = np.random.default_rng(0)
    for size, highest in [(2, 20)] * 50 + [(3, 20)] * 420 + [(4, 99)] * 30:
        numbers = tuple(sorted(rng.integers(1, highest + 1, size).tolist(), reverse=True))
        assert reachable(numbers, 10**9) == brute_force(numbers)
        bounded = reachable(numbers, 99)
        assert bounded <= brute_force(numbers) and max(bounded, default=0) <= 99
    assert 27 in reachable((53, 31, 26, 22), 100) and 10 in reachable((8, 6, 4, 1), 100)


@pytest.mark.parametrize(
    "game, share, num",
    [
        (LAPTOP, 0.27, 1500),
        (dataclasses.replace(LAPTOP, highest=20, targets=(1, 50)), 0.17, 1500),
        (LARGE, 0.13, 300),
    ],
    ids=["laptop", "medium", "large"],
)
def test_how_many_draws_are_solvable(game, share, num):
    rng = np.random.default_rng(1)
    low, high = game.targets
    solvable = sum(
        int(rng.integers(low, high + 1))
        in reachable(
            tuple(sorted(rng.integers(1, game.highest + 1, game.numbers).tolist(), reverse=True)),
            10**9,
        )
        for _ in range(num)
    )
    assert abs(solvable / num - share) < (0.03 if num > 1000 else 0.05)


RIGHT = ["(12*3)-7", "12*3-7", "3*12-7", "((12*3)-7)", "(12)*3-(7)"]
WRONG = [
    *("12*3-7+0", "29", "", "none", "12*3", "12+3+7", "7-12*3", "-7+12*3", "12*3-07"),
    *("12*3-7 ", "12**3-7", "12//3-7", "1_2*3-7", "0b11*12-7", "12*3-7.0", "(12*3-7", "12(3)-7"),
    *("١٢*3-7", "(" * 99, "12*3-7" + "+0" * 60, "3*12-7-7+7", "12,3", "12*3\n-7", "1" * 99),
]


def test_an_answer_is_right_if_it_makes_the_target_of_the_numbers():
    reference = Puzzle((12, 7, 3), 29).answer
    assert [text for text in RIGHT if not check(text, reference)] == []
    assert [text for text in WRONG if check(text, reference)] == []
    cases = [("(8/4)*5", "4,5,8=10", True), ("(4/8)*20", "4,8,20=10", False)]
    cases += [("5/(3-3)", "3,3,5=0", False), ("(3-5)+12", "3,5,12=10", False)]
    cases += [("(5*0)+7", "0,5,7=7", True), ("5-5+7", "5,5,7=7", True), ("5+7", "5,5,7=12", False)]
    assert [check(text, of) for text, of, _ in cases] == [right for *_, right in cases]


def test_the_check_agrees_with_fractions_on_random_expressions():
    rng = random.Random(0)

    def grow(numbers):
        """An expression as text and its value, None where a rule of the game is broken."""
        if len(numbers) == 1:
            return str(numbers[0]), Fraction(numbers[0])
        cut = rng.randrange(1, len(numbers))
        (left, a), (right, b) = grow(numbers[:cut]), grow(numbers[cut:])
        sign, value = rng.choice("+-*/"), None
        if a is not None and b is not None and not (sign == "/" and b == 0):
            value = {"+": a + b, "-": a - b, "*": a * b, "/": b and a / b}[sign]
            value = value if value >= 0 and value.denominator == 1 else None
        return f"({left}{sign}{right})", value

    right = 0
    for _ in range(3000):
        numbers = [rng.randrange(1, 13) for _ in range(3)]
        text, value = grow(numbers)
        target = value if value is not None and rng.random() < 0.7 else rng.randrange(30)
        of = f"{','.join(map(str, sorted(numbers)))}={int(target)}"
        assert check(text, of) == (value == target), (text, of)
        right += value == target
    assert 300 < right < 2700


def test_a_chain_is_one_expression():
    chain = ("53-31=22", "22/22=1", "26+1=27")
    assert expression((53, 31, 26, 22), chain) == "26+((53-31)/22)"
    assert check(expression((53, 31, 26, 22), chain), "22,26,31,53=27")


# ---- the task


def test_a_lesson_without_a_block_is_what_one_child_has_to_search():
    rng, alone = np.random.default_rng(5), 0
    teacher = Teacher(0)
    for puzzle in lessons(400, rng):
        if puzzle.level == 2:
            text = teacher.answer(puzzle, rng)
            assert text == search_line(puzzle) and puzzle.budget is None
            alone += execute(puzzle, text)[0]
    assert 0.45 < alone / 200 < 0.75  # half are chosen so, of the others a few
    held_out = draw(100, rng)
    names = {one.answer for one in held_out}
    assert not any(one.answer in names for one in lessons(500, rng, held_out))


def test_problems_to_evaluate_on_are_none_that_are_taught():
    held_out = draw(200, np.random.default_rng((0, 2)))
    names = {one.answer for one in held_out}
    assert len(names) == 200 and all(one.budget is None for one in held_out)
    for more in (
        draw(3000, np.random.default_rng((0, 1)), held_out),
        lessons(3000, np.random.default_rng((0, 3)), held_out),
    ):
        assert not names & {one.answer for one in more}
        whole = [one for one in more if one.level == 3]
        assert all(one.target in brute_force(one.numbers) for one in whole[:200])
        assert all([*one.numbers] == sorted(one.numbers, reverse=True) for one in more)
    budgets = [one.budget for one in more if one.level == 3]
    assert 0.45 < np.mean([budget is None for budget in budgets]) < 0.55
    assert {*budgets} == {None, *range(11)}
    assert 0.45 < len(budgets) / len(more) < 0.55
    again = draw(200, np.random.default_rng((0, 2)))
    assert [one.problem for one in again] == [one.problem for one in held_out]
    assert Puzzle((12, 7, 3), 29).problem == "12,7,3~29?"
    assert Puzzle((12, 7, 3), 29, 4).problem == "12,7,3~29:4?"


def test_the_teacher_keeps_its_budget_and_breaks_the_format_as_it_says():
    tokenizer = demo.seed_model(countdown, 0).tokenizer
    tags, rng, teacher = TagIds.from_tokenizer(tokenizer), np.random.default_rng(0), Teacher(0)
    formed, longest = [], 0
    for puzzle in lessons(600, rng):
        text = teacher.answer(puzzle, rng)
        prompt = tokenizer.encode(puzzle.problem)
        ids = [*prompt, *tokenizer.encode(text), tokenizer.eos_token_id]
        assert tokenizer.decode(ids[:-1]) == puzzle.problem + text  # the words cover it
        good = not check_format(ids, len(prompt), tags, countdown.MOST_CHILDREN)
        if puzzle.level == 2:
            continue
        if good:
            _, children = execute(puzzle, text)
            assert children == min(
                puzzle.budget or children, len(moves(puzzle.numbers, LAPTOP.largest))
            )
        formed += [good] if puzzle.budget != 0 else []
        longest = max(longest, len(ids) - len(prompt))
    assert abs(np.mean(formed) - 0.35) < 0.08
    assert longest <= 480 and len(prompt) <= 32  # the limits in SETTINGS


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_of_a_block_breaks_the_format(defect):
    tokenizer = demo.seed_model(countdown, 0).tokenizer
    tags = TagIds.from_tokenizer(tokenizer)
    for i, puzzle in enumerate(draw(40, np.random.default_rng(1))):
        text = search_tree(puzzle, 5, defect=defect, hit=i % 10)
        if defect == "untagged":
            text = search_line(puzzle, 5)
        ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
        assert check_format(ids, 0, tags, countdown.MOST_CHILDREN)


def test_the_stages_have_room_for_what_the_task_asks_for(tmp_path):
    """Every child that three numbers have, and the longest answer, fit into every stage."""
    assert find_task("countdown") is countdown
    kinds = {"zero": zero.ZeroConfig, "beta": beta.BetaConfig, "papo": papo.PapoConfig}
    for stage, kind in kinds.items():
        settings = [*demo._paths(countdown, stage, tmp_path), *countdown.SETTINGS[stage]]
        config = load_config(kind, f"tiny_{stage}", settings)
        sizes = config.sample if stage == "beta" else config
        assert config.engine.max_branches >= max(
            len(moves(numbers, LAPTOP.largest))
            for numbers in itertools.combinations(range(LAPTOP.highest, 0, -1), 3)
        )
        assert (sizes.max_tokens, sizes.max_prompt_tokens) == (480, 32)
        train = config.fit.train if stage == "beta" else config.train
        assert train.row_len >= sizes.max_tokens + sizes.max_prompt_tokens
    assert config.check is check


SHOWN = {  # rows as a run that shows everything has them
    "seed sequential": {"format": 0.4, "accuracy": 0.5},
    "zero sequential": {"format": 0.9},
    "beta parallel": {"format": 0.99, "accuracy": 0.6, "children": 3.0},
    "papo parallel": {
        **{"format": 0.99, "accuracy": 0.9, "children": 6.0, "parallel": 1.0},
        **{"tokens": 300.0, "critical_path": 150.0},
    },
}
SHORT = [
    ("zero sequential", "format", 0.6, "Zero raises the format rate"),
    ("beta parallel", "format", 0.8, "Beta, in parallel, keeps the format"),
    ("papo parallel", "children", 3.5, "PAPO searches from more children"),
    ("papo parallel", "accuracy", 0.62, "PAPO adds accuracy"),
    ("papo parallel", "accuracy", 0.58, "PAPO is more accurate than the seed model"),
    ("papo parallel", "format", 0.8, "PAPO keeps the format"),
    ("papo parallel", "parallel", 0.9, "PAPO runs in parallel"),
    ("papo parallel", "critical_path", 250.0, "The critical path is short"),
]


def test_rows_that_show_everything_fall_short_nowhere():
    assert shortfalls(SHOWN, countdown.CHECKS) == []
    assert len(SHORT) == len(countdown.CHECKS)


@pytest.mark.parametrize("row, column, value, sentence", SHORT)
def test_each_shortfall_is_named(row, column, value, sentence):
    rows = SHOWN | {row: SHOWN[row] | {column: value}}
    assert any(line.startswith(sentence) for line in shortfalls(rows, countdown.CHECKS))


def test_children_are_shown_with_their_digits():
    assert cells({"format": 0.5, "tokens": 81.6, "children": 3.25}) == ["0.50", "82", "3.25"]
