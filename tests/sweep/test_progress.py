"""A sweep is shown while it runs, on a terminal, in a pipe or by a caller's function; looking at it changes nothing."""

import io
import os
import threading
import time

import pytest
from rich.console import Console

import lorasweep.sweep.status as status_file
from lorasweep.sweep.status import report_status, show_progress

from .test_status import folder as folder
from .test_status import running as running


def test_a_callers_function_gets_every_status_and_the_last_one(begin, work, runs, content):
    folder, seen = begin(content), []
    with report_status(folder.path, seen.append):
        assert work(folder)
    assert sum(arm.search.done for arm in seen[0].arms) == 0
    assert sum(arm.search.done for arm in seen[-1].arms) == 10


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_of_a_callers_function_is_not_hidden(running, monkeypatch):
    errors, calls = [], []
    monkeypatch.setattr(threading, "excepthook", errors.append)

    def fail_later(status):
        calls.append(status)
        if len(calls) > 1:
            raise OSError("my disk is full")

    with report_status(running, fail_later):
        wait_for(lambda: errors)
    assert str(errors[0].exc_value) == "my disk is full"


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_terminal_shows_a_table_also_where_the_folder_is_away_for_a_while(running, monkeypatch):
    monkeypatch.setattr(status_file, "POLL_INTERVAL_S", 0.001)
    output = io.StringIO()
    with show_progress(running, Console(file=output, force_terminal=True, width=120)):
        os.rename(running / "sweep.json", running / "away.json")
        time.sleep(0.05)
        os.rename(running / "away.json", running / "sweep.json")
        wait_for(lambda: "made_up: bits_per_byte" in output.getvalue())


def test_a_sweep_in_this_process_is_shown_with_a_line_per_run(begin, work, runs, content):
    content["settings"] |= {"pruner": "halving", "pruner.rungs": [0.25], "pruner.min_survivors": 1, "confirm.seeds": 2}
    folder = begin(content)
    output = io.StringIO()
    with show_progress(folder.path, Console(file=output, width=200)):
        assert work(folder)
    rows = [*folder.record.trials, *folder.record.confirm]
    lines = [line for line in output.getvalue().splitlines() if not line.startswith(("sweep ", "warning: "))]
    assert len(lines) == len(rows) + 1 == 10 + 5 + 1
    assert sum(line.startswith("confirm: ") for line in lines) == 1
    assert sum(line.split()[2] == "pruned" for line in lines) == sum(row.state == "pruned" for row in rows) > 0
    assert {line.split()[1] for line in lines[-5:]} == {"1/1", "1/2", "2/2"}
