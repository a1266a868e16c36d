"""How a sweep stands is read from its files alone, while they are written and whatever else is beside them."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta

import lorasweep.sweep.watch as watch_file
import pytest
from lorasweep.sweep.watch import describe_status, follow, render_status
from lorasweep.sweep.workers import this_process
from rich.console import Console

from lorasweep.errors import RecordError
from lorasweep.record import (
    ArmRow,
    ConfirmRow,
    RunRecord,
    SweepRecord,
    TrialRow,
    WorkerRow,
    write_record,
    write_worker,
)
from lorasweep.sweep.status import read_status


def arm(name, *, method="lora", trials=4):
    return ArmRow(name=name, method=method, trials=trials, settings={}, space={}, sampler="tpe", pruner="none")


def trial(number, state, value=None, *, arm="lora"):
    params = {} if arm == "frozen" else {"method.rank": number + 1}
    return TrialRow(arm=arm, number=number, state=state, params=params, value=value, run=f"runs/{arm}-{number:04d}")


def sweep_record(**values):
    given = {
        "status": "running",
        "name": "made_up",
        "metric": "bits_per_byte",
        "direction": "minimize",
        "definition": {"file": {"settings": {}}, "overrides": {}},
        "arms": [arm("frozen", method="frozen", trials=1), arm("lora")],
        "trials": [
            trial(0, "complete", 2.0, arm="frozen"),
            *(trial(0, "complete", 1.5), trial(1, "pruned", 1.8), trial(2, "running")),
        ],
    }
    return SweepRecord(**(given | values))


def worker(name="here-1", **values):
    """A worker that is this process, so alive."""
    process = this_process()
    given = {
        "id": name,
        "host": process.host,
        "pid": process.pid,
        "boot": process.boot,
        "pid_namespace": process.pid_namespace,
        "process_started": process.started,
        "started_at": "2026-01-01T00:00:00+00:00",
        "beat_at": datetime.now(UTC).isoformat(),
        "device": "cpu",
        "done": 3,
        "running": ["lora-0002"],
        "telemetry": {"wall_s": 60.0, "trained_tokens": 6000.0, "idle_fraction": 0.25},
    }
    return WorkerRow(**(given | values))


@pytest.fixture
def folder(tmp_path):
    write_record(sweep_record(), tmp_path)
    write_worker(worker(), tmp_path)
    (tmp_path / "journal.log").write_text("x" * 2048)
    return tmp_path


def show(status, *, width=160):
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(render_status(status))
    return console.export_text()


def test_arms_workers_and_storage_are_told(folder):
    run = RunRecord(
        status="running",
        config={},
        arm="lora",
        trial=2,
        metric="bits_per_byte",
        direction="minimize",
        steps_planned=8,
        steps_done=4,
        best={"bits_per_byte": 1.75, "step": 4},
    )
    (folder / "runs" / "lora-0002").mkdir(parents=True)
    write_record(run, folder / "runs" / "lora-0002")
    status = read_status(folder)
    assert [(a.name, a.asked, a.done, a.running, a.pruned, a.best) for a in status.arms] == [
        ("frozen", 1, 1, 0, 0, 2.0),
        ("lora", 4, 2, 1, 1, 1.5),
    ]
    shown = show(status)
    (line,) = [line for line in shown.splitlines() if "here-1" in line]
    for text in ("cpu", "lora-0002 (step 4/8, 1.7500)", " 3 ", "100", "25 %", " ago"):
        assert text in line
    assert "Storage: journal in the sweep's folder, 2 KiB." in shown


def test_time_left_is_the_pace_of_all_workers_over_those_that_live(folder):
    # 60 s for 3 trials, and 1.5 left: one not begun, one half done
    assert read_status(folder).seconds_left == 30
    write_worker(worker("here-2", done=0), folder)  # has ended none yet: it only helps from now on
    assert read_status(folder).seconds_left == 15
    assert read_status(folder).tokens_per_s == 200
    assert "about 15 s left" in describe_status(read_status(folder))


def test_time_left_is_not_known_before_a_trial_has_ended(folder):
    write_worker(worker(done=0), folder)
    status = read_status(folder)
    assert status.seconds_left is None
    assert "Time left: not known before the first trial has ended, with 1 worker" in show(status)


def test_the_confirm_stage_counts_a_seed_once_for_the_frozen_base(folder):
    rerun = ConfirmRow(arm="lora", trial=0, seed=7, state="complete", run="runs/lora-confirm-0000", value=1.6)
    write_record(sweep_record(confirm=[rerun], confirm_seeds=[7, 8, 9]), folder)
    status = read_status(folder)
    assert [(a.seeds_done, a.seeds_asked) for a in status.arms] == [(0, 1), (1, 3)]
    assert status.arms[1].left == 3.5
    assert "3/5 trials, 1/4 reruns, 1 pruned, 1 worker, frozen 2.0000, lora 1.5000" in describe_status(status)


def test_a_worker_whose_process_is_gone_is_not_alive(folder):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    write_worker(worker("gone-1", pid=process.pid), folder)
    status = read_status(folder)
    assert [w.row.id for w in status.live] == ["here-1"]
    assert "gone-1 is gone: it was last seen" in show(status)


@pytest.mark.parametrize(("silent_s", "is_alive"), [(10, True), (-3600, True), (300, False)])
def test_a_worker_elsewhere_is_alive_while_its_heartbeat_is_fresh(folder, silent_s, is_alive):
    beat_at = (datetime.now(UTC) - timedelta(seconds=silent_s)).isoformat()
    write_worker(worker("there-1", host="elsewhere", beat_at=beat_at), folder)
    assert ("there-1" in [w.row.id for w in read_status(folder).live]) == is_alive


@pytest.mark.parametrize("beat_at", ["", "soon", "2026-01-01T00:00:00", "9999-12-31T23:59:59+00:00"])
def test_a_heartbeat_at_no_time_is_shown_as_that(folder, beat_at):
    write_worker(worker("there-1", host="elsewhere", beat_at=beat_at), folder)
    assert "there-1" in show(read_status(folder))


def test_workers_that_ended_or_were_lost_are_counted_and_what_to_type_is_said(folder):
    write_worker(worker(status="ended"), folder)
    write_worker(worker("here-2", status="lost", reason="it gave no sign of life"), folder)
    status = read_status(folder)
    assert status.is_over
    shown = show(status, width=400)
    assert "here-2 was lost: it gave no sign of life." in shown
    assert "1 worker ended." in shown
    assert f"No worker is alive: type `lorasweep sweep --resume {folder}` or `lorasweep worker {folder}`" in shown


def test_a_sweep_from_before_there_were_workers_is_shown(tmp_path):
    write_record(sweep_record(status="complete"), tmp_path)
    status = read_status(tmp_path)
    assert (status.is_over, status.seconds_left, status.workers) == (True, 0, ())
    assert "made_up: bits_per_byte (minimize), complete" in show(status)


def test_a_database_is_named_without_its_password(folder):
    (folder / "journal.log").unlink()
    asked = {"storage": "postgresql", "storage.url": "postgresql://me:open-sesame@db/sweeps"}
    write_record(sweep_record(definition={"file": {}, "overrides": asked}), folder)
    assert read_status(folder).storage == "postgresql postgresql://***@db/sweeps"
    write_record(sweep_record(definition={"file": {"settings": {"storage": "mysql"}}, "overrides": []}), folder)
    assert read_status(folder).storage == "mysql, its address in the environment"


def test_a_journal_that_is_missing_is_said(folder):
    (folder / "journal.log").unlink()
    assert read_status(folder).storage == "journal, which is not in the sweep's folder"


def test_reading_changes_nothing(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    show(read_status(folder))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_folder_that_is_no_sweep_is_refused(tmp_path):
    with pytest.raises(RecordError, match=r"a sweep's folder must contain sweep\.json"):
        read_status(tmp_path)


def test_reading_never_fails_while_others_write(folder):
    done = threading.Event()

    def write():
        beat = 0
        while not done.is_set():
            beat += 1
            write_worker(worker(beat=beat), folder)
            write_record(sweep_record(notes=["x" * (beat % 500)]), folder)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            assert len(read_status(folder).workers) == 1
    finally:
        done.set()
        writer.join()


def test_hostile_files_are_text_or_left_out(folder):
    hostile = "[red]x[/red] ../../etc"
    write_worker(worker("odd-1", running=[hostile, "../../outside", "\0"], device=hostile, telemetry={}), folder)
    (folder / "workers" / "broken.json").write_text("{")
    rows = [dataclasses.asdict(worker(name)) for name in ("odd-2",)]
    (folder / "workers" / "odd-2.json").write_text(json.dumps(rows[0] | {"pid": -1, "boot": hostile}))
    status = read_status(folder)
    assert {w.row.id for w in status.workers} == {"here-1", "odd-1", "odd-2"}
    assert "[red]x[/red]" in show(status, width=300)


@pytest.mark.parametrize("pid", [0, -1, 2**40])
def test_a_process_number_that_none_has_is_not_alive(folder, pid):
    write_worker(worker("odd-1", pid=pid), folder)
    assert [w.row.id for w in read_status(folder).live] == ["here-1"]


def test_many_workers_are_a_table_that_fits_and_a_number(folder):
    for number in range(40):
        write_worker(worker(f"here-{number:03d}"), folder)
    shown = show(read_status(folder))
    assert "9 more workers are alive." in shown  # 41 in all


def test_following_shows_the_table_until_told_to_end(folder, monkeypatch):
    monkeypatch.setattr(watch_file, "LOOK_S", 0.01)
    output = io.StringIO()
    looks = iter(range(5))
    follow(folder, console=Console(file=output, force_terminal=True, width=120), until=lambda: next(looks, 9) >= 4)
    assert "made_up: bits_per_byte" in output.getvalue()


def test_following_without_a_terminal_prints_a_line_when_something_changed(folder, monkeypatch):
    for name in ("LOOK_S", "READ_S", "LINE_S"):
        monkeypatch.setattr(watch_file, name, 0)
    output, deadline = io.StringIO(), time.monotonic() + 20

    def until():
        if output.getvalue().count("\n") == 1:
            done = [trial(0, "complete", 1.5), trial(1, "pruned", 1.8), trial(2, "complete", 1.4)]
            write_record(sweep_record(trials=done), folder)
        return output.getvalue().count("\n") >= 2 or time.monotonic() > deadline

    follow(folder, console=Console(file=output, width=200), until=until)
    first, second = output.getvalue().splitlines()
    assert first.startswith("3/5 trials, 1 pruned, 1 worker, frozen 2.0000, lora 1.5000, about ")
    assert second.startswith("3/5 trials, 1 pruned, 1 worker, lora 1.4000, about ")


def test_following_goes_on_where_the_folder_is_away_for_a_while(folder, monkeypatch):
    for name in ("LOOK_S", "READ_S", "LINE_S"):
        monkeypatch.setattr(watch_file, name, 0)
    gone = threading.Event()

    def until():
        if not gone.is_set():
            os.rename(folder / "sweep.json", folder / "away.json")
            gone.set()
            return False
        time.sleep(0.05)
        os.rename(folder / "away.json", folder / "sweep.json")
        write_record(sweep_record(status="complete"), folder)
        return True

    follow(folder, console=Console(file=io.StringIO()), until=until)


def test_following_ends_by_itself_when_the_sweep_is_complete_or_its_workers_are_gone(folder, monkeypatch):
    monkeypatch.setattr(watch_file, "LOOK_S", 0)
    write_worker(worker(status="ended"), folder)
    follow(folder, console=Console(file=io.StringIO()))
    write_worker(worker(), folder)
    write_record(sweep_record(status="complete"), folder)
    follow(folder, console=Console(file=io.StringIO()))
