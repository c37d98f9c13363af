"""Files: which errors last, how they are told, and who may write."""

import errno
import subprocess
import sys

import pytest

from npr_jax import cli, demo
from npr_jax.base.files import alone, describe, hub_error, lasting, read_text, reading, writing
from npr_jax.evaluate.run import EvalConfig, evaluate
from npr_jax.runs.directory import alone_in
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
        lambda: demo.run(0, output),
    )
    with alone_in(output):
        for command in commands:
            with pytest.raises(ValueError, match=f"another process is writing {output}: wait"):
                command()
    assert list(output.iterdir()) == []
    with alone_in(output):  # the first has let go of it
        pass
