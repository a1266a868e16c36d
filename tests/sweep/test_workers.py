"""A worker is taken for lost when it is: at once on its own machine, elsewhere after its lease, by one clock only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import lorasweep.sweep.workers as workers_file
from lorasweep.errors import WorkerLost
from lorasweep.record import WorkerRow, read_worker, read_workers, worker_file, write_worker
from lorasweep.sweep.workers import Colleagues, Registration, this_process

LEASE_S = 100.0


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def colleagues(tmp_path, clock):
    return Colleagues(tmp_path, lease_s=LEASE_S, clock=clock)


def row_of(process, **changes):
    """The file of a worker that is this process."""
    row = WorkerRow(
        id="w-1",
        host=process.host,
        pid=process.pid,
        boot=process.boot,
        pid_namespace=process.pid_namespace,
        process_started=process.started,
        started_at="2026-01-01T00:00:00+00:00",
        beat=1,
    )
    return replace(row, **changes)


def dead_process():
    """The number of a process that has ended, and been waited for."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


def test_a_process_on_this_machine_that_has_ended_is_gone_at_once(colleagues, tmp_path):
    write_worker(row_of(this_process(), pid=dead_process()), tmp_path)
    assert colleagues.is_gone("w-1")


def test_a_process_that_ended_and_is_not_waited_for_is_gone(colleagues, tmp_path):
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    write_worker(row_of(this_process(), pid=ended.pid, process_started=0.0), tmp_path)
    assert colleagues.is_gone("w-1")
    ended.wait()


def test_a_later_process_of_the_same_number_is_not_the_worker(colleagues, tmp_path):
    write_worker(row_of(this_process(), process_started=1.0), tmp_path)
    assert colleagues.is_gone("w-1")


@pytest.mark.parametrize("elsewhere", [{"host": "other"}, {"boot": "before"}, {"pid_namespace": "pid:[1]"}])
def test_elsewhere_only_the_lease_counts(colleagues, tmp_path, clock, elsewhere):
    write_worker(row_of(this_process(), pid=dead_process(), **elsewhere), tmp_path)
    assert not colleagues.is_gone("w-1")
    clock.now = LEASE_S
    assert not colleagues.is_gone("w-1")
    clock.now += 1
    assert colleagues.is_gone("w-1")


def test_a_heartbeat_renews_the_lease_whatever_its_clock_says(colleagues, tmp_path, clock):
    row = row_of(this_process(), host="other", beat_at="1999-01-01T00:00:00+00:00")
    write_worker(row, tmp_path)
    assert not colleagues.is_gone("w-1")
    clock.now = LEASE_S - 1
    write_worker(replace(row, beat=2), tmp_path)
    assert not colleagues.is_gone("w-1")
    clock.now += LEASE_S
    assert not colleagues.is_gone("w-1")
    clock.now += 1
    assert colleagues.is_gone("w-1")


def test_a_stopped_process_on_this_machine_is_lost_after_its_lease(colleagues, tmp_path, clock):
    write_worker(row_of(this_process()), tmp_path)
    assert not colleagues.is_gone("w-1")
    clock.now = LEASE_S + 1
    assert colleagues.is_gone("w-1")


def test_a_worker_without_a_file_is_waited_for_like_any_other(colleagues, clock):
    assert not colleagues.is_gone("w-9")
    clock.now = LEASE_S + 1
    assert colleagues.is_gone("w-9")


@pytest.mark.parametrize("name", ["../sweep", "a/b", "", "x" * 300])
def test_a_name_that_is_no_workers_leads_to_no_file(colleagues, tmp_path, name):
    (tmp_path / "sweep.json").write_text("{}")
    assert not colleagues.is_gone(name)
    assert colleagues.say_lost(name)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]


def test_a_trial_that_nobody_signed_is_free(colleagues):
    assert colleagues.is_gone(None)


def test_the_live_are_those_that_are_neither_ended_nor_gone(colleagues, tmp_path):
    here = this_process()
    write_worker(row_of(here), tmp_path)
    write_worker(row_of(here, id="w-2", status="ended"), tmp_path)
    write_worker(row_of(here, id="w-3", pid=dead_process()), tmp_path)
    write_worker(row_of(here, id="w-4", status="lost"), tmp_path)
    assert [row.id for row in colleagues.live()] == ["w-1"]


