"""What a person sees while a sweep runs; a name or value is never taken for markup."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lorasweep.record import read_sweep
from lorasweep.sweep import ArmPlan, LiveTable, SweepFolder, render_plan, reopen_sweep
from lorasweep.sweep.live import describe_params
from lorasweep.sweep.packing import ArmPacking

from .conftest import Killed


def show(table, *, width=160):
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(table.render())
    return console.export_text()


@pytest.fixture
def folder(begin, content):
    opened = begin(content)
    yield opened
    opened.close()


@pytest.fixture
def arms(folder):
    return {arm.name: arm for arm in folder.definition.arms}


@pytest.fixture
def table(folder):
    return LiveTable(folder, console=Console(file=io.StringIO(), force_terminal=True, width=160))


def test_a_new_sweep_shows_what_was_asked_for(table):
    shown = show(table)
    assert "made_up: bits_per_byte (minimize)" in shown
    for arm, trials in (("frozen", "0/1"), ("full", "0/3"), ("lora", "0/6")):
        (line,) = [line for line in shown.splitlines() if arm in line]
        assert trials in line


def test_the_running_trial_is_shown_and_goes_when_it_ended(table, arms):
    params = {"method.rank": 4, "optim.lr": 0.0123456}
    table.trial_started(arms["lora"], 2, params, steps=8)
    table.evaluated(arms["lora"], 2, 4, 1.75)
    assert "now: lora trial 2  step 4/8  1.7500  method.rank=4 optim.lr=0.0123  0." in show(table)
    table.trial_ended(arms["lora"], 2, "complete", 1.5, wall_s=60.0)
    shown = show(table)
    assert "now:" not in shown
    assert "1/6" in shown
    assert "1.5000" in shown
    assert "method.rank=4 optim.lr=0.0123" in shown
    assert "5 min 00 s" in shown  # 5 trials at a minute each


def test_every_running_trial_has_a_line(table, arms):
    for number in range(3):
        table.trial_started(arms["lora"], number, {"method.rank": 1}, steps=8)
    assert show(table).count("now: lora trial") == 3


def test_a_paused_trial_is_neither_running_nor_done(table, arms):
    for number in (0, 1):
        table.trial_started(arms["lora"], number, {"method.rank": number + 1}, steps=8)
        table.evaluated(arms["lora"], number, 2, 1.75)
    table.trial_paused(arms["lora"], 0)
    shown = show(table)
    assert "now: lora trial 1" in shown
    assert "lora trial 0" not in shown
    assert "0/6" in shown
    table.trial_started(arms["lora"], 0, {"method.rank": 1}, steps=8)  # promoted
    assert "now: lora trial 0" in show(table)
    table.trial_ended(arms["lora"], 0, "complete", 1.5, wall_s=1.0)
    assert "1/6" in show(table)


def test_a_trial_that_was_paused_and_is_pruned_at_the_end_is_counted(table, arms):
    table.trial_started(arms["lora"], 0, {"method.rank": 1}, steps=8)
    table.trial_paused(arms["lora"], 0)
    table.trial_ended(arms["lora"], 0, "pruned", 1.75, wall_s=60.0)
    (line,) = [line for line in show(table).splitlines() if "lora" in line]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[1:4] == ["1/6", "1", "-"]  # no best: it is not complete


def test_a_sweep_with_paused_trials_that_goes_on_counts_them_once(begin, work, runs, content):
    content["settings"] |= {"pruner": "halving", "pruner.rungs": [0.25], "pruner.min_survivors": 1}
    content["arms"] = {"lora": content["arms"]["lora"]}
    folder = begin(content)
    assert not work(folder, stop_at=4)
    assert "paused" in {row.state for row in folder.record.trials}
    reopened = reopen_sweep(folder.path)
    table = LiveTable(reopened, console=Console(file=io.StringIO()))
    ended = sum(row.state not in ("running", "paused") for row in reopened.record.trials)
    assert table.arms["lora"].done == ended
    assert work(reopened, observer=table)
    assert table.arms["lora"].done == table.arms["lora"].asked == 6
    assert table.arms["lora"].pruned > 0
    assert table.running == {}


def test_a_killed_pack_that_goes_on_counts_each_trial_once(begin, work, runs, packs, content, monkeypatch):
    monkeypatch.setattr(SweepFolder, "is_due", lambda self: True)  # the record has all that was told
    content["settings"] |= {"worker.pack_size": 3, "sampler": "random"}
    content["arms"] = {"lora": content["arms"]["lora"]}
    folder = begin(content)
    true_close, closed = runs.close, []

    def close(*arguments):
        record = true_close(*arguments)
        closed.append(record)
        if len(closed) == 3:  # two of the pack were told of, and it has no later boundary than the one before
            raise Killed
        return record

    monkeypatch.setattr(runs, "close", close)
    with pytest.raises(Killed):
        work(folder)
    assert sum(row.state == "complete" for row in read_sweep(folder.path).trials) == 2
    reopened = reopen_sweep(folder.path)
    table = LiveTable(reopened, console=Console(file=io.StringIO()))
    assert table.arms["lora"].done == 2
    assert work(reopened, observer=table)
    assert table.arms["lora"].done == 6


def test_the_best_is_the_lowest_of_the_complete_trials(table, arms):
    for number, (state, value) in enumerate(
        [("complete", 2.0), ("complete", 1.5), ("complete", 1.7), ("pruned", 1.0), ("failed", None)]
    ):
        table.trial_started(arms["lora"], number, {"method.rank": number}, steps=8)
        table.trial_ended(arms["lora"], number, state, value, wall_s=1.0)
    shown = show(table)
    assert "1.5000" in shown
    assert "method.rank=1" in shown
    assert "5/6 (1 failed)" in shown
    assert table.arms["lora"].pruned == 1


def test_where_more_is_better_the_best_is_the_highest(folder, arms):
    folder.record.direction = "maximize"
    table = LiveTable(folder, console=Console(file=io.StringIO()))
    for number, value in enumerate([1.5, 2.0, 1.7]):
        table.trial_started(arms["lora"], number, {}, steps=8)
        table.trial_ended(arms["lora"], number, "complete", value, wall_s=1.0)
    assert table.arms["lora"].best == 2.0


def test_a_sweep_that_goes_on_counts_what_was_done(begin, work, runs, content):
    folder = begin(content)
    assert not work(folder, stop_at=12)
    done = [row for row in folder.record.trials if row.state not in ("running", "paused")]
    reopened = reopen_sweep(folder.path)
    table = LiveTable(reopened, console=Console(file=io.StringIO()))
    reopened.close()
    assert sum(arm.done for arm in table.arms.values()) == len(done)
    full = [row.value for row in done if row.arm == "full"]
    assert table.arms["full"].best == min(full)


def test_a_plan_fits_eighty_columns_and_says_which_stages_there_are(begin, content):
    content["arms"]["lora"] |= {"expand": {"method.rank": [1, 16]}, "space": {"optim.lr": [0.1, 0.2]}, "trials": 2}
    folder = begin(content, "confirm.seeds=3")
    folder.close()
    packing = ArmPacking(key=None, reason="its trials run alone.", largest=None)
    plans = [
        ArmPlan(
            arm=arm,
            packing=packing,
            pack_size=16,
            seeds=0 if arm.name == "frozen" else 3,
            steps=123_456,
            tokens=1_234_567_890,
            trainable_params=123_456,
            kept_bytes=123 * 2**20,
            memory_bytes=1234 * 2**20,
            seconds=59 * 60 + 59,
        )
        for arm in folder.definition.arms
    ]
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(render_plan(folder.definition, plans))
    shown = console.export_text()
    (line,) = [line for line in shown.splitlines() if line.strip().startswith("lora-rank16 ")]
    cells = ["lora-rank16", "2 + 3", "123 k", "1.23 G", "123 k", "16", "1.21 GiB", "123 MiB", "59 min 59 s"]
    assert line.split() == " ".join(cells).split()
    assert "…" not in shown
    assert "then confirm: the best settings of each arm again on 3 fresh seeds" in " ".join(shown.split())
    assert "Arms have unequal numbers of trials (full 3, lora-rank1 2, lora-rank16 2)" in " ".join(shown.split())


@pytest.mark.parametrize("value", ["[red]x[/red]", "[/]", "[bold", "\\[x]"])
def test_a_value_is_never_taken_for_markup(folder, table, arms, value):
    params = {"method.targets": value}
    table.trial_started(arms["lora"], 0, params, steps=8)
    assert f"method.targets={value}" in show(table)
    table.trial_ended(arms["lora"], 0, "complete", 1.0, wall_s=1.0)
    assert f"method.targets={value}" in show(table)
    stream = io.StringIO()
    lines = LiveTable(folder, console=Console(file=stream, width=200))
    lines.trial_started(arms["lora"], 0, params, steps=8)
    lines.trial_ended(arms["lora"], 0, "complete", 1.0, wall_s=1.0)
    assert f"method.targets={value}" in stream.getvalue()


def test_a_title_is_never_taken_for_markup(folder):
    folder.record.metric = "[/]loss[red]"
    assert "[/]loss[red]" in show(LiveTable(folder, console=Console(file=io.StringIO())))


def test_without_a_terminal_each_trial_is_a_line(folder, arms):
    stream = io.StringIO()
    with LiveTable(folder, console=Console(file=stream, width=200)) as table:
        table.trial_started(arms["lora"], 0, {"method.rank": 4}, steps=8)
        table.trial_ended(arms["lora"], 0, "complete", 1.25, wall_s=1.0)
        table.trial_started(arms["lora"], 1, {"method.rank": 2}, steps=8)
        table.trial_ended(arms["lora"], 1, "failed", None, wall_s=0.0)
    assert stream.getvalue().splitlines() == [
        "lora 1/6  complete     1.2500  method.rank=4",
        "lora 2/6  failed            -  method.rank=2",
    ]


def test_on_a_terminal_the_table_is_drawn_and_taken_away(table, arms):
    with table:
        table.trial_started(arms["lora"], 0, {"method.rank": 4}, steps=8)
    assert "made_up" in table.console.file.getvalue()


def test_params_read_as_one_types_them():
    params = {"method.rank": 8, "optim.lr": 0.0123456, "method.targets": None, "trainer.progress": True}
    assert describe_params(params) == "method.rank=8 optim.lr=0.0123 method.targets=None trainer.progress=True"


def test_the_confirm_stage_has_its_own_table(folder, table, arms):
    table.stage_started("search", {"frozen": 1, "full": 3, "lora": 6})
    assert "best settings" in show(table)
    table.stage_started("confirm", {"frozen": 1, "full": 0, "lora": 5})
    shown = show(table)
    assert "confirm: the best settings of each arm again on 5 fresh seeds, scored once on test data" in shown
    assert "full" not in shown
    for number, (state, value) in enumerate([("complete", 1.0), ("failed", None), ("complete", 2.0)]):
        table.trial_started(arms["lora"], number, {"method.rank": 4, "seed": number}, steps=8)
        assert f"seed={number}" in show(table)
        table.trial_ended(arms["lora"], number, state, value, wall_s=60.0)
    (line,) = [line for line in show(table).splitlines() if "lora" in line]
    assert [cell.strip() for cell in line.strip("│").split("│")] == [
        "lora",
        "3/5",
        "1",
        "1.5000",
        "method.rank=4",
        "2 min 00 s",
    ]


def test_a_confirm_stage_that_goes_on_counts_what_was_done(begin, work, runs, content):
    content["settings"]["confirm.seeds"] = 2
    folder = begin(content)
    assert work(folder)
    reopened = reopen_sweep(folder.path)
    table = LiveTable(reopened, console=Console(file=io.StringIO()))
    reopened.close()
    table.stage_started("confirm", {"frozen": 1, "full": 2, "lora": 2})
    assert {name: arm.done for name, arm in table.arms.items()} == {"frozen": 1, "full": 2, "lora": 2}
    full = [row.value for row in reopened.record.confirm if row.arm == "full"]
    assert table.arms["full"].best == pytest.approx(sum(full) / 2)


def test_without_a_terminal_the_confirm_stage_begins_with_a_line(folder, arms):
    stream = io.StringIO()
    with LiveTable(folder, console=Console(file=stream, width=200)) as table:
        table.stage_started("search", {"lora": 6})
        table.stage_started("confirm", {"lora": 1})
        table.trial_started(arms["lora"], 0, {"seed": 7}, steps=8)
        table.trial_ended(arms["lora"], 0, "complete", 1.25, wall_s=1.0)
    assert stream.getvalue().splitlines() == [
        "confirm: the best settings of each arm again on 1 fresh seed, scored once on test data",
        "lora 1/1  complete     1.2500  seed=7",
    ]
