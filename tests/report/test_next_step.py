"""What to type next: the command has a number that the sweep takes, or there is a reason why no command helps."""

import shlex

import pytest
from tests.files import edit_json
from tests.report.test_golden import SWEEPS, fail_to_learn

import lorasweep
from lorasweep.config.command_line import parse_overrides
from lorasweep.record import read_sweep
from lorasweep.report.evidence.verdicts import Remedy
from lorasweep.report.findings import read_findings
from lorasweep.report.next_step import _apply_remedy
from lorasweep.report.sweep_data import load_sweep_data

from .conftest import build_rank_sweep, build_sweep


def read_steps(folder):
    return [line.next for line in read_findings(folder).answers]


def read_command(step, *, begin):
    """The overrides of a command, after its first words."""
    words = shlex.split(step.command)
    assert words[: len(begin)] == begin
    return parse_overrides(words[len(begin) :])


def test_an_open_question_has_the_seeds_that_would_settle_it_and_a_settled_one_has_nothing(tmp_path):
    sweep = SWEEPS["open"](tmp_path)
    full, rank, setting = read_steps(sweep)
    answers = read_findings(sweep).data.evidence.answers
    (answer,) = (one for one in answers if one.remedy and one.remedy.more == 7)
    resume = ["lorasweep", "sweep", "--resume", str(sweep)]
    assert read_command(full, begin=resume) == {"confirm.seeds": answer.num_seeds + 7}
    assert read_command(rank, begin=resume)["confirm.seeds"] > answer.num_seeds
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


EXAMPLES = Remedy("examples", 2)


@pytest.mark.parametrize(
    ("data", "remedy", "overrides"),
    [
        ({"test": None, "test_fraction": None}, Remedy("examples", 1.5), {"data.test_fraction": 0.15}),
        ({"test": None, "test_fraction": 0.2}, EXAMPLES, {"data.test_fraction": 0.4}),
        (
            {"test": None, "test_fraction": 0.2, "max_test_examples": 7},
            Remedy("examples", 2),
            "data.max_test_examples",
        ),
        ({"test": None, "test_fraction": 0.2}, Remedy("examples", 3), None),
        ({"test": "test.csv", "test_fraction": None}, EXAMPLES, None),
        ({}, EXAMPLES, None),
        ({}, Remedy("margin"), None),
    ],
)
def test_more_test_examples_need_a_new_sweep_with_the_old_overrides(tmp_path, data, remedy, overrides):
    sweep = build_rank_sweep(tmp_path, {4: 1.7})
    old = {"model.path": "a b", "sweep.output": "out", "data.test_fraction": 0.1}
    edit_json(sweep / "sweep.json", lambda raw: raw.update(source="my file.yaml", definition={"overrides": old}))
    for run in sweep.glob("runs/*/run.json"):
        edit_json(run, lambda raw: raw["config"].update(data=data))
    step = _apply_remedy([remedy], ["lora"], load_sweep_data(sweep))
    if overrides is None:
        assert (step.command, bool(step.reason)) == (None, True)
        return
    found = read_command(step, begin=["lorasweep", "sweep", "my file.yaml"])
    assert found.pop("model.path") == "a b"
    assert found == (overrides if isinstance(overrides, dict) else {"data.test_fraction": 0.1, overrides: 14})


def test_more_trials_are_asked_of_the_arms_in_question(tmp_path):
    sweep = build_rank_sweep(tmp_path, {4: 1.7})
    trials = {row.name: row.trials for row in read_sweep(sweep).arms}
    step = _apply_remedy([Remedy("trials")], ["lora", "full"], load_sweep_data(sweep))
    found = read_command(step, begin=["lorasweep", "sweep", "--resume", str(sweep)])
    assert found == {f"arms.{name}.trials": 2 * trials[name] for name in ("full", "lora")}
