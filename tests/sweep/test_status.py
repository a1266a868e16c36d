"""How a sweep stands is read from its files alone, while they are written and whatever else is beside them."""

from __future__ import annotations

import fcntl
import io
import os
import threading
import time

import pytest
from rich.console import Console

import lorasweep.sweep.status as status_file
from lorasweep.errors import RecordError
from lorasweep.record import ArmRow, ConfirmRow, SweepRecord, TrialRow, write_record
from lorasweep.sweep import follow, read_status, render_status


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
        "arms": [arm("frozen", method="frozen", trials=1), arm("lora", trials=6)],
        "trials": [
            trial(0, "complete", 2.0, arm="frozen"),
            *(trial(0, "complete", 1.5), trial(1, "pruned", 1.8), trial(2, "running"), trial(3, "paused", 1.7)),
            trial(4, "infeasible"),
        ],
        "makespan_s": 65.0,
    }
    return SweepRecord(**(given | values))


@pytest.fixture
def folder(tmp_path):
    """The folder of a sweep that no process runs."""
    write_record(sweep_record(), tmp_path)
    (tmp_path / ".lock").touch()
    return tmp_path


@pytest.fixture
def running(folder):
    """The folder of a sweep that a process runs."""
    handle = os.open(folder / ".lock", os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield folder
    os.close(handle)


def show(status, *, width=160):
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(render_status(status))
    return console.export_text()


def test_arms_are_counted_by_what_became_of_their_trials(running):
    status = read_status(running)
    assert status.is_running
    assert not status.is_over
    assert [(a.name, a.asked, a.done, a.running, a.paused, a.pruned, a.failed, a.best) for a in status.arms] == [
        ("frozen", 1, 1, 0, 0, 0, 0, 2.0),
        ("lora", 6, 3, 1, 1, 1, 1, 1.5),
    ]
    shown = show(status)
    assert "made_up: bits_per_byte (minimize), running" in shown
    (line,) = [line for line in shown.splitlines() if line.strip().startswith("lora")]
    assert line.split() == ["lora", "3/6", "1", "1", "1", "1", "1.5000", "method.rank=1"]
    assert "resume" not in shown


def test_a_sweep_that_no_process_runs_says_what_to_type(folder):
    status = read_status(folder)
    assert status.is_over
    assert f"No process runs it. Type `lorasweep sweep --resume {folder}` to resume it." in show(status, width=400)


def test_a_complete_sweep_is_over_and_has_nothing_to_type(running):
    write_record(sweep_record(status="complete"), running)
    status = read_status(running)
    assert status.is_over
    assert "Type" not in show(status)


def test_the_confirm_stage_counts_a_seed_once_for_the_frozen_base(running):
    reruns = [
        ConfirmRow(arm="lora", trial=0, seed=7, state="complete", run="runs/lora-confirm-0000", value=1.6),
        ConfirmRow(arm="lora", trial=0, seed=8, state="running", run="runs/lora-confirm-0001"),
    ]
    write_record(sweep_record(confirm=reruns, confirm_seeds=[7, 8, 9]), running)
    status = read_status(running)
    assert [(a.seeds_done, a.seeds_running, a.seeds_asked) for a in status.arms] == [(0, 0, 1), (1, 1, 3)]
    (line,) = [line for line in show(status).splitlines() if line.strip().startswith("lora")]
    assert line.split() == ["lora", "3/6", "2", "1", "1", "1", "1/3", "1.5000", "method.rank=1"]


def test_a_sweep_without_a_confirm_stage_has_no_column_for_it(folder):
    headings = show(read_status(folder)).splitlines()[2].split()
    assert headings == ["arm", "trials", "running", "paused", "pruned", "failed", "best", "best", "settings"]


def test_an_arm_without_a_complete_trial_has_no_best(folder):
    write_record(sweep_record(trials=[trial(0, "pruned", 1.0), trial(1, "paused", 1.0)]), folder)
    assert [a.best for a in read_status(folder).arms] == [None, None]
    assert "–" in show(read_status(folder))


def test_where_more_is_better_the_best_is_the_highest(folder):
    trials = [trial(0, "complete", 0.5), trial(1, "complete", 0.7), trial(2, "complete", 0.7)]
    write_record(sweep_record(direction="maximize", trials=trials), folder)
    (lora,) = [a for a in read_status(folder).arms if a.name == "lora"]
    assert (lora.best, lora.best_params) == (0.7, {"method.rank": 2})  # the earlier of equals


def test_reading_changes_nothing(running):
    before = {path: path.stat().st_mtime_ns for path in running.rglob("*")}
    show(read_status(running))
    assert {path: path.stat().st_mtime_ns for path in running.rglob("*")} == before


def test_a_folder_that_is_no_sweep_is_refused(tmp_path):
    with pytest.raises(RecordError, match=r"a sweep's folder must contain sweep\.json"):
        read_status(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_reading_never_fails_while_others_write(running):
    done = threading.Event()

    def write():
        number = 0
        while not done.is_set():
            number += 1
            write_record(sweep_record(notes=["x" * (number % 500)]), running)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            assert len(read_status(running).arms) == 2
    finally:
        done.set()
        writer.join()


@pytest.mark.parametrize("hostile", ["[red]x[/red]", "[/]", "\x1b[2J"])
def test_a_hostile_value_is_text(folder, hostile):
    row = trial(0, "complete", 1.5)
    row.params = {"method.targets": hostile}
    write_record(sweep_record(trials=[row]), folder)
    shown = show(read_status(folder), width=300)
    assert hostile.replace("\x1b", "") in shown.replace("\x1b", "")


def test_a_real_sweep_is_seen_while_it_runs_and_after(begin, work, runs, content):
    content["settings"] |= {"pruner": "halving", "pruner.rungs": [0.25], "pruner.min_survivors": 1}
    folder = begin(content)
    folder.is_due = lambda: True  # else it depends on the machine how often the record is written
    seen = []

    def score(config, step):
        seen.append(read_status(folder.path))
        return config.optim.lr

    runs.score = score
    assert work(folder)
    assert all(status.is_running and not status.is_over for status in seen)
    assert any(arm.paused for status in seen for arm in status.arms)
    assert max(sum(arm.running for arm in status.arms) for status in seen) == 1
    after = read_status(folder.path)
    assert after.is_over
    assert [(arm.done, arm.asked, arm.running, arm.paused) for arm in after.arms] == [
        (1, 1, 0, 0),
        (3, 3, 0, 0),
        (6, 6, 0, 0),
    ]


@pytest.fixture
def at_once(monkeypatch):
    """Looks and prints as often as it can."""
    for name in ("POLL_INTERVAL_S", "LINE_INTERVAL_S"):
        monkeypatch.setattr(status_file, name, 0.001)


def in_background(folder, console):
    thread = threading.Thread(target=lambda: follow(folder, console=console), daemon=True)
    thread.start()
    return thread


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_following_shows_the_table_until_the_sweep_is_complete(running, at_once):
    output = io.StringIO()
    thread = in_background(running, Console(file=output, force_terminal=True, width=120))
    wait_for(lambda: "made_up: bits_per_byte" in output.getvalue())
    assert thread.is_alive()
    write_record(sweep_record(status="complete"), running)
    thread.join(60)
    assert not thread.is_alive()


def test_following_without_a_terminal_prints_a_line_when_something_changed(running, at_once):
    output = io.StringIO()
    thread = in_background(running, Console(file=output, width=200))
    wait_for(lambda: output.getvalue().count("\n") == 1)
    time.sleep(0.1)
    assert output.getvalue().count("\n") == 1  # nothing changed
    done = [trial(0, "complete", 1.5), trial(1, "pruned", 1.8), trial(2, "complete", 1.4)]
    write_record(sweep_record(trials=done, status="complete"), running)
    thread.join(60)
    first, second = output.getvalue().splitlines()
    assert first == "4/7 trials, 1 paused, 1 pruned, 1 failed, frozen 2.0000, lora 1.5000, 1 min 05 s so far"
    assert second == "3/7 trials, 1 pruned, lora 1.4000, 1 min 05 s so far"


def test_following_goes_on_where_the_folder_is_away_for_a_while(running, at_once):
    output = io.StringIO()
    thread = in_background(running, Console(file=output))
    wait_for(lambda: output.getvalue())
    os.rename(running / "sweep.json", running / "away.json")
    time.sleep(0.05)
    assert thread.is_alive()
    os.rename(running / "away.json", running / "sweep.json")
    write_record(sweep_record(status="complete"), running)
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("is_complete", [False, True])
def test_following_what_is_over_ends_at_once(folder, is_complete):
    if is_complete:
        write_record(sweep_record(status="complete"), folder)
    follow(folder, console=Console(file=io.StringIO()))
