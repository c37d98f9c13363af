"""Raw files in their published forms become tfds data sets, and come back as they were."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import shared_path

from npr_jax.data.builders import BUILDERS, read_prepared
from npr_jax.data.problems import Problem, read_problems
from npr_jax.data.sources import FORMS, BadRow, parse_row, read_rows

GSM8K = [
    {"question": "How many?", "answer": "2 * 600 = <<2*600=1200>>1200 é\n#### 1,200"},
    {"question": "How few?", "answer": "#### -3"},
]
MATH = [
    {"problem": "a", "solution": "So \\boxed{1}, no: \\boxed{\\frac{1}{2}}.", "level": "Level 1"},
    {"problem": "b", "solution": "It is $\\boxed 7$.", "type": "Algebra"},
    {"problem": "c", "solution": "It is \\fbox{8}."},
]
JSONL = [{"problem": "1+1?", "answer": 2, "id": 1}, {"problem": "x", "answer": "\\pi"}]
ORZ = [
    [
        {"from": "human", "value": problem},
        {"from": "assistant", "ground_truth": {"value": answer}},
    ]
    for problem, answer in (("What is 1 + 1?", "2"), ("And\nhalf?", "\\frac{1}{2}"))
]


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


PUBLISHED = {
    "gsm8k": (jsonl(GSM8K), [("How many?", "1200"), ("How few?", "-3")]),
    "math": (jsonl(MATH), [("a", "\\frac{1}{2}", 1), ("b", "7"), ("c", "8")]),
    "jsonl": (jsonl(JSONL), [("1+1?", "2"), ("x", "\\pi")]),
    "orz57k": (
        json.dumps(ORZ, indent=2).encode(),
        [("What is 1 + 1?", "2"), ("And\nhalf?", "\\frac{1}{2}")],
    ),
}


tfds.disable_progress_bar()


def build(name, source, tmp_path):
    builder = BUILDERS[name](source=source, data_dir=tmp_path / "tfds")
    builder.download_and_prepare()
    return Path(builder.data_dir)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_each_published_form_is_read(name, packed, tmp_path):
    data, problems = PUBLISHED[name]
    source = tmp_path / "raw"
    source.write_bytes(gzip.compress(data) if packed else data)
    directory = build(name, source, tmp_path)
    assert read_problems(directory) == [Problem(*pair) for pair in problems]
    rows = tfds.builder_from_directory(directory).as_data_source(split="train")
    assert [int(rows[i]["line"]) for i in range(len(rows))] == list(range(1, len(problems) + 1))


def test_every_benchmark_goes_through(tmp_path):
    for path in sorted(shared_path("benchmarks").glob("*.jsonl*")):
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            rows = [json.loads(line) for line in file]
        expected = [Problem(row["problem"], row["answer"], row.get("level", 0)) for row in rows]
        made = read_prepared(build("jsonl", path, tmp_path / path.stem))
        assert made == expected == read_problems(path), path.name


def test_published_gsm8k_gives_the_answers_of_the_benchmark(tmp_path):
    problems, raw = [], []
    for row in read_rows(shared_path("benchmarks/gsm8k_train.jsonl.gz"), "line"):
        record = json.loads(row.raw)
        problems.append(Problem(record["problem"], record["answer"]))
        answer = f"{record['solution']}\n#### {int(record['answer']):,}"
        raw.append({"question": record["problem"], "answer": answer})
    source = tmp_path / "train.jsonl"
    source.write_bytes(jsonl(raw))
    assert read_prepared(build("gsm8k", source, tmp_path)) == problems


@pytest.mark.parametrize(
    "name, raw, reason",
    [
        ("jsonl", b'{"problem": "\xff", "answer": 1}', "not UTF-8"),
        ("jsonl", b'{"problem": "\\ud800", "answer": 1}', "not UTF-8"),
        ("jsonl", b'{"problem": "x"', "not JSON"),
        ("jsonl", b'{"problem": "x", "answer": NaN}', "not JSON"),
        ("jsonl", b"[" * 100_000, "not JSON"),
        ("jsonl", b'{"problem": "x", "answer": 1e999}', "wrong type"),
        ("jsonl", b'{"problem": "x", "answer": [1]}', "wrong type"),
        ("jsonl", b'{"problem": "x", "answer": true}', "wrong type"),
        ("jsonl", b'{"problem": 1, "answer": 1}', "wrong type"),
        ("jsonl", b'"problem"', "wrong type"),
        ("jsonl", b'{"problem": "x", "answer": 1, "level": "hard"}', "wrong type"),
        ("jsonl", b'{"problem": "x", "answer": 1, "level": -1}', "wrong type"),
        ("jsonl", b'{"problem": "x", "answer": 1, "level": 1.0}', "wrong type"),
        ("jsonl", b'{"problem": "x", "answer": 1, "level": true}', "wrong type"),
        (
            "math",
            b'{"problem": "x", "solution": "\\\\boxed{1}", "level": 9999999999}',
            "wrong type",
        ),
        ("jsonl", b'{"problem": " ", "answer": 1}', "empty problem"),
        ("jsonl", b'{"answer": 1}', "empty problem"),
        ("jsonl", b'{"problem": "x", "answer": null}', "no answer"),
        ("jsonl", b'{"problem": "x", "answer": " "}', "no answer"),
        ("gsm8k", b'{"question": "x", "answer": "12"}', "no answer"),
        ("gsm8k", b'{"question": "x", "answer": "12\\n#### "}', "no answer"),
        ("gsm8k", b'{"question": "x", "answer": 12}', "wrong type"),
        ("math", b'{"problem": "x", "solution": "12"}', "no answer"),
        ("math", b'{"problem": "x", "solution": "\\\\boxed{}"}', "no answer"),
        ("orz57k", b'{"problem": "x", "answer": 1}', "wrong type"),
        ("orz57k", b"[1, 2]", "wrong type"),
        ("orz57k", b'[{"from": "human", "value": "x"}]', "no answer"),
        ("orz57k", b'[{"from": "assistant", "ground_truth": {"value": "1"}}]', "empty problem"),
        (
            "orz57k",
            b'[{"from": "human", "value": "x"}, {"from": "assistant", "ground_truth": "1"}]',
            "wrong type",
        ),
    ],
)
def test_a_bad_row_has_its_reason(name, raw, reason):
    with pytest.raises(BadRow) as info:
        parse_row(raw, FORMS[name])
    assert info.value.reason == reason
    assert len(str(info.value).splitlines()) == 1 and len(str(info.value)) < 300


@pytest.mark.parametrize(
    "written, answer",
    [
        ("2", "2"),
        ("123456789012345678901", "123456789012345678901"),
        ("-12345678901234567890123456789012345", "-12345678901234567890123456789012345"),
        ("2.50", "2.50"),
        ("0.00001", "0.00001"),
        ("12345678901234567890.0", "12345678901234567890.0"),
        ("1e-5", "0.00001"),
        ("-1.25E+3", "-1250"),
        ("-2.5E-10", "-0.00000000025"),
        ("1e16", "10000000000000000"),
        ("1e-999999999", None),
        ("1e-99999999999999999999", None),
        ("0e999999999", None),
    ],
)
def test_an_answer_that_is_a_number_stays_as_it_is_written(written, answer):
    """A float would round a long one, and the text 2e-9 has Euler's number in it."""
    value = f'{{"value": {written}}}'.encode()
    rows = {
        "jsonl": b'{"problem": "x", "answer": ' + value[10:],
        "orz57k": b'[{"from": "human", "value": "x"}, {"from": "assistant", "ground_truth": '
        + value
        + b"}]",
    }
    for name, row in rows.items():
        if answer is not None:
            assert parse_row(row, FORMS[name]) == Problem("x", answer)
            continue
        with pytest.raises(BadRow) as info:
            parse_row(row, FORMS[name])
        assert info.value.reason == "wrong type"


