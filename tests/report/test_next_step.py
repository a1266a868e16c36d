"""What to type next: a command that the sweep takes and that probably helps, once, or what a new sweep needs."""

import shlex
from dataclasses import replace

import pytest
from tests.files import edit_json
from tests.report.test_golden import SWEEPS, fail_to_learn

import lorasweep
from lorasweep.config.command_line import parse_overrides
from lorasweep.record import read_sweep
from lorasweep.report.evidence.evidence import Evidence
from lorasweep.report.facts import read_findings
from lorasweep.report.next_step import find_next_step
from lorasweep.report.text import describe_headline, describe_step

from .conftest import STEPS, build_rank_sweep, build_sweep, drop_full

FULL_FILE = {"arms": {"full": {"settings": {"method": "full"}}}}
ADDED_FULL = {
    "settings": {"method": "full"},
    "space": {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}},
    "trials": 8,
}


def read_steps(folder):
    return [answer.next for answer in read_findings(folder).answers]


def read_command(step, *, begin):
    """The overrides of a command, after its first words."""
    words = shlex.split(step.command)
    assert words[: len(begin)] == begin
    return parse_overrides(words[len(begin) :])


def resume(sweep, **fields):
    """Writes a change of a resumed sweep into its record."""
    change = {"at": "", "stage": "confirm", "settings": {}, "trials": {}, **fields}
    edit_json(sweep / "sweep.json", lambda raw: raw.update(changes=[change]))


def test_an_open_question_has_seeds_that_may_settle_it_and_a_settled_one_has_nothing(tmp_path):
    sweep = SWEEPS["open"](tmp_path)
    step, rank, setting = read_steps(sweep)
    answers = read_findings(sweep).data.evidence.answers
    overrides = read_command(step, begin=["lorasweep", "sweep", "--resume", str(sweep)])
    assert overrides["confirm.seeds"] == step.number == 2 * max(answer.num_seeds for answer in answers)
    assert 0 < step.seconds <= read_sweep(sweep).makespan_s
    assert "may settle it" in describe_step(step)
    assert (rank.name, rank.number, setting) == ("seeds", 2 * step.number, None)  # twice the seeds would not settle it
    assert f"{describe_step(step)}: {step.command}" in lorasweep.load_sweep(sweep).table()  # in one line, to be copied


@pytest.mark.parametrize("seeds", [15, [3, 6, 15]])
def test_seeds_that_were_added_are_not_advised_again(tmp_path, seeds):
    sweep = SWEEPS["open"](tmp_path)
    before = {step.command for step in read_steps(sweep) if step and step.command}
    resume(sweep, settings={"confirm.seeds": seeds})
    after = [step for step in read_steps(sweep) if step]
    assert not before & {step.command for step in after}
    assert "confirm.seeds" not in str([step.command for step in after])


@pytest.mark.parametrize("status", ["complete", "interrupted"])
def test_a_sweep_without_test_scores_is_resumed(tmp_path, status):
    edit_json(build_sweep(tmp_path, lora=6) / "sweep.json", lambda raw: raw.update(status=status))
    full, *others = read_steps(tmp_path)
    added = {"confirm.seeds": [3, 6, 10]} if status == "complete" else {}
    assert read_command(full, begin=["lorasweep", "sweep", "--resume", str(tmp_path)]) == added
    assert others == [None, None]  # a step is said once


def write_definition(sweep, **overrides):
    definition = {"file": {}, "overrides": {"model": "tiny", **overrides}}
    edit_json(sweep / "sweep.json", lambda raw: raw.update(source="mine.yaml", definition=definition))


def set_runs(sweep, *, steps, examples):
    for run in sweep.glob("runs/*/run.json"):
        edit_json(run, lambda raw: raw.update(steps_planned=steps, data={"train": {"examples": examples}}))


