"""Benchmarks: the local ones are read whole, rows of the hub become questions, errors say where."""

import csv
import gzip
import json
from decimal import Decimal

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from conftest import shared_path

from npr_jax.answers import equal_many
from npr_jax.data.benchmarks import BENCHMARKS, Question, read_benchmark, split

LOCAL = {"aime25": 30, "amc23": 40, "hmmt25": 30, "math500": 500, "gsm8k": 1319}


@pytest.mark.parametrize("name", LOCAL)
def test_local_benchmarks_are_read_whole(name):
    source = read_benchmark(name, shared_path("benchmarks"))
    assert len(source.questions) == LOCAL[name]
    references = [question.answer for question in source.questions]
    assert all(equal_many([(answer, answer) for answer in references]))
    assert all(equal_many([(rf"\boxed{{{answer}}}", answer) for answer in references]))


def test_the_registry_pins_whole_commits():
    assert set(BENCHMARKS) == {*LOCAL, "aime24", "olympiad", "minerva", "zebralogic", "gpqa"}
    assert all(len(benchmark.revision) == 40 for benchmark in BENCHMARKS.values())


# Rows made up in the columns of each file; none is of the data set.
ROWS = {
    "aime24": {"id": 60, "problem": "1+1?", "solution": "It is 2.", "answer": "2"},
    "aime25": {"id": "0", "problem": "1+1?", "answer": "2"},
    "hmmt25": {"problem_idx": 1, "problem": "1+1?", "answer": "2", "problem_type": ["Algebra"]},
    "amc23": {"id": 0, "question": "1+1?", "answer": 2.0, "url": ""},
    "math500": {"unique_id": "test/1.json", "problem": "1+1?", "answer": "2", "level": 1},
    "olympiad": {"id": 1606, "question": "1+1?", "final_answer": ["$2$"], "unit": None},
    "minerva": {"question": "1+1?", "answer": "2"},
    "zebralogic": {
        "id": "z#1",
        "puzzle": "Two houses.",
        "question": "Who is first?",
        "choices": ["Eric", "Arnold", "Alice"],
        "answer": "Arnold",
    },
    "gpqa": {
        "Record ID": "rec1",
        "Question": "1+1?",
        "Correct Answer": "2\n",
        "Incorrect Answer 1": "3",
        "Incorrect Answer 2": "4",
        "Incorrect Answer 3": "5",
    },
    "gsm8k": {"question": "1+1?", "answer": "It is 2.\n#### 2"},
}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose data sets have one row each."""

    def download(repo, file, repo_type, revision):
        assert repo_type == "dataset"
        name = next(name for name, b in BENCHMARKS.items() if b[:3] == (repo, revision, file))
        return str(write(tmp_path / "hub" / repo / file, [ROWS[name]]))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_of_the_hub_become_questions(name, hub):
    source = read_benchmark(name)
    assert source.name == name and source.origin.startswith(BENCHMARKS[name].hub + "@")
    (question,) = source.questions
    if "choices" not in ROWS[name] and name != "gpqa":
        assert question.problem == "1+1?" and equal_many([("2", question.answer)]) == [True]
        return
    right = {"zebralogic": "Arnold", "gpqa": "2"}[name]
    lines = question.problem.splitlines()
    assert f"{question.answer}) {right}" in lines
    options = [line for line in lines if line[1:2] == ")"]
    assert [line[0] for line in options] == list("ABCD"[: len(options)])
    assert len(options) == {"zebralogic": 3, "gpqa": 4}[name]
    assert read_benchmark(name).questions == [question]  # the order is fixed


def test_the_order_of_choices_depends_on_the_id_alone(tmp_path):
    choices = ["w", "x", "y", "z"]
    rows = [
        {"id": i, "problem": "?", "choices": choices[i % 4 :] + choices[: i % 4], "answer": "x"}
        for i in range(400)
    ]
    path = write(tmp_path / "a.jsonl", rows)
    letters = [question.answer for question in read_benchmark(f"mine={path}").questions]
    assert all(70 < letters.count(letter) < 130 for letter in "ABCD")
    turned = [row | {"choices": row["choices"][::-1]} for row in rows]
    path = write(tmp_path / "b.jsonl", turned)
    assert letters == [question.answer for question in read_benchmark(f"mine={path}").questions]


def test_files_of_ones_own(tmp_path):
    path = tmp_path / "mine.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write('{"problem": "1+1?", "answer": 2}\n\n{"id": 7, "problem": "a", "answer": "b"}\n')
    source = read_benchmark(f"mine={path}")
    assert source.questions == [Question("1", "1+1?", "2"), Question("7", "a", "b")]
    assert source.origin == str(path)
    named = tmp_path / "aime24.jsonl"
    write(named, [{"problem": "?", "answer": "1"}])
    assert read_benchmark("aime24", tmp_path).origin == str(named)
    assert split("aime24=x=y.jsonl") == ("aime24", "x=y.jsonl")


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not valid JSON"),
        ('["problem"]', "no object"),
        ('{"problem": "?"}', '"answer" is None'),
        ('{"problem": "?", "answer": "1", "id": 1.5}', '"id" is 1.5'),
        ('{"problem": "?", "answer": "1", "id": "1"}', "id '1' is there twice"),
        ('{"problem": "?", "answer": "a", "choices": ["a", "a"]}', "different texts"),
        ('{"problem": "?", "answer": "c", "choices": ["a", "b"]}', "none of the choices"),
    ],
)
def test_a_bad_row_is_named(line, message, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"problem": "?", "answer": "1"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        read_benchmark(f"mine={path}")
    assert f"{path}:2: " in str(error.value)


@pytest.mark.parametrize(
    "value, answer",
    [
        (0.00001, "0.00001"),
        (1e16, "10000000000000000"),
        (pyarrow.scalar(0.1, pyarrow.float32()), "0.1"),
        (Decimal("0.0000001"), "0.0000001"),
        (b"1/2", "1/2"),
    ],
)
def test_parquet_gives_texts_and_numbers_as_they_are(value, answer, tmp_path):
    path = tmp_path / "mine.parquet"
    # Bytes that are no text do no harm where nobody asks for them.
    row = {"problem": "é?".encode(), "answer": value, "image": b"\xff"}
    pyarrow.parquet.write_table(pyarrow.table({key: [x] for key, x in row.items()}), path)
    assert read_benchmark(f"mine={path}").questions == [Question("1", "é?", answer)]
    row = {"problem": b"\xff", "answer": value}
    pyarrow.parquet.write_table(pyarrow.table({key: [x] for key, x in row.items()}), path)
    with pytest.raises(ValueError, match=r"mine.parquet:1: \"problem\" is .*no UTF-8"):
        read_benchmark(f"mine={path}")


def test_damaged_parquet_is_named(tmp_path):
    path = write(tmp_path / "mine.parquet", [{"problem": "1+1?", "answer": str(i)} for i in "ab"])
    whole = path.read_bytes()
    for damaged in (b"", whole[:-20], b"PAR1" + b"\xff" * 30 + whole[34:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"mine.parquet cannot be read as parquet: "):
            read_benchmark(f"mine={path}")


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "problem,answer\n1+1?,2\nWhat is 1,000+1?,1001\n",
            r"mine.csv:2: \['1001'\] stands behind",
        ),
        ('problem,answer\n1+1?,2\n"What is 1+1?,2\n', "mine.csv is no whole CSV file"),
        ('problem,answer\n"1+1"?,2\n', "mine.csv is no whole CSV file"),
        ("problem,answer,answer\n1+1?,2,3\n", "mine.csv has a column twice"),
    ],
)
def test_csv_that_can_be_read_in_two_ways_is_refused(text, message, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_benchmark(f"mine={path}")


def test_columns_that_the_hub_does_not_have_are_named(hub, monkeypatch):
    monkeypatch.setitem(ROWS, "minerva", {"problem": "?", "answer": "1"})
    with pytest.raises(ValueError, match=r"test.jsonl:1: there is no 'question'"):
        read_benchmark("minerva")


def test_a_benchmark_that_is_not_to_be_had_says_where_it_was_looked_for(tmp_path, monkeypatch):
    def download(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(FileNotFoundError) as error:
        read_benchmark("hmmt25", tmp_path)
    for word in ("hmmt25.jsonl", "hmmt_feb_2025.jsonl.gz", "MathArena", "no network", "=FILE"):
        assert word in str(error.value)
    with pytest.raises(ValueError, match=r"'aime' is unknown; there are aime24, aime25"):
        read_benchmark("aime")
    with pytest.raises(ValueError, match="NAME=FILE"):
        read_benchmark("../a=b")
    with pytest.raises(FileNotFoundError):
        read_benchmark(f"mine={tmp_path / 'none.jsonl'}")