@pytest.mark.parametrize(
    "bad, reason",
    [
        (b'["\xff\xfe", 1]', "not UTF-8"),
        (b'[{"from": ' + b"9" * 5000 + b"}]", "not JSON"),
        (b"[" * 2000 + b"]" * 2000, "not JSON"),
        (b'[{"from" "human, \\"}[" }]', "not JSON"),
        (b"nothing", "not JSON"),
        (b"", "not JSON"),
        (b"3", "wrong type"),
    ],
)
def test_a_bad_item_spoils_no_other_item_of_a_list(bad, reason, tmp_path):
    items = [json.dumps(item).encode() for item in ORZ]
    source = tmp_path / "orz.json"
    source.write_bytes(b"\xef\xbb\xbf [" + b",\n".join([items[0], bad, items[1]]) + b" ]\n")
    rows = list(read_rows(source, "item"))
    assert [(row.number, row.raw) for row in rows] == [(1, items[0]), (2, bad), (3, items[1])]
    assert rows[-1].end <= source.stat().st_size
    with pytest.raises(BadRow) as info:
        parse_row(rows[1].raw, FORMS["orz57k"])
    assert info.value.reason == reason
    source.write_bytes(b"[ ]")
    assert not list(read_rows(source, "item"))


@pytest.mark.parametrize(
    "data, message",
    [
        (json.dumps(ORZ).encode()[:-40], "ends in item 2"),
        (json.dumps(ORZ).encode()[:-1], "ends in item 2"),
        (json.dumps(ORZ).encode() + b"[]", "stands behind the list"),
        (jsonl(JSONL), "needed is one JSON list"),
        (b"", "needed is one JSON list"),
    ],
)
def test_a_list_that_is_not_whole_is_refused(data, message, tmp_path):
    source = tmp_path / "orz.json"
    source.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        list(read_rows(source, "item"))


