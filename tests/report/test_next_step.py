"""What to type next: the command has a number that the sweep takes, or there is a reason why no command helps."""

import math
import shlex

import pytest
from tests.files import edit_json
from tests.report.test_golden import SWEEPS, fail_to_learn

import lorasweep
from lorasweep.config.command_line import parse_overrides
from lorasweep.record import read_sweep
from lorasweep.report.evidence.advice import MIN_CHANCE
from lorasweep.report.findings import read_findings
from lorasweep.report.next_step import (
    MAX_COST_RATIO,
    _begin_again,
    _enlarge_test,
    _find_max_examples,
)
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
    added = {"confirm.seeds": "auto"} if status == "complete" else {}
    assert read_command(full, begin=["lorasweep", "sweep", "--resume", str(tmp_path)]) == added
    assert full == setting


def test_no_command_is_said_for_what_none_can_settle(tmp_path):
    steps = read_steps(fail_to_learn(build_sweep(tmp_path)))
    assert {step.command for step in steps if step} == {None}


def write_data_settings(sweep, **data):
    old = {"model.path": "a b", "sweep.output": "out", "data.test_fraction": 0.1}
    edit_json(sweep / "sweep.json", lambda raw: raw.update(source="my file.yaml", definition={"overrides": old}))
    for run in sweep.glob("runs/*/run.json"):
        edit_json(run, lambda raw: raw["config"].update(data=data))
    return load_sweep_data(sweep)


@pytest.mark.parametrize(
    ("data", "max_factor", "overrides"),
    [
        ({"test": None, "test_fraction": None}, 5, {"data.test_fraction": 0.2}),
        ({"test": None, "test_fraction": 0.2}, 2.5, {"data.test_fraction": 0.4}),
        (
            {"test": None, "test_fraction": 0.1, "max_test_examples": 7},
            math.inf,
            {"data.max_test_examples": 14, "data.test_fraction": 0.1},
        ),
        ({"test": "test.csv", "test_fraction": None}, 1, None),
        ({}, 1, None),
    ],
)
def test_more_test_examples_need_a_new_sweep_with_the_old_overrides(tmp_path, data, max_factor, overrides):
    found = write_data_settings(build_rank_sweep(tmp_path, {4: 1.7}), **data)
    assert _find_max_examples(found) == max_factor
    if overrides is not None:
        step = _begin_again(_enlarge_test(2.0, found), found, "twice the test examples")
        typed = read_command(step, begin=["lorasweep", "sweep", "my file.yaml"])
        assert typed == {"model.path": "a b", **overrides}


@pytest.mark.parametrize(("regret", "chance"), [(1.2, 0.96), (2.5, 0.58), (9.0, None)])
def test_a_setting_with_a_large_regret_has_twice_the_trials_with_their_chance(tmp_path, regret, chance):
    sweep = build_rank_sweep(tmp_path, {4: 1.7})
    margin = load_sweep_data(sweep).search_margin

    def set_regret(raw):
        for row in raw["settings"]:
            row["regret"] = regret * margin

    edit_json(sweep / "sweep.json", set_regret)
    step = read_steps(sweep)[2]
    assert step.chance == chance
    if chance:
        trials = {row.name: row.trials for row in read_sweep(sweep).arms}["lora"]
        overrides = read_command(step, begin=["lorasweep", "sweep", "--resume", str(sweep)])
        assert overrides == {"arms.lora.trials": 2 * trials}
    else:
        assert "below 30%" in str(step)
