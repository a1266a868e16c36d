"""While nothing else is printed, a line says how far the training is."""

import io
import sys
import time

import pytest

import lorasweep.console as console_file
from lorasweep.console import say, show_heartbeat


@pytest.fixture
def running(monkeypatch):
    """A training of its own, which the tests may move."""
    made = console_file.RunningTraining()
    monkeypatch.setattr(console_file, "RUNNING_TRAINING", made)
    return made


def test_a_training_says_its_phase_its_step_and_the_time_left_since_it_began_here(running):
    assert running.describe() == ""
    running.note("training", 10, 60)  # resumed at step 10
    assert running.describe() == "training, step 10 of 60"
    running.began_s -= 200.0
    running.note("evaluating", 20, 60)
    assert running.describe() == "evaluating, step 20 of 60, about 13 min 20 s left"
    running.note("training", 0, 60)  # another one
    assert running.describe() == "training, step 0 of 60"
    running.note("saving", 60, 60)  # its last phase
    assert running.describe() == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 0


@pytest.fixture
def quick(monkeypatch):
    """Makes every silence of 20 ms too long."""
    monkeypatch.setattr(console_file, "MAX_SILENCE_S", 0.02)
    repeat_every = console_file.repeat_every
    monkeypatch.setattr(console_file, "repeat_every", lambda seconds, call: repeat_every(0.01, call))
    monkeypatch.setattr(
        console_file.os, "get_terminal_size", lambda descriptor: console_file.os.terminal_size((60, 24))
    )


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_silent_command_says_in_a_pipe_how_far_it_is(quick, running, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with show_heartbeat("plan"):
        wait_for(lambda: "plan is at work\n" in stream.getvalue())
        running.note("training\x1b[2J", 0, 7)
        wait_for(lambda: "s: training\\x1b[2J, step 0 of 7" in stream.getvalue())
    assert "\x1b" not in stream.getvalue()
    assert sys.stderr is stream


def test_the_line_on_a_terminal_is_erased_before_anything_else_is_printed(quick, running, monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    with show_heartbeat("plan"):
        running.note(100 * "x", 0, 7)
        wait_for(lambda: "xxx" in stream.getvalue())
        say("an answer")
    lines = stream.getvalue().split(console_file.ERASE_LINE)
    assert "an answer\n" in lines[-1]
    assert max(map(len, lines)) <= 59
    assert "\n" not in "".join(lines[:-1])
