"""How a sweep stands is read from its files alone, while they are written and whatever else is beside them."""

import fcntl
import io
import os
import re
import threading
import time
from dataclasses import replace

import pytest
from rich.console import Console
from tests.sweep.conftest import UNTRAINED

import lorasweep.sweep.status as status_file
from lorasweep.config.data import ScoreMetric
from lorasweep.console import RunningTraining
from lorasweep.errors import RecordError
from lorasweep.record import (
    ArmRow,
    LookRow,
    SettingRow,
    Subject,
    SweepRecord,
    Trial,
    write_record,
)
from lorasweep.results import load_sweep
from lorasweep.sweep.status import count_ended, read_status, render_status, report_status, show_progress


def arm(name, *, method="lora", trials=4):
    steps = 0 if method == "frozen" else 8
    is_base = method == "frozen"
    return ArmRow(name=name, method=method, trials=trials, steps=steps, settings={}, space={}, has_fixed_score=is_base)


def trial(number, state, value=None, *, arm="lora"):
    params = {} if arm == "frozen" else {"method.rank": number + 1}
    return Trial(arm=arm, number=number, state=state, params=params, search_score=value, run=f"runs/{arm}-{number:04d}")


def confirm_row(seed, state, value=None, *, number=0):
    given = {"stage": "confirm", "arm": "lora", "number": 0, "params": {"method.rank": 1}, "setting_number": number}
    scores = {} if value is None else {"bits_per_byte": value}
    return Trial(seed=seed, state=state, test_scores=scores, run=f"runs/lora-confirm-{number}{seed:04d}", **given)


def setting(number=0):
    """The chosen setting of `lora`, which is that of trial 0."""
    params = {"method.rank": 1}
    return SettingRow(subject="lora", arm="lora", setting=number, params=params, trial=0, score=1.5)


