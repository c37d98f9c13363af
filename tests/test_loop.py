"""The loop of every run, on states in plain Python: what it saves, when, and how it goes on."""

import json
import os
import signal

import jax.numpy as jnp
import pytest

from npr_jax.runs import loop, sigterm
from npr_jax.runs.metrics import read_metrics


class Memory:
    """States that outlive a run: {step: (state, position, value)}."""

    def __init__(self):
        self.saved, self.last = {}, 0

    def restore(self, state):
        if not self.saved:
            return None
        self.last = max(self.saved)
        return self.last, *self.saved[self.last][:2]

    def save(self, step, state, position, value=None):
        if step != self.last:
            self.saved[step], self.last = (state, dict(position), value), step

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        pass


class Digits(loop.Body):
    """Adds the digit of every step to a text; `events` are called by step before it is done."""

    name, shown, total, every, max_nonfinite = "digits", ("length",), 5, 2, 2

    def __init__(self, directory, store, events=None, metrics=None):
        self.directory, self.store = directory, store
        self.events, self.metrics = events or {}, metrics or {}
        self.place = 0

    def begin(self):
        return "", self.store

    def position(self):
        return {"place": self.place}

    def move(self, position):
        self.place = position["place"]

    def step(self, state, number):
        self.place += 10  # what is done by halves must not be saved
        self.events.get(number, lambda: None)()
        return f"{state}{number}", {"length": number} | self.metrics.get(number, {})

    def value(self, metrics):
        return metrics["length"]

    def finish(self, state):
        return state, self.place


class Cut(Exception):
    """Stands for the end of the machine."""


def cut():
    raise Cut


def interrupted():
    with sigterm.interruptible():
        os.kill(os.getpid(), signal.SIGTERM)


def terminated():
    os.kill(os.getpid(), signal.SIGTERM)


def steps(directory):
    return [line["step"] for line in read_metrics(directory)]


def test_it_saves_every_so_many_steps_and_the_last_one(tmp_path):
    store, seen = Memory(), []
    assert loop.run(Digits(tmp_path, store), seen.append) == ("12345", 50)
    assert {step: value for step, (_, _, value) in store.saved.items()} == {2: 2, 4: 4, 5: 5}
    assert store.saved[4][:2] == ("1234", {"place": 40, "nonfinite_in_a_row": 0})
    assert steps(tmp_path) == [line["step"] for line in seen] == [1, 2, 3, 4, 5]
    assert loop.run(Digits(tmp_path, store, {1: cut, 5: cut})) == ("12345", 50)  # it is done


@pytest.mark.parametrize(
    "event, ends, kept",
    [
        (cut, Cut, 2),  # from the last state that was saved
        (interrupted, sigterm.Preempted, 3),  # the state before the step that was cut off
        (terminated, sigterm.Preempted, 4),  # the step was done
    ],
)
def test_a_run_that_was_ended_goes_on_as_if_nothing_had_happened(
    tmp_path, capsys, event, ends, kept
):
    store = Memory()
    with pytest.raises(ends):
        loop.run(Digits(tmp_path, store, {4: event}), lambda metrics: None)
    assert max(store.saved) == kept
    assert store.saved[kept][:2] == (
        "1234"[:kept],
        {"place": 10 * kept, "nonfinite_in_a_row": 0},
    )
    told = f"digits: {kept} of 5 steps are saved; the same command goes on\n"
    assert capsys.readouterr().err == (told if ends is sigterm.Preempted else "")
    again = loop.run(Digits(tmp_path, store), lambda metrics: None)
    assert again == ("12345", 50)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_what_is_claimed_as_done_is_not_begun(tmp_path):
    class Done(Digits):
        def claim(self):
            return "done"

    assert loop.run(Done(tmp_path, Memory(), {1: cut})) == "done"
    assert not (tmp_path / "metrics.jsonl").exists()


def test_steps_that_are_not_finite_end_the_run_and_count_on_from_a_state(tmp_path):
    bad, store = {"nonfinite": 1}, Memory()
    for metrics in ({2: bad, 3: bad}, {3: bad}):
        with pytest.raises(FloatingPointError, match=r"step 3: .* 2 steps in a row"):
            loop.run(Digits(tmp_path, store, metrics=metrics), lambda metrics: None)
        assert steps(tmp_path) == [1, 2, 3] and list(store.saved) == [2]


@pytest.mark.parametrize("metrics", [{"nonfinite": 1}, {"skipped_because": "nothing was right"}])
def test_the_progress_line_says_why_a_step_was_skipped(tmp_path, capsys, metrics):
    loop.run(Digits(tmp_path, Memory(), metrics={5: metrics}))
    reason = metrics.get("skipped_because", "the loss, its gradient or the new parameters")
    assert f"skipped: {reason}" in capsys.readouterr().out
    *before, last = read_metrics(tmp_path)
    assert last["skipped_because"].startswith(reason)
    assert not any("skipped_because" in line for line in before)


def test_a_step_that_fails_again_and_again_is_told_with_its_work(tmp_path, caplog):
    store = Memory()

    def work(end, tokens=(30, 12)):
        def event():
            body.tell_work({"'1+1'": list(tokens), "'2+2'": [7]})
            end()

        return event

    def run(**events):
        nonlocal body
        caplog.clear()
        events = {int(name[1:]): event for name, event in events.items()}
        body = Digits(tmp_path, store, events)
        body.remedies = lambda training: f"set {'train' if training else 'engine'}.size=1"
        return loop.run(body, lambda metrics: None)

    body = None
    with pytest.raises(Cut):
        run(_4=cut)
    assert not caplog.records and json.loads((tmp_path / "attempt.json").read_text())["step"] == 4
    with pytest.raises(Cut):
        run(_4=work(cut))
    assert "step 4 was begun once before and not finished. Answers were being" in caplog.text
    assert "Where memory ran out: set engine.size=1." in caplog.text
    with pytest.raises(Cut):
        run(_3=cut)  # on the way there: step 2 is the last that is saved
    with pytest.raises(sigterm.Preempted):
        run(_4=interrupted)  # an orderly end is no attempt
    told = "step 4 was begun 2 times before and not finished. It trained on '1+1': 30, 12 tokens; "
    assert told + "'2+2': 7 tokens (" in caplog.text and "set train.size=1" in caplog.text
    with pytest.raises(OSError, match=r"step 4: there is no room in memory\. It trained on") as err:
        run(_4=work(lambda: jnp.zeros(1 << 45, jnp.uint8)))  # 32 TiB: the device's own error
    assert "RESOURCE_EXHAUSTED" in str(err.value) and "train.size=1" in str(err.value)
    assert "step 4 was begun 2 times before" in caplog.text
    assert run()[0] == "12345"
    assert "step 4 was begun 3 times before" in caplog.text
    assert not (tmp_path / "attempt.json").exists()


@pytest.mark.parametrize("text", ["", "[", "[1]", "{}", '{"step": "x", "attempts": 1}'])
def test_a_file_of_attempts_that_is_none_is_of_no_use(tmp_path, caplog, text):
    (tmp_path / "attempt.json").write_text(text)
    assert loop.run(Digits(tmp_path, Memory()), lambda metrics: None)[0] == "12345"
    assert not caplog.records and not (tmp_path / "attempt.json").exists()