def test_who_is_lost_is_told_so(colleagues, tmp_path):
    write_worker(row_of(this_process(), pid=dead_process(), running=["lora-0001"]), tmp_path)
    assert colleagues.say_lost("w-1")
    row = read_worker(worker_file(tmp_path, "w-1"))
    assert (row.status, row.reason, row.running) == ("lost", "it gave no sign of life", [])


def test_who_gives_a_sign_of_life_in_time_is_not_lost(colleagues, tmp_path, clock):
    row = row_of(this_process(), host="other")
    write_worker(row, tmp_path)
    assert not colleagues.is_gone("w-1")
    clock.now = LEASE_S + 1
    assert colleagues.is_gone("w-1")
    write_worker(replace(row, beat=2), tmp_path)
    assert not colleagues.say_lost("w-1")
    assert read_worker(worker_file(tmp_path, "w-1")).status == "running"


def test_a_registration_beats_and_ends(tmp_path):
    with Registration(tmp_path, lease_s=0.2, device="cpu", measure=lambda: {"memory_bytes": 1.0}) as worker:
        first = read_workers(tmp_path)[0]
        deadline = time.monotonic() + 10
        while read_workers(tmp_path)[0].beat < first.beat + 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        worker.end("it was stopped")
    row = read_workers(tmp_path)[0]
    assert (row.id, row.pid, row.status, row.reason) == (worker.id, os.getpid(), "ended", "it was stopped")
    assert row.telemetry == {"memory_bytes": 1.0}


def test_an_error_ends_a_registration_too(tmp_path):
    with pytest.raises(ZeroDivisionError), Registration(tmp_path, lease_s=100):
        raise ZeroDivisionError
    assert [(row.status, row.reason) for row in read_workers(tmp_path)] == [("ended", "it ended by an error")]


def test_a_worker_that_others_took_for_lost_notices_and_leaves_it_so(tmp_path):
    with Registration(tmp_path, lease_s=0.2) as worker:
        worker.check()
        deadline = time.monotonic() + 10
        while not worker.lost:  # a heartbeat may have been on its way
            write_worker(replace(worker.row, status="lost"), tmp_path)
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(
            WorkerLost, match=r"a worker must give a sign of life within `worker.lease_s`, but .* did no"
        ):
            worker.check()
    assert [row.status for row in read_workers(tmp_path)] == ["lost"]


def test_news_of_runs_is_read_before_the_next_heartbeat_is_due(tmp_path, monkeypatch):
    monkeypatch.setattr(workers_file, "SHORTEST_BEAT_S", 0.01)
    with Registration(tmp_path, lease_s=4 * 600) as mine:
        for began, ended, shown in (("lora-0001", None, ["lora-0001"]), (None, "lora-0001", [])):
            mine.note_runs(began=began, ended=ended)
            deadline = time.monotonic() + 20
            while (row := read_worker(worker_file(tmp_path, mine.id))).running != shown and time.monotonic() < deadline:
                time.sleep(0.01)
            assert row.running == shown
    assert read_worker(worker_file(tmp_path, mine.id)).done == 1


def test_numbers_that_can_not_be_measured_do_not_end_the_heartbeat(tmp_path):
    def broken():
        raise RuntimeError("no driver")

    with Registration(tmp_path, lease_s=2, measure=broken) as mine:
        beat = mine.row.beat
        deadline = time.monotonic() + 20
        while read_worker(worker_file(tmp_path, mine.id)).beat < beat + 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert read_worker(worker_file(tmp_path, mine.id)).beat >= beat + 3


STOPPED = """
import sys, time
from pathlib import Path
from lorasweep.sweep import workers
workers.LONGEST_DELAY_S = 0.5
stopped = []
with workers.Registration(Path(sys.argv[1]), lease_s=2, stopped=stopped.append):
    print("ready", flush=True)
    deadline = time.monotonic() + 30
    while not stopped and time.monotonic() < deadline:
        time.sleep(0.05)
print(sum(stopped), flush=True)
"""


@pytest.mark.slow
def test_a_process_that_was_stopped_knows_for_how_long(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(workers_file.__file__).parents[2])},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    said, _ = process.communicate(timeout=60)
    assert 1.5 < float(said) < 20
