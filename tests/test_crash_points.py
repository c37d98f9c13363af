"""A run that is killed at a system call which changes its files ends as one that nobody touches.

All calls of all stages under the marker `nightly`, some of one stage in every run of the suite.
"""

import re
import sys

import crash_points
import pytest


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if reason := crash_points.why_not():
        pytest.skip(reason)
    return crash_points.build(tmp_path_factory.mktemp("library"))


STRIDE = 21  # every so many points one is tried: about a dozen


class Toy(crash_points.Tiny):
    """A run of two files, the second of which is written in place if `careless`."""

    SOURCE = """
import os, pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
for name in "ab":
    path = folder / f"{name}.jsonl"
    careless = name == "b" and sys.argv[2] == "True"
    if not path.exists():
        new = path if careless else folder / f"{name}.tmp"
        with new.open("wb") as file:
            if name == "a":
                os.writev(file.fileno(), [b"01", b"23456789"])
            else:
                file.write(b"0123456789")
        os.replace(new, path)
"""

    def __init__(self, library, careless):
        self.library, self.careless = library, careless

    def command(self, output):
        return [sys.executable, "-c", self.SOURCE, str(output), str(self.careless)]

    def go_on(self, output):
        argv, sys.argv = sys.argv, ["", str(output), str(self.careless)]
        try:
            exec(self.SOURCE, {})
        finally:
            sys.argv = argv


def test_a_careful_program_passes_at_every_point(library, tmp_path):
    found = crash_points.walk(Toy(library, careless=False), tmp_path)
    assert found["by_call"] == {
        "rename": 2,
        **{call + middle: 1 for call in ("write", "writev") for middle in ("", "/half")},
    }
    assert found["tried"] == found["points"] == 6
    assert not found["failures"]


def test_a_file_that_is_written_in_place_is_found_out(library, tmp_path):
    found = crash_points.walk(Toy(library, careless=True), tmp_path)
    assert [re.sub(r"^point \d, ", "", text) for text in found["failures"]] == [
        "write b.jsonl: b.jsonl is not what it was",
        "write/half b.jsonl: b.jsonl is not what it was",
    ]


def test_a_killed_program_leaves_what_a_stopped_one_shows(library, tmp_path):
    point, fault = crash_points.kill(
        Toy(library, careless=True), tmp_path, lambda point: point.path == "b.jsonl"
    )
    assert (point.call, fault) == ("write", "b.jsonl is not what it was")


@pytest.mark.slow
def test_a_run_that_is_killed_at_a_call_ends_as_if_nothing_had_happened(
    home, library, tmp_path, report
):
    tiny = crash_points.Tiny(home, "papo", library)
    found = crash_points.walk(tiny, tmp_path, lambda point: point.number % STRIDE == 0)
    report(f"{found['tried']} of {found['points']} points, {found['seconds']} s")
    assert not found["failures"]
    assert found["tried"] >= 8


@pytest.mark.nightly
@pytest.mark.parametrize("stage", crash_points.SETTINGS)
def test_a_run_that_is_killed_at_any_call_ends_as_if_nothing_had_happened(
    home, library, tmp_path, stage, report
):
    found = crash_points.walk(crash_points.Tiny(home, stage, library), tmp_path)
    report(f"{found['points']} points, {found['seconds']} s")
    assert not found["failures"]
    assert found["tried"] == found["points"]


@pytest.mark.nightly
def test_a_run_that_is_really_killed_leaves_what_a_stopped_one_shows(home, library, tmp_path):
    tiny = crash_points.Tiny(home, "papo", library)
    point, fault = crash_points.kill(
        tiny, tmp_path, lambda point: "checkpoints/2" in point.path and "half" in point.call
    )
    assert not fault, f"{point}: {fault}"
