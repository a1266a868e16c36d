"""How a sweep stands is read from its files alone, while they are written and whatever else is beside them."""

from __future__ import annotations

import fcntl
import io
import os
import time
from dataclasses import astuple

import pytest
from rich.console import Console

import lorasweep.sweep.status as status_file
from lorasweep.errors import RecordError
from lorasweep.record import SWEEP_FILE, ArmRow, LookRow, SettingRow, SweepRecord, Trial, write_record
from lorasweep.sweep.status import read_status, render_status


def arm(name, *, method="lora", trials=4):
    steps = 0 if method == "frozen" else 8
    given = {"settings": {}, "space": {}, "sampler": "tpe", "pruner": "none"}
    return ArmRow(name=name, method=method, trials=trials, steps=steps, **given)


def trial(number, state, value=None, *, arm="lora"):
    params = {} if arm == "frozen" else {"method.rank": number + 1}
    return Trial(arm=arm, number=number, state=state, params=params, value=value, run=f"runs/{arm}-{number:04d}")


def confirm_row(seed, state, value=None, *, number=0):
    run = f"runs/lora-confirm-{number}{seed:04d}"
    return Trial(
        stage="confirm",
        number=0,
        params={"method.rank": 1},
        arm="lora",
        subject="lora",
        setting_number=number,
        seed=seed,
        state=state,
        run=run,
        value=value,
    )


def setting(number=0):
    """The chosen setting of `lora`, which is that of trial 0."""
    params = {"method.rank": 1}
    return SettingRow(subject="lora", arm="lora", setting=number, value=None, params=params, trial=0, score=1.5)


