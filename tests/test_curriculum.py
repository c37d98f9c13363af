"""Levels of problems, the schedule over them, and the order that follows from both."""

import dataclasses

import numpy as np
import pytest
from train_toy import write_problems

from npr_jax.base.config import dump_config, load_config
from npr_jax.data.builders import BUILDERS, read_prepared
from npr_jax.data.curriculum import ByLevel, CurriculumConfig, order_of
from npr_jax.data.problems import read_problems, shuffled
from npr_jax.data.sources import FORMS, Problem, parse_row
from npr_jax.train import papo, zero
from npr_jax.train.inputs import problems_content
from npr_jax.train.rl import Feed

PROBLEMS = [Problem(f"p{i}", str(i), (3, 1, 7)[i % 3]) for i in range(30)]
MOVING = CurriculumConfig(problems=200)


def feed(curriculum=MOVING, problems=PROBLEMS):
    return Feed(problems, [[i] for i in range(len(problems))], 0, 1, curriculum=curriculum)


def levels(order, first, last, problems=PROBLEMS):
    return [problems[order[i]].level for i in range(first, last)]


def test_shares_move_from_the_lowest_level_to_the_highest():
    found = [MOVING.shares(3, place).tolist() for place in (0, 50, 100, 150, 200, 10**6)]
    assert found == [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1], [0, 0, 1]]
    some = dataclasses.replace(MOVING, mixed=0.3)
    np.testing.assert_allclose(some.shares(3, 50), [0.45, 0.45, 0.1])
    for mixed in (0.0, 0.3, 1.0):
        one = dataclasses.replace(MOVING, mixed=mixed)
        for place in range(0, 300, 7):
            assert abs(one.shares(4, place).sum() - 1) < 1e-12 and min(one.shares(4, place)) >= 0
    assert dataclasses.replace(MOVING, mixed=1.0).shares(4, 0).tolist() == [0.25] * 4


def test_draws_follow_the_shares():
    many = [Problem(f"p{i}", "0", i % 3) for i in range(300)]
    config = CurriculumConfig(problems=6000, mixed=0.2)
    order = ByLevel(many, config, 5)
    drawn = np.eye(3)[levels(order, 0, 9000, many)]
    for first in range(0, 9000, 1000):
        expected = np.mean([config.shares(3, i) for i in range(first, first + 1000)], axis=0)
        assert np.abs(drawn[first : first + 1000].mean(axis=0) - expected).max() < 0.05


def test_the_first_problems_are_easy_and_the_last_hard():
    order = ByLevel(PROBLEMS, MOVING, 0)
    assert {*levels(order, 0, 3)} <= {1, 3} and {*levels(order, 200, 300)} == {7}
    means = [np.mean(levels(order, first, first + 50)) for first in range(0, 250, 50)]
    assert means == sorted(means)


def test_every_problem_of_a_level_comes_before_one_comes_again():
    order = ByLevel(PROBLEMS, MOVING, 0)
    last = [order[i] for i in range(300, 500)]
    start = sum(level == 7 for level in levels(order, 0, 300)) % 10
    epochs = [sorted(last[i : i + 10]) for i in range(10 - start, 190, 10)]
    assert all(epoch == [i for i in range(30) if i % 3 == 2] for epoch in epochs)
    assert last[10:20] != last[20:30]


def test_any_place_is_the_same_whenever_it_is_asked_for():
    """So the position is all the state there is: a run that goes on draws as it would have."""
    whole = feed()
    taken = [whole.take(7) for _ in range(40)]
    for done in (0, 1, 13, 39):
        again = feed()
        again.position = done * 7
        assert again.problem(3) == whole.problem(3)
        assert [again.take(7) for _ in range(done, 40)] == taken[done:]
    assert [order_of(PROBLEMS, MOVING, 0, 2)[i] for i in range(50)] != [
        order_of(PROBLEMS, MOVING, 0, 1)[i] for i in range(50)
    ]


def test_without_a_curriculum_nothing_changes():
    plain = feed(None)
    order = shuffled(30, 0, 1)
    assert [plain.problem(i) for i in range(90)] == [PROBLEMS[int(order[i])] for i in range(90)]
    flat = [problem._replace(level=0) for problem in PROBLEMS]
    prompts = [[i] for i in range(30)]
    assert problems_content(PROBLEMS, prompts) == problems_content(flat, prompts)
    assert problems_content(PROBLEMS, prompts, True) != problems_content(flat, prompts, True)


def test_the_level_of_a_batch_is_told():
    one = feed()
    found = [one.problem(i).level for i in range(40, 50)]
    assert one.level(40, 50) == {"level": sum(found) / 10} and one.level(40, 40) == {}


def test_a_curriculum_without_levels_is_refused():
    with pytest.raises(
        ValueError, match=r"all 3 problems have level 4: needed are two or more levels"
    ):
        feed(problems=[Problem(str(i), "0", 4) for i in range(3)])


@pytest.mark.parametrize("stage", [zero.ZeroConfig, papo.PapoConfig])
def test_it_is_a_key_of_the_stages(stage):
    name = f"tiny_{stage.command}"
    config = load_config(stage, name, ["curriculum.problems=64", "curriculum.mixed=0.25"])
    assert config.curriculum == CurriculumConfig(problems=64, mixed=0.25)
    assert "curriculum: null" in dump_config(load_config(stage, name))
    for bad in ("{problems: 0}", "{mixed: 0.5}", "{problems: 1, mixed: 2}"):
        with pytest.raises(ValueError, match=r"curriculum\.(problems|mixed)"):
            load_config(stage, name, [f"curriculum={bad}"])


def test_levels_are_read_from_every_form(tmp_path):
    assert parse_row(b'{"problem": "x", "answer": 1, "level": 3}', FORMS["jsonl"]).level == 3
    for text, level in (("Level 5", 5), ("Level ?", 0)):
        row = f'{{"problem": "x", "solution": "\\\\boxed{{1}}", "level": "{text}"}}'.encode()
        assert parse_row(row, FORMS["math"]).level == level
    path = tmp_path / "raw.jsonl"
    path.write_text(
        '{"problem": "a", "answer": 1, "level": 2}\n{"problem": "b", "answer": 2}\n'
        '{"problem": "c", "answer": 3, "level": "Level 4"}\n'
    )
    known = [Problem("a", "1", 2), Problem("b", "2"), Problem("c", "3", 4)]
    assert read_problems(path) == known
    builder = BUILDERS["jsonl"](source=path, data_dir=tmp_path / "tfds")
    builder.download_and_prepare()
    assert read_prepared(builder.data_dir) == known


def test_problems_of_a_run_are_drawn_by_it(tmp_path):
    """What a stage asks in its first steps is easy, and later hard."""
    path = tmp_path / "problems.jsonl"
    write_problems(path, 40, seed=1)
    given = [problem._replace(level=i % 2) for i, problem in enumerate(read_problems(path))]
    one = Feed(given, [[i] for i in range(40)], 0, 2, curriculum=CurriculumConfig(problems=20))
    numbers = [prompt[0] for prompt in one.take(60)[0]]
    assert np.mean([n % 2 for n in numbers[:8]]) < 0.4 and {n % 2 for n in numbers[20:]} == {1}