def test_lines_are_counted_as_an_editor_does(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"\xef\xbb\xbf[1]\r\n\n  \n[2]\n[3]")
    assert [(row.number, row.raw) for row in read_rows(source, "line")] == [
        (1, b"[1]"),
        (4, b"[2]"),
        (5, b"[3]"),
    ]


def test_a_gzip_file_that_breaks_off_is_named(tmp_path):
    source = tmp_path / "rows.jsonl.gz"
    source.write_bytes(gzip.compress(np.random.default_rng(0).bytes(5000))[:-100])
    with pytest.raises(ValueError, match=r"rows.jsonl.gz is no whole gzip file"):
        list(read_rows(source, "line"))


def test_a_builder_alone_names_the_bad_row(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_bytes(jsonl(JSONL) + b"{}\n")
    with pytest.raises(ValueError, match=r"rows.jsonl: line 3: .*problem"):
        build("jsonl", source, tmp_path)


def test_a_damaged_data_set_is_refused(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_bytes(jsonl({"problem": "x" * 100 + str(i), "answer": i} for i in range(2000)))
    directory = build("jsonl", source, tmp_path)
    (records,) = directory.glob("*array_record*")
    whole = records.read_bytes()
    with pytest.raises(ValueError, match="without a prepared data set"):
        read_problems(tmp_path)
    for damaged in (b"", whole[: len(whole) // 2], whole[:9000] + b"123456" + whole[9006:]):
        records.write_bytes(damaged)
        with pytest.raises(ValueError, match="no whole data set"):
            read_problems(directory)
    records.write_bytes(whole)
    for name in ("dataset_info.json", "features.json"):
        whole = (directory / name).read_text()
        for damaged, message in (
            ("{", "Expecting property name"),
            ("null", f"{name} holds NoneType, needed is an object"),
            ("5", f"{name} holds int"),
        ):
            (directory / name).write_text(damaged)
            with pytest.raises(ValueError, match=f"no whole data set of problems: {message}"):
                read_problems(directory)
        (directory / name).write_text(whole)
    info = json.loads((directory / "dataset_info.json").read_text())
    for changed in ({"name": 5}, {"splits": []}):  # tfds has an error of its own for each
        (directory / "dataset_info.json").write_text(json.dumps(info | changed))
        with pytest.raises(ValueError, match="no whole data set") as caught:
            read_problems(directory)
        assert len(str(caught.value).splitlines()) == 1


def test_a_data_set_without_answers_is_refused(tmp_path):
    class Other(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None

        def _info(self):
            features = tfds.features.FeaturesDict({"problem": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield 0, {"problem": "x"}

    builder = Other(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    with pytest.raises(ValueError, match="no text 'answer'"):
        read_prepared(builder.data_dir)


def test_tensorflow_is_not_needed(tmp_path):
    """Neither to make a data set nor to read one."""
    (tmp_path / "rows.jsonl").write_bytes(jsonl(JSONL))
    code = (
        "import sys\n"
        "from npr_jax.data.prepare import prepare\n"
        "from npr_jax.data.problems import read_problems\n"
        "prepare('jsonl', 'rows.jsonl', 'out')\n"
        "assert len(read_problems('out')) == 2\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=600)
