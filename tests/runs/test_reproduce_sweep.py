"""Two sweeps are compared proposal by proposal, step by step; the first difference has its trial, step and key."""

import json
import shutil

import pytest

from lorasweep.config.data import ScoreMetric
from lorasweep.record import ArmRow, RunRecord, SettingRow, SweepRecord, Trial, read_sweep, write_record
from lorasweep.runs.reproduce import compare_sweeps

STEPS = [
    {"step": 1, "loss": 2.5, "lr": 0.01, "tokens_per_s": 100.0},
    {"step": 2, "loss": 2.0, "lr": 0.005, "tokens_per_s": 110.0},
    {"step": 2, "validation": {"loss": 2.25, "bits_per_byte": 1.5}},
]


def write_run(folder, steps):
    folder.mkdir(parents=True)
    write_record(RunRecord(status="complete", config={}, metric="loss", direction="minimize"), folder)
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))


@pytest.fixture
def one(tmp_path):
    """A sweep of two trials, of which one was confirmed on two seeds."""
    folder = tmp_path / "one"
    params = {"method.rank": 4, "optim.lr": 0.01}
    common = {"arm": "lora", "params": params}
    trials = [
        Trial(number=n, state=state, search_score=value, run=f"runs/lora-000{n}", **common)
        for n, (state, value) in enumerate([("complete", 1.5), ("stopped", 1.75)])
    ]
    common |= {"stage": "confirm", "setting_number": 0, "state": "complete"}
    common["test_scores"] = {"bits_per_byte": 2.0}
    confirm = [Trial(number=n, seed=seed, run=f"runs/lora-confirm-000{n}", **common) for n, seed in enumerate((7, 9))]
    setting = SettingRow(subject="lora", arm="lora", setting=0, params=params, trial=0, score=1.5)
    arm = ArmRow(name="lora", method="lora", trials=2, settings={}, space={})
    for row in (*trials, *confirm):
        write_run(folder / row.run, STEPS)
    record = SweepRecord(
        status="complete",
        name="s",
        search_metric=ScoreMetric(name="bits_per_byte", direction="minimize"),
        margin="5%",
        definition={},
        arms=[arm],
        trials=trials,
        settings=[setting],
        confirm=confirm,
        confirm_seeds=[7, 9],
        started_at="2026-01-01T00:00:00+00:00",
        makespan_s=10.0,
    )
    write_record(record, folder)
    return folder


@pytest.fixture
def other(one, tmp_path):
    return shutil.copytree(one, tmp_path / "other")


def change_record(change):
    def act(folder):
        record = read_sweep(folder)
        change(record)
        write_record(record, folder)

    return act


def change_step(run, row, **values):
    def act(folder):
        steps = [step | (values if place == row else {}) for place, step in enumerate(STEPS)]
        (folder / "runs" / run / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))

    return act


def set_value(key, value):
    return change_record(lambda record: setattr(record.trials[1], key, value))


def test_sweeps_that_differ_in_times_and_speeds_are_identical(one, other):
    for key, value in (("started_at", "2027-01-01T00:00:00+00:00"), ("makespan_s", 99.0), ("threads", 1)):
        change_record(lambda record, key=key, value=value: setattr(record, key, value))(other)
    change_step("lora-0000", 0, tokens_per_s=7.0)(other)
    assert compare_sweeps(one, other).verdict == "identical"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_step("lora-0001", 1, loss=2.0000000000000004), "trial lora-1, step 2: `loss` was 2.0 and is 2.00000"),
        (change_step("lora-0000", 2, validation={"loss": 1}), "trial lora-0, step 2: `validation loss` was 2.25 and"),
        (change_step("lora-confirm-0001", 0, loss=3.0), "confirm run lora seed 9, step 1: `loss` was 2.5 and is 3.0"),
        (set_value("params", {"method.rank": 4, "optim.lr": 0.02}), "trial lora-1: `optim.lr` was 0.01 and is 0.02"),
        (set_value("state", "complete"), "trial lora-1: `state` was 'stopped' and is 'complete'"),
        (change_record(lambda r: r.settings[0].params.update({"method.rank": 2})), "lora: `method.rank` was 4 and is"),
        (change_record(lambda r: r.trials.pop()), "sweep: `number of trials` was 2 and is 1"),
        (
            change_record(lambda r: setattr(r.confirm[0], "test_scores", {"bits_per_byte": 2.1})),
            "confirm run lora seed 7: `score` was 2.0 and",
        ),
    ],
)
def test_the_first_difference_is_named_with_its_trial_step_and_key(one, other, change, said):
    change(other)
    found = compare_sweeps(one, other)
    assert (found.holds, found.folder) == (False, other)
    assert said in found.description