@pytest.mark.parametrize(("steps", "examples", "longer"), [(42, 3200, 200), (150, 2400, 300), (42, 100_000, 420)])
def test_where_nothing_is_learned_the_longer_run_is_the_step(tmp_path, steps, examples, longer):
    """One epoch (of batches of 16), at least twice the steps, and at most ten times."""
    sweep = fail_to_learn(build_sweep(tmp_path))
    typed = {"trainer.max_steps": steps} if steps < STEPS else {}  # of less than an epoch
    write_definition(sweep, **typed, **{"arms.lora.trials": 4})
    set_runs(sweep, steps=steps, examples=examples)
    batch = read_findings(sweep).data.longest_run.config["trainer"]["batch_size"]
    set_runs(sweep, steps=steps, examples=examples * batch // 16)
    first, *others = [step for step in read_steps(sweep) if step]
    assert not others
    assert (first.name, first.number) == ("longer", longer)
    assert first.seconds == pytest.approx(read_sweep(sweep).makespan_s * longer / steps)
    assert read_command(first, begin=["lorasweep", "sweep", "mine.yaml"]) == {
        "model": "tiny",
        "arms.lora.trials": 4,
        "trainer.max_steps": longer,
        "sweep.output": f"{sweep}-longer",
    }


@pytest.mark.parametrize(
    ("file", "overrides", "expected"),
    [
        ({}, {"sweep.trials": 6}, {"sweep.trials": 6, "arms.full": ADDED_FULL}),
        (FULL_FILE, {"arms.full": None}, {}),
        (FULL_FILE, {"arms.full": None, "sweep.trials": 6}, {"sweep.trials": 6, "arms.full.trials": 8}),
        (FULL_FILE | {"settings": {"sweep.trials": 4}}, {"arms.full": None}, {"arms.full.trials": 8}),
    ],
)
def test_full_fine_tuning_that_is_added_keeps_trials_with_which_verdicts_on_it_hold(
    tmp_path, file, overrides, expected
):
    sweep = build_rank_sweep(tmp_path, {4: 1.7})
    drop_full(sweep)
    definition = {"file": file, "overrides": {"worker.num": 1, **overrides}}
    edit_json(sweep / "sweep.json", lambda raw: raw.update(source="mine.yaml", definition=definition))
    (step,) = [step for step in read_steps(sweep) if step and step.name == "arm"]
    command = read_command(step, begin=["lorasweep", "sweep", "mine.yaml"])
    assert command == {**expected, "sweep.output": f"{sweep}-full"}  # without `worker.num`, which was not typed
    assert "shows its time" in describe_step(step)


def test_a_longer_run_that_learned_nothing_is_not_advised_again(tmp_path):
    sweep = fail_to_learn(build_sweep(tmp_path))
    write_definition(sweep, **{"trainer.max_steps": STEPS})
    set_runs(sweep, steps=STEPS, examples=STEPS)
    assert read_steps(sweep) == [None, None, None]


def test_scores_that_still_improve_at_the_end_of_training_ask_for_a_longer_run(tmp_path):
    sweep = SWEEPS["open"](tmp_path)

    def straighten(raw):
        for trial in (*raw["trials"], *raw["confirm"]):
            trial["values"] = {str(step): 2.0 - 0.3 * (step / STEPS) ** 2 for step in (0, 75, 150)}

    edit_json(sweep / "sweep.json", straighten)
    assert {step.name for step in read_steps(sweep) if step} == {"longer"}


def test_a_setting_with_a_large_regret_has_twice_the_trials_once(tmp_path):
    sweep = build_rank_sweep(tmp_path, {4: 1.7})
    margin = read_findings(sweep).data.search_margin
    edit_json(sweep / "sweep.json", lambda raw: [row.update(regret=2 * margin) for row in raw["settings"]])
    trials = {row.name: row.trials for row in read_sweep(sweep).arms}["lora"]
    overrides = read_command(read_steps(sweep)[2], begin=["lorasweep", "sweep", "--resume", str(sweep)])
    assert overrides == {"arms.lora.trials": 2 * trials}
    resume(sweep, trials={"lora": 2 * trials})
    assert read_steps(sweep)[2] is None


@pytest.mark.parametrize(
    ("blocker", "reason"),
    [
        ("few examples", "with more test examples"),
        ("no margin", "`method=frozen`"),
        ("few trials", "twice the trials"),
    ],
)
def test_a_question_that_seeds_cannot_settle_has_its_remedy(tmp_path, monkeypatch, blocker, reason):
    monkeypatch.setattr(Evidence, "may_settle", lambda *_, **__: False)
    findings = read_findings(SWEEPS["open"](tmp_path))
    answer = next(answer for answer in findings.answers if answer.name == "smallest")
    rows = tuple(replace(row, blocker=row.blocker and blocker) for row in answer.rows)
    step = find_next_step(replace(answer, rows=rows), findings.data, findings.learning)
    assert reason in describe_step(step)


def test_a_headline_names_all_that_a_new_sweep_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(Evidence, "may_settle", lambda *_, **__: False)
    findings = read_findings(SWEEPS["open"](tmp_path))
    answer = next(answer for answer in findings.answers if answer.name == "smallest")
    assert answer.needs == ("few examples", "few seeds")
    headline = describe_headline(answer, findings.data)
    assert all(need in headline for need in answer.needs)
