"""Files: which errors last, how they are told, and who may write."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from npr_jax import cli, demo
from npr_jax.base.files import (
    alone,
    describe,
    hub_error,
    lasting,
    publish,
    read_text,
    reading,
    write_atomically,
    writing,
)
from npr_jax.base.mesh import parse_mesh
from npr_jax.evaluate.run import EvalConfig, evaluate
from npr_jax.runs.directory import alone_in, claim
from npr_jax.train.export import export
from npr_jax.train.records import Record, read_records
from npr_jax.train.zero import ZeroConfig


@pytest.mark.parametrize(
    "number, answer",
    [
        *((getattr(errno, x), True) for x in ("ENOENT", "EISDIR", "ENOTDIR", "EACCES", "EPERM")),
        *((getattr(errno, x), True) for x in ("EROFS", "ENAMETOOLONG", "ELOOP", "EEXIST", "EFBIG")),
        *((getattr(errno, x), True) for x in ("ENXIO", "ESPIPE", "EINVAL", "ENOTEMPTY", "EXDEV")),
        *((getattr(errno, x), False) for x in ("ENOSPC", "EDQUOT", "EIO", "ENOMEM", "EMFILE")),
        *((getattr(errno, x), False) for x in ("ECONNREFUSED", "ETIMEDOUT", "EAGAIN", "ESTALE")),
    ],
)
def test_an_error_of_the_system_lasts_or_passes_by_its_number(number, answer):
    error = OSError(number, "Some reason", "some file")
    assert lasting(error) is answer
    assert describe(error) == "some file: some reason"
    message = r"^here cannot be written \(some reason\): do so$"
    with pytest.raises(OSError, match=message) as told, writing("here", "do so"):
        raise error
    assert lasting(told.value) is answer


def test_errors_without_a_number_last_by_their_class():
    for error in (ValueError("x"), FloatingPointError("x"), FileNotFoundError("x")):
        assert lasting(error) and describe(error) == "x"
    for error in (OSError("x"), ConnectionError("x"), RuntimeError("x"), None):
        assert not lasting(error)


def test_a_hub_that_could_not_be_reached_may_be_another_time(monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    unreached = LocalEntryNotFoundError("no network")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    error = hub_error("nothing", unreached)
    assert describe(error) == "nothing: no network" and not lasting(error)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert lasting(hub_error("nothing", unreached))
    assert lasting(hub_error("nothing", OSError("no such repository")))


def test_what_is_read_is_named(tmp_path):
    message = r"there is no .*/none; needed is a thing"
    with pytest.raises(FileNotFoundError, match=message), reading(tmp_path / "none", "a thing"):
        raise AssertionError("it is not opened")
    (tmp_path / "text").write_bytes("\ufeffé".encode())
    assert read_text(tmp_path / "text", "a thing") == "é"
    (tmp_path / "text").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"text is not UTF-8 \(byte 1\), needed is a"):
        read_text(tmp_path / "text", "a thing")


def test_what_is_written_touches_no_neighbour_and_leaves_nothing_unfinished(tmp_path):
    (tmp_path / "file.tmp").write_text("mine")
    (tmp_path / "folder.tmp").mkdir()
    (tmp_path / "folder.tmp" / "data").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "data").write_text("mine")

    def fill(path):
        path.mkdir()
        (path / "data").write_text("new")

    def fail(path):
        fill(path)
        raise KeyboardInterrupt

    write_atomically(tmp_path / "file", b"new")
    publish(tmp_path / "folder", fill)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "none", fail)
    for directory, write in (
        ("full", lambda path: publish(path, fill)),
        ("full", lambda path: write_atomically(path, b"new")),
    ):
        with pytest.raises(OSError):
            write(tmp_path / directory)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {str(path.relative_to(tmp_path)): path.read_text() for path in files} == {
        **{"file": "new", "folder/data": "new"},
        **{"file.tmp": "mine", "folder.tmp/data": "mine", "full/data": "mine"},
    }


def test_what_a_crash_has_left_is_overwritten(tmp_path):
    def crash(path):
        path.mkdir()
        (path / "left").write_text("half")
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
        publish(tmp_path / "folder", crash)
    assert len(list(tmp_path.iterdir())) == 1
    publish(tmp_path / "folder", lambda path: path.mkdir())
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["folder"]


def test_one_process_is_alone_until_it_ends_however_it_ends(tmp_path):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from npr_jax.base.files import alone\n"
        "with alone(Path(sys.argv[1])):\n"
        "    print('in', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"in\n"
    with pytest.raises(ValueError, match="another process is writing"), alone(tmp_path):
        raise AssertionError("it is not alone")
    other.kill()
    other.wait()
    with alone(tmp_path):
        pass


def test_a_second_command_in_a_run_directory_is_refused(tmp_path):
    output = tmp_path / "run"
    (tmp_path / "mine.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n')
    mine = (f"mine={tmp_path / 'mine.jsonl'}",)

    def stage():
        with cli._stage(ZeroConfig, "tiny_zero", [], output, False):
            pytest.fail("it runs")

    commands = (
        stage,
        lambda: evaluate(EvalConfig(model="tiny", benchmarks=mine, output=str(output))),
        lambda: demo.run("sums", 0, output),
    )
    with alone_in(output):
        for command in commands:
            with pytest.raises(ValueError, match=f"another process is writing {output}: wait"):
                command()
    assert list(output.iterdir()) == []
    with alone_in(output):  # the first has let go of it
        pass


@pytest.mark.parametrize(
    "text",
    [
        *(b"\xff", b"", b"[1]", b"a: [", b"3", b"[" * 3000),
        *(b"a: !!bool x", b"a: !!timestamp x", b"a: &x {b: *x}", b"a: 2026-01-01"),
    ],
)
def test_a_directory_whose_config_is_none_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_bytes(text)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"config\.yaml is no") as error:
        claim(tmp_path, "seed: 1")
    assert "\n" not in describe(error.value)
    with pytest.raises(ValueError, match=r"config\.yaml is no"):
        export(tmp_path, tmp_path / "model")
    assert (tmp_path / "config.yaml").read_bytes() == text


def test_a_run_directory_is_no_url_though_a_path_has_lost_a_slash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for output in ("gs://a/b", Path("gs://a/b"), "s3:/a"):
        with pytest.raises(ValueError, match="needed is a local directory"), alone_in(output):
            claim(output, "seed: 1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["--1", "²", "", "9" * 5000])
def test_a_size_of_a_mesh_that_is_no_number_is_told(size):
    with pytest.raises(ValueError, match="is not understood, needed is AXIS=SIZE"):
        parse_mesh(f"fsdp={size}")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_of_the_demo_is_in_its_range(seed, tmp_path):
    with pytest.raises(ValueError, match=f"--seed is {seed}, needed is an integer from 0"):
        cli.demo("sums", seed, tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    "line, why",
    [
        (b"{", "Expecting property name"),
        (b"[1]", "it is no object"),
        (b'{"problem": "1+1"}', "it has no 'answer'"),
        (b"\xff", "codec can't decode"),
    ],
)
def test_a_bad_line_of_a_file_that_grows_is_named(tmp_path, line, why):
    path = tmp_path / "accepted.jsonl"
    record = dict.fromkeys(Record.__annotations__)
    path.write_bytes(json.dumps(record).encode() + b"\n" + line + b"\n{half of a li")
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}:2: .*{why}.*accepted.jsonl of"):
        read_records(path)
    path.write_bytes(json.dumps(record).encode() + b"\n{half of a li")
    assert read_records(path) == [record]
