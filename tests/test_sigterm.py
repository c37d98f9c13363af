"""SIGTERM and Ctrl-C: what is saved, what goes on, and with which exit code it ends."""

import os
import signal
import subprocess
import sys

import pytest
from checkpoint_checks import OPTIMIZER, same, steps_in
from train_toy import examples, tiny

from npr_jax.runs import sigterm
from npr_jax.train.fit import FitConfig, fit
from npr_jax.train.step import TrainConfig


@pytest.mark.slow
def test_sigterm_saves_and_the_same_call_goes_on(tmp_path):
    model = tiny()
    config = FitConfig(TrainConfig(OPTIMIZER, row_len=256, micro_rows=2), batch=2, steps=5)
    made = examples(model, 8)
    whole = fit(model, made, config, tmp_path / "whole", report=lambda metrics: None)

    def end_at_two(metrics):
        if metrics["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(sigterm.Preempted) as caught:
        fit(model, made, config, tmp_path / "cut", report=end_at_two)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert steps_in(tmp_path / "cut" / "checkpoints") == [2]
    again = fit(model, made, config, tmp_path / "cut", report=lambda metrics: None)
    assert same(again.params, whole.params)


def test_sigterm_waits_but_for_what_may_end_anywhere():
    reached = []
    with pytest.raises(sigterm.Preempted), sigterm.watched(), sigterm.watched():
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append(sigterm.wanted())
        with sigterm.interruptible():
            reached.append("the part that may end anywhere")
    assert reached == [True]
    with pytest.raises(sigterm.Preempted), sigterm.watched(), sigterm.interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("after the signal")
    assert reached == [True]
    # A signal that nothing looked at ends the stage once it is done.
    with pytest.raises(sigterm.Preempted), sigterm.watched():
        os.kill(os.getpid(), signal.SIGTERM)
    assert not sigterm.wanted()
    with sigterm.watched():
        pass


@pytest.mark.parametrize(
    "number, name", [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")], ids=str
)
def test_a_second_signal_ends_the_process_at_once(number, name):
    program = f"""if True:
        import os
        from npr_jax.runs import sigterm
        with sigterm.watched():
            os.kill(os.getpid(), {number:d})
            print("one", flush=True)
            os.kill(os.getpid(), {number:d})
            print("two", flush=True)
        """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-number, "one\n")
    assert f"{name}: this run saves what it has" in done.stderr


def test_ctrl_c_is_as_sigterm_and_stays_ignored_where_it_is():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(sigterm.Preempted) as caught, sigterm.watched(), sigterm.interruptible():
        os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.code == 130 and signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for jobs in the background
    try:
        with sigterm.watched(), sigterm.interruptible():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