def sweep_record(**values):
    given = {
        "status": "running",
        "name": "made_up",
        "search_metric": ScoreMetric(name="bits_per_byte", direction="minimize"),
        "margin": "5%",
        "definition": {"file": {"settings": {}}, "overrides": {}},
        "arms": [arm("frozen", method="frozen", trials=1), arm("lora", trials=6)],
        "trials": [
            trial(0, "complete", 2.0, arm="frozen"),
            *(trial(0, "complete", 1.5), trial(1, "stopped", 1.8), trial(2, "running"), trial(3, "running")),
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
    assert [(arm.row.name, arm.row.trials, count_ended(arm.trials)) for arm in status.arms] == [
        ("frozen", 1, 1),
        ("lora", 6, 3),
    ]
    shown = show(status)
    assert "made_up: bits_per_byte (minimize), running" in shown
    (line,) = [line for line in shown.splitlines() if line.strip().startswith("lora")]
    assert line.split() == ["lora", "3/6", "1", "1", "2", "1.5000", "rank", "1"]
    assert "resume" not in shown


def test_running_trials_have_lines_with_step_and_last_value(running):
    rows = [trial(number, "running") for number in range(20)]
    rows[0].values = {4: 1.75}
    rows[1].params = {"trainer.max_steps": 100}
    write_record(sweep_record(trials=rows), running)
    lines = [line for line in show(read_status(running)).splitlines() if line.startswith("now:")]
    assert lines[:2] == [
        "now: lora trial 0: step 4 of 8, 1.7500 at step 4  rank 1",
        "now: lora trial 1: step 0 of 100  max_steps 100",
    ]
    assert len(lines) == status_file.MAX_SHOWN_PACKS + 1
    assert lines[-1] == f"now: {20 - status_file.MAX_SHOWN_PACKS} more packs"


def test_a_pack_has_one_line_whose_step_is_that_of_its_log(running):
    rows = [replace(trial(number, "running"), pack="lora-0000") for number in range(3)]
    write_record(sweep_record(arms=[arm("lora", trials=3)], trials=rows), running)
    log = running / "runs" / "lora-0000" / "steps.jsonl"
    log.parent.mkdir(parents=True)
    for text, step in (("", 0), ('{"step": 3, "loss": 1.0}\n', 3), ('{"step": 3, "loss": 1.0}\n{"step": 4, "lo', 3)):
        log.write_text(text)
        status = read_status(running)
        (line,) = [line for line in show(status).splitlines() if line.startswith("now:")]
        assert line.startswith(f"now: lora trial 0 and 2 more: step {step} of 8")
        assert status.count_steps() == (3 * step, 24)


def test_reasons_are_shown_and_a_late_sweep_says_what_it_still_needs(running):
    rows = [trial(0, "complete", 1.5), trial(1, "stopped", 1.9), trial(2, "stopped", 1.8)]
    rows[0].values = {8: 1.5}
    for row in rows[1:]:
        row.reason = "has learned nothing at step 4"
    write_record(sweep_record(arms=[arm("lora", trials=6)], trials=rows, planned_s=[60.0]), running)
    status = read_status(running)
    assert "stopped: lora trial 1, 2: has learned nothing at step 4" in show(status)
    assert status.late in show(status)
    assert status.late.startswith("late: 1 min 00 s were planned")
    write_record(sweep_record(arms=[arm("lora", trials=6)], trials=rows, planned_s=[1e5]), running)
    assert read_status(running).late == ""


def test_the_time_left_is_the_planned_one_at_first_and_that_of_the_pace_at_last(running):
    row, given = trial(0, "running"), {"arms": [arm("lora", trials=1)], "planned_s": [100.0]}
    for step, makespan_s, left in ((0, 10, 110), (4, 100, 75), (7, 70, 0.125 * (70 + 12.5))):
        row.values = {step: 1.5}
        write_record(sweep_record(trials=[row], makespan_s=makespan_s, **given), running)
        assert read_status(running).seconds_left == pytest.approx(left, abs=1)


@pytest.mark.parametrize("step", [0, 8])
def test_no_sweep_is_late_before_its_first_step_or_after_its_last(running, step):
    row = trial(0, "running")
    row.values = {step: 1.5}
    write_record(sweep_record(arms=[arm("lora", trials=1)], trials=[row], planned_s=[10.0]), running)
    assert read_status(running).late == ""


@pytest.mark.parametrize("workers", [0, 1, 2])  # 0: before the controller has opened the sweep
def test_steps_and_time_left_are_of_all_trials(running, monkeypatch, workers):
    monkeypatch.setattr(status_file, "RUNNING_TRAINING", made := RunningTraining())
    row = trial(0, "running")
    row.values = {4: 1.5}
    given = {"arms": [arm("lora", trials=1)], "workers": workers, "planned_s": [1e4]}
    write_record(sweep_record(trials=[row], **given), running)
    with show_progress(running, Console(file=io.StringIO())):
        assert re.fullmatch("all trials, step 4 of 8, about .* left", made.describe())
    assert made.describe() == ""


def test_the_line_moves_while_one_process_trains(running, monkeypatch):
    monkeypatch.setattr(status_file, "RUNNING_TRAINING", made := RunningTraining())
    monkeypatch.setattr(status_file, "POLL_INTERVAL_S", 0.01)
    row, given = trial(0, "running"), {"arms": [arm("lora", trials=1)], "planned_s": [1e4]}
    write_record(sweep_record(trials=[row], workers=0, **given), running)
    with show_progress(running, Console(file=io.StringIO())):
        assert made.describe().startswith("all trials, step 0 of 8")
        row.values = {4: 1.5}
        write_record(sweep_record(trials=[row], workers=1, **given), running)
        end = time.monotonic() + 60
        while "step 4" not in made.describe():
            assert time.monotonic() < end
            time.sleep(0.01)


def test_swept_steps_count_in_the_time_left(running):
    rows = [trial(0, "complete", 1.5), trial(1, "running")]
    rows[0].params, rows[0].values = {"trainer.max_steps": 100}, {100: 1.5}
    rows[1].params = {"trainer.max_steps": 300}
    write_record(sweep_record(arms=[arm("lora", trials=4)], trials=rows), running)
    done, total = read_status(running).count_steps()
    assert (done, total) == (100, 100 + 300 + 2 * 200)  # trials to come have the mean of those so far


def test_a_sweep_that_was_killed_is_interrupted(folder):
    assert read_status(folder).as_json()["status"] == load_sweep(folder).status == "interrupted"


def test_the_time_left_is_that_of_the_steps_left(running):
    """A run has 8 steps, of which each took 4 s so far."""

    def show_after(ended, confirmed=(), **values):
        for row in (*ended, *confirmed):
            row.values = {4 if row.state == "running" else 8: 1.5}
        given = {"arms": [arm("lora", trials=2)], "settings": [setting()], "confirm": list(confirmed), **values}
        write_record(sweep_record(trials=ended, **given), running)
        return show(read_status(running)).splitlines()[-1]

    trials = [trial(0, "complete", 1.5), trial(1, "complete", 1.5)]
    assert show_after([], looks=[2]) == "1 min 05 s so far"
    running_row = trial(0, "running")
    running_row.values = {1: 1.5}
    given = {"arms": [arm("lora", trials=4)], "trials": [running_row], "makespan_s": 30}
    write_record(sweep_record(**given), running)
    assert read_status(running).seconds_left is None  # after 1 of 32 steps, loading took most of the time
    assert show_after(trials[:1], looks=[2], makespan_s=32).endswith("answers at 2 seeds in about 1 min 36 s")
    assert show_after([*trials[:1], trial(1, "running")], looks=[], makespan_s=48).endswith("complete in about 16 s")
    confirmed = {"confirmed": [confirm_row(7, "complete", 1.5)], "makespan_s": 96}
    assert show_after(trials, **confirmed, looks=[2]).endswith("answers at 2 seeds in about 32 s")
    shown = show_after(trials, **confirmed, looks=[2, 3])
    assert shown.endswith("answers at 2 seeds (questions that stay open: up to 3) in about 32 s")


def test_time_left_counts_the_confirm_runs_of_a_sweep_that_grew(running):
    trials, confirmed = [trial(0, "complete", 1.5)], [confirm_row(7, "complete", 1.5)]
    for row in (*trials, *confirmed):
        row.values = {8: 1.5}
    given = {"trials": trials, "settings": [setting()], "confirm": confirmed, "looks": [1], "makespan_s": 32}
    write_record(sweep_record(**given, arms=[arm("lora", trials=2)]), running)
    # a trial and a confirm run, after two runs of 16 s: more trials may change the settings
    assert read_status(running).seconds_left == pytest.approx(32, abs=1)


def test_a_stopped_sweep_shows_the_command_that_resumes_it(folder):
    status = read_status(folder)
    shown = show(status, width=400)
    assert f"lorasweep sweep --resume {folder}" in shown
    assert "interrupted" in shown.splitlines()[2]


def test_the_confirm_stage_counts_a_seed_once_for_the_frozen_base(running):
    reruns = [confirm_row(7, "complete", 1.6), confirm_row(8, "complete", 1.8), confirm_row(9, "failed")]
    running_row = confirm_row(10, "running")
    running_row.values = {4: 1.55}
    rows = {"settings": [setting()], "confirm": [*reruns, running_row]}
    write_record(sweep_record(**rows, looks=[4], confirm_seeds=[7, 8, 9, 10]), running)
    status = read_status(running)
    assert [(count_ended(a.confirm), a.num_confirm) for a in status.arms] == [(0, 1), (3, 4)]
    shown = show(status)
    (line,) = [line for line in shown.splitlines() if line.strip().startswith("lora")]
    assert sorted(line.split()) == sorted(["lora", "3/6", *"1131", "3/4", "1.5000", "rank", "1"])
    assert "4 fresh seeds" in shown
    assert "now: confirm lora: step 4 of 8, 1.5500 at step 4  rank 1, seed 10" in shown


def test_a_frozen_base_whose_score_depends_on_the_seed_has_a_confirm_run_for_each(running):
    """A classifier's base may have a new head."""
    frozen = replace(arm("frozen", method="frozen", trials=1), has_fixed_score=False)
    write_record(sweep_record(arms=[frozen], trials=[], looks=[3], confirm_seeds=[1, 2, 3]), running)
    assert [one.num_confirm for one in read_status(running).arms] == [3]


def test_a_folder_that_is_no_sweep_is_refused_with_the_sweep_of_a_near_name(folder):
    none = folder / "none"
    none.mkdir()
    with pytest.raises(RecordError, match=r"a sweep's folder must contain sweep\.json, but '.*none' does not\."):
        read_status(none)
    assert list(none.iterdir()) == []
    with pytest.raises(RecordError) as refused:
        read_status(folder.parent / f"{folder.name}x")
    assert str(refused.value).endswith(f"Did you mean `{folder}`?")


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
    assert (count_ended(found.confirm), found.num_confirm) == (1, 1)
    assert [run.test_scores for run in found.confirm] == [{"bits_per_byte": 1.3}]
    assert "1.4000" in show(read_status(folder)).split()


def test_the_confirm_stage_asks_for_the_runs_of_the_look_that_is_due(folder):
    """Two values train on three seeds; then one of them and `full` are still open and train on three more."""
    each, full = arm("lora"), arm("full", method="full")
    each.subjects = [Subject(arm="lora", key="method.rank", value=rank) for rank in (1, 4)]
    settings = [
        SettingRow(subject=subject, arm=name, setting=number, params={}, trial=None, score=1.5)
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
        {"looks_done": [LookRow(seeds=3, open=["lora-rank-1"], is_last=False)]},
        {"looks_done": [LookRow(seeds=3, open=[], is_last=True)]},
    ):
        for key, value in changes.items():
            setattr(record, key, value)
        write_record(record, folder)
        asked.append([found.num_confirm for found in read_status(folder).arms])
    assert asked == [[1, 3, 6], [1, 6, 12], [1, 3, 6]]


def test_a_callers_function_gets_every_status_and_the_last_one(begin, work, runs, content):
    folder, seen = begin(content), []
    with report_status(folder.path, seen.append):
        assert work(folder)
    assert [sum(count_ended(arm.trials) for arm in status.arms) for status in (seen[0], seen[-1])] == [0, 10]


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
    assert "to watch it: tensorboard --logdir" in output.getvalue()
    assert re.search(r"[\d,]+ of [\d,]+ steps", output.getvalue())


def test_a_sweep_in_this_process_is_shown_with_a_line_per_run(begin, work, runs, content):
    content["settings"]["confirm.seeds"] = 2
    folder = begin(content, constant_answer=UNTRAINED)
    output = io.StringIO()
    with show_progress(folder.path, Console(file=output, width=200)):
        assert work(folder)
    rows = [*folder.record.trials, *folder.record.confirm]
    others = ("sweep ", "to watch it: ", "threads of a worker: ", "warning: ", "answers at ", "complete in ")
    lines = [line for line in output.getvalue().splitlines() if not line.startswith(others)]
    assert len(lines) == len(rows) + 1 == 10 + 5 + 1
    assert sum(line.startswith("confirm: ") for line in lines) == 1
    assert sum(line.split()[2] == "stopped" for line in lines) == sum(row.state == "stopped" for row in rows) > 0
    assert {line.split()[1] for line in lines[-5:]} == {"1/1", "1/2", "2/2"}


def test_the_first_table_of_a_resumed_sweep_says_running(running):
    write_record(sweep_record(status="interrupted"), running)
    assert "(minimize), running" in show(read_status(running))


def test_a_killed_sweep_is_interrupted_although_its_record_says_running(folder):
    assert "(minimize), interrupted" in show(read_status(folder))