def sweep_record(**values):
    given = {
        "status": "running",
        "name": "made_up",
        "metric": "bits_per_byte",
        "direction": "minimize",
        "margin": "5%",
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


def test_trials_are_counted_by_state(running):
    status = read_status(running)
    assert status.is_running
    assert [(arm.name, *astuple(arm.search), arm.best) for arm in status.arms] == [
        ("frozen", 1, 1, 0, 0, 0, 0, 2.0),
        ("lora", 6, 3, 1, 1, 1, 1, 1.5),
    ]
    shown = show(status)
    assert "made_up: bits_per_byte (minimize), running" in shown
    (line,) = [line for line in shown.splitlines() if line.strip().startswith("lora")]
    assert line.split() == ["lora", "3/6", "1", "1", "1", "1", "1.5000", "method.rank=1"]
    assert "resume" not in shown


def test_the_share_of_slots_that_trained_is_shown(folder):
    packed, confirmed = trial(0, "complete", 1.5), confirm_row(7, "complete", 1.5)
    packed.values, packed.slot_steps, confirmed.values, confirmed.slot_steps = {8: 1.5}, 20.0, {8: 1.5}, 8.0
    assert "slots that trained" not in show(read_status(folder))
    write_record(sweep_record(trials=[packed], settings=[setting()], confirm=[confirmed]), folder)
    assert "share of the packs' slots that trained: search 40 %, confirm 100 %" in show(read_status(folder))


def test_running_trials_have_lines_with_step_and_last_value(running):
    rows = [trial(number, "running") for number in range(20)]
    rows[0].values = {4: 1.75}
    rows[1].params = {"trainer.max_steps": 100}
    write_record(sweep_record(trials=rows), running)
    lines = [line for line in show(read_status(running)).splitlines() if line.startswith("now:")]
    assert lines[:2] == [
        "now: lora trial 0  step 4/8  1.7500  method.rank=1",
        "now: lora trial 1  step 0/100  trainer.max_steps=100",
    ]
    assert len(lines) == status_file.MAX_SHOWN_RUNS + 1
    assert lines[-1] == f"now: {20 - status_file.MAX_SHOWN_RUNS} more"


def test_the_remaining_time_follows_from_the_ended_runs(running):
    status = read_status(running)
    assert status.seconds_left == 65.0 / 3 * 3  # 3 of 6 trials; the frozen base does not train
    assert show(status).endswith("1 min 05 s so far, about 1 min 05 s left at this pace\n")
    os.utime(running / SWEEP_FILE, (0, time.time() - 130))
    assert "left at this pace, as of 2 min 10 s ago" in show(read_status(running))
    write_record(sweep_record(trials=[trial(0, "complete", 2.0, arm="frozen")]), running)
    assert read_status(running).seconds_left is None


def test_a_stopped_sweep_shows_the_command_that_resumes_it(folder):
    status = read_status(folder)
    assert f"lorasweep sweep --resume {folder}" in show(status, width=400)


def test_a_complete_sweep_is_over_and_shows_no_command(running):
    write_record(sweep_record(status="complete"), running)
    status = read_status(running)
    assert "Type" not in show(status)


def test_the_confirm_stage_counts_a_seed_once_for_the_frozen_base(running):
    reruns = [confirm_row(7, "complete", 1.6), confirm_row(8, "complete", 1.8), confirm_row(9, "failed")]
    running_row = confirm_row(10, "running")
    running_row.values = {4: 1.55}
    rows = {"settings": [setting()], "confirm": [*reruns, running_row]}
    write_record(sweep_record(**rows, looks=[4], confirm_seeds=[7, 8, 9, 10]), running)
    status = read_status(running)
    assert [(a.confirm.done, a.confirm.running, a.confirm.asked) for a in status.arms] == [(0, 0, 1), (3, 1, 4)]
    shown = show(status)
    (line,) = [line for line in shown.splitlines() if line.strip().startswith("lora")]
    assert line.split() == ["lora", "3/6", "2", "1", "1", "2", "3/4", "1.5000", "1.7000", "method.rank=1"]
    assert "4 fresh seeds" in shown
    assert "now: lora confirm  step 4/8  1.5500  method.rank=1 seed=10" in shown


def test_reading_changes_nothing(running):
    before = {path: path.stat().st_mtime_ns for path in running.rglob("*")}
    show(read_status(running))
    assert {path: path.stat().st_mtime_ns for path in running.rglob("*")} == before


def test_a_folder_that_is_no_sweep_is_refused_with_the_sweep_of_a_near_name(folder):
    none = folder / "none"
    none.mkdir()
    with pytest.raises(RecordError, match=r"'.*none' has no sweep\.json\. A sweep that was just started makes it once"):
        read_status(none)
    assert list(none.iterdir()) == []
    with pytest.raises(RecordError) as refused:
        read_status(folder.parent / f"{folder.name}x")
    assert "does not exist. A sweep that was just started" in str(refused.value)
    assert str(refused.value).endswith(f"Did you mean `{folder}`?")


def test_a_name_is_never_taken_for_markup(folder):
    write_record(sweep_record(name="[red]x", metric="[/]loss[red]", arms=[arm("[bold]")]), folder)
    shown = show(read_status(folder))
    assert "[red]x: [/]loss[red]" in shown
    assert "[bold]" in shown


def test_runs_of_former_settings_do_not_count(folder):
    """A sweep that grew has them."""
    record = sweep_record(
        arms=[arm("lora", trials=3)],
        trials=[trial(0, "complete", 1.5), trial(1, "complete", 1.4), trial(2, "complete", 1.6)],
        looks=[1],
        confirm_seeds=[5],
        settings=[setting(1)],
        confirm=[confirm_row(5, "complete", 9.0, number=2), confirm_row(5, "complete", 1.3, number=1)],
    )
    write_record(record, folder)
    (found,) = read_status(folder).arms
    assert (found.confirm.done, found.confirm.asked) == (1, 1)
    assert (found.best, found.test_mean) == (1.4, 1.3)


def test_the_confirm_stage_asks_for_the_runs_of_the_look_that_is_due(folder):
    """Two values train on three seeds; then one of them and `full` are still open and train on three more."""
    each, full = arm("lora"), arm("full", method="full")
    each.confirm_each = "method.rank"
    settings = [
        SettingRow(subject=subject, arm=name, setting=number, value=None, params={}, trial=None, score=1.5)
        for subject, name, number in (("full", "full", 0), ("lora-rank-1", "lora", 0), ("lora-rank-4", "lora", 1))
    ]
    record = sweep_record(
        arms=[arm("frozen", method="frozen"), full, each],
        trials=[trial(0, "complete", 1.5)],
        looks=[3, 6],
        confirm_seeds=list(range(6)),
    )
    asked = []
    for changes in (
        {"settings": settings},
        {"looks_done": [LookRow(seeds=3, open=["lora-rank-1"], next=["frozen", "full", "lora-rank-1"])]},
        {"looks_done": [LookRow(seeds=3, open=[], next=[])]},
    ):
        for key, value in changes.items():
            setattr(record, key, value)
        write_record(record, folder)
        asked.append([found.confirm.asked for found in read_status(folder).arms])
    assert asked == [[1, 3, 6], [1, 6, 9], [1, 3, 6]]
