"""What to type next: the command has a number that the sweep takes, or there is a reason why no command helps."""

import shlex
from dataclasses import replace

import pytest
from tests.files import edit_json
from tests.report.test_golden import SWEEPS, fail_to_learn

import lorasweep
from lorasweep.config.command_line import parse_overrides
from lorasweep.record import read_sweep
from lorasweep.report import next_step
from lorasweep.report.evidence.advice import MIN_CHANCE
from lorasweep.report.findings import read_findings
from lorasweep.report.next_step import MAX_COST_RATIO
from lorasweep.report.sweep_data import load_sweep_data

from .conftest import build_rank_sweep, build_sweep


def read_steps(folder):
    return [line.next for line in read_findings(folder).answers]


def read_command(step, *, begin):
    """The overrides of a command, after its first words."""
    words = shlex.split(step.command)
    assert words[: len(begin)] == begin
    return parse_overrides(words[len(begin) :])


def test_an_open_question_has_a_step_with_its_chance_and_time_and_a_settled_one_has_nothing(tmp_path):
    sweep = SWEEPS["open"](tmp_path)
    full, rank, setting = read_steps(sweep)
    answers = read_findings(sweep).data.evidence.answers
    for step in (full, rank):
        overrides = read_command(step, begin=["lorasweep", "sweep", "--resume", str(sweep)])
        assert overrides["confirm.seeds"] > max(answer.num_seeds for answer in answers)
        assert MIN_CHANCE <= step.chance <= 1
        assert 0 < step.seconds <= MAX_COST_RATIO * read_sweep(sweep).makespan_s
        assert f"chance to settle it {step.chance:.0%}" in str(step)
    assert setting is None
    assert str(full) in lorasweep.load_sweep(sweep).table()  # in one line, to be copied


@pytest.mark.parametrize("status", ["complete", "interrupted"])
def test_a_sweep_without_test_scores_is_resumed(tmp_path, status):
    edit_json(build_sweep(tmp_path, lora=6) / "sweep.json", lambda raw: raw.update(status=status))
    full, _, setting = read_steps(tmp_path)
    added = {"confirm.seeds": [3, 6, 10]} if status == "complete" else {}
    assert read_command(full, begin=["lorasweep", "sweep", "--resume", str(tmp_path)]) == added
    assert full == setting


def test_no_command_is_said_for_what_none_can_settle(tmp_path):
    steps = read_steps(fail_to_learn(build_sweep(tmp_path)))
    assert {step.command for step in steps if step} == {None}


def test_a_setting_with_a_large_regret_has_twice_the_trials(tmp_path):
    sweep = build_rank_sweep(tmp_path, {4: 1.7})

    def set_regret(raw):
        for row in raw["settings"]:
            row["regret"] = 2 * load_sweep_data(sweep).search_margin

    edit_json(sweep / "sweep.json", set_regret)
    trials = {row.name: row.trials for row in read_sweep(sweep).arms}["lora"]
    overrides = read_command(read_steps(sweep)[2], begin=["lorasweep", "sweep", "--resume", str(sweep)])
    assert overrides == {"arms.lora.trials": 2 * trials}


@pytest.mark.parametrize(
    ("blocker", "reason"),
    [
        ("few examples", "more test examples"),
        ("no margin", "`method=frozen`"),
        ("few trials", "twice the trials"),
    ],
)
def test_a_question_that_seeds_cannot_settle_has_its_remedy_in_words(tmp_path, monkeypatch, blocker, reason):
    monkeypatch.setattr(next_step, "find_step", lambda *_, **__: None)
    data = load_sweep_data(SWEEPS["open"](tmp_path))
    answers = [replace(answer, blocker=blocker) for answer in data.evidence.answers if answer.blocker]
    assert reason in next_step.find_settling_step("smallest", answers[:1], data).reason
