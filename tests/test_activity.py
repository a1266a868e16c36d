"""What a process does is named, counted, and said while nothing else is printed."""

import io
import sys
import time

import pytest

import lorasweep.console as console_file
from lorasweep.activity import describe_activity, doing, end_inner
from lorasweep.console import say, show_heartbeat


def test_the_innermost_activity_has_numbers_and_the_outer_ones_names():
    assert describe_activity() == ""
    with doing("measuring full"), doing("training", total=60, first=10) as activity:
        assert describe_activity() == "measuring full; training, step 10 of 60"
        activity.began_s -= 200.0
        activity.advance(10)
        described = describe_activity()
    expected = "measuring full; training, step 20 of 60, about 13 min 20 s left"
    assert described == expected
    assert describe_activity() == ""


def test_an_activity_without_a_name_leaves_no_mark_and_no_second_clock():
    with doing("") as activity:
        assert describe_activity() == ""
        with doing("training"):
            assert describe_activity() == "training"
            activity.what = "complete in about 9 s"
            assert describe_activity() == "complete in about 9 s; training"
        assert describe_activity() == "complete in about 9 s"


def test_an_iteration_that_is_abandoned_leaves_no_activity():
    def iterate():
        with doing("scoring"):
            yield 1

    with doing("training") as activity:
        iteration = iterate()
        next(iteration)
        assert describe_activity().startswith("training; scoring")
        end_inner(activity)
        assert describe_activity().startswith("training")
    assert describe_activity() == ""
    iteration.close()
    with doing("saving"):
        assert describe_activity().startswith("saving")


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


def test_a_silent_command_says_in_a_pipe_what_it_does(quick, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with show_heartbeat("plan"):
        wait_for(lambda: "plan is at work\n" in stream.getvalue())
        with doing("reading\x1b[2J the data", unit="example", total=7):
            wait_for(lambda: "s: reading\\x1b[2J the data, example 0 of 7" in stream.getvalue())
    assert "\x1b" not in stream.getvalue()
    assert sys.stderr is stream


def test_the_line_on_a_terminal_is_erased_before_anything_else_is_printed(quick, monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    with show_heartbeat("plan"):
        with doing(100 * "x"):
            wait_for(lambda: "xxx" in stream.getvalue())
        say("an answer")
    lines = stream.getvalue().split(console_file.ERASE_LINE)
    assert "an answer\n" in lines[-1]
    assert max(map(len, lines)) <= 59
    assert "\n" not in "".join(lines[:-1])
