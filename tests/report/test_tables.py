"""The joins of a sweep's records, and what becomes of records that are missing or damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorasweep.errors import RecordError
from lorasweep.report.tables import load_sweep_data

from .conftest import build_sweep, edit_json


def test_each_trial_is_joined_with_its_run(sweep: Path) -> None:
    data = load_sweep_data(sweep)
    assert [(arm.name, len(arm.trials)) for arm in data.arms] == [("frozen", 1), ("lora", 18), ("full", 6)]
    assert [(t.record.arm, t.record.trial) for t in data.trials if t.record] == [(t.arm, t.number) for t in data.trials]
    assert data.problems == ()


def test_best_trial_is_complete_even_if_a_pruned_one_scored_better(sweep: Path) -> None:
    def make_pruned_best(raw: dict[str, Any]) -> None:
        pruned = next(trial for trial in raw["trials"] if trial["state"] == "pruned")
        pruned["value"] = 0.5

    edit_json(sweep / "sweep.json", make_pruned_best)
    lora = load_sweep_data(sweep).arms[1]
    complete = [trial.value for trial in lora.trials if trial.state == "complete" and trial.value is not None]
    assert lora.best
    assert lora.best.value == min(complete)


def test_higher_is_better_when_the_sweep_maximizes(sweep: Path) -> None:
    edit_json(sweep / "sweep.json", lambda raw: raw.update(direction="maximize"))
    lora = load_sweep_data(sweep).arms[1]
    complete = [trial.value for trial in lora.trials if trial.state == "complete" and trial.value is not None]
    assert lora.best
    assert lora.best.value == max(complete)


def test_of_equal_trials_the_earlier_is_best(sweep: Path) -> None:
    def level(raw: dict[str, Any]) -> None:
        for trial in raw["trials"]:
            trial["value"] = 1.0

    edit_json(sweep / "sweep.json", level)
    assert [arm.best.number for arm in load_sweep_data(sweep).arms if arm.best] == [0, 0, 0]


def test_curve_keeps_the_later_of_steps_that_a_resumed_run_wrote_twice(sweep: Path) -> None:
    with (sweep / "runs/full-0000/steps.jsonl").open("a") as file:
        file.write(json.dumps({"step": 25, "validation": {"bits_per_byte": 1.25}}) + "\n")
    curve = load_sweep_data(sweep).arms[2].trials[0].curve
    assert [step for step, _ in curve] == [0, 25, 50, 75, 100, 125, 150]
    assert dict(curve)[25] == 1.25


def test_curve_skips_rows_that_are_not_measurements(sweep: Path) -> None:
    nan = '{"step": 5, "validation": {"bits_per_byte": NaN}}'
    rows = ['{"step": 0, "validation": {"bits_per_byte": 2.0}}', nan, "[1]", '{"step": "x"}']
    (sweep / "runs/full-0000/steps.jsonl").write_text("\n".join(rows))
    (sweep / "runs/full-0001/steps.jsonl").write_bytes(b"\xff\xfe")
    full = load_sweep_data(sweep).arms[2]
    assert full.trials[0].curve == ((0, 2.0),)
    assert full.trials[1].curve == ()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "must contain run.json"),
        ("{", "damaged"),
        ('{"format": "lorasweep.run", "version": 1}', "every field"),
        ("wrong type", "`wall_s` in "),
    ],
)
def test_run_that_cannot_be_read_is_a_sentence_and_its_trial_stays(
    sweep: Path, content: str | None, sentence: str
) -> None:
    path = sweep / "runs/full-0002/run.json"
    if content == "wrong type":
        edit_json(path, lambda raw: raw.update(wall_s="long"))
    elif content is None:
        path.unlink()
    else:
        path.write_text(content)
    data = load_sweep_data(sweep)
    assert len(data.problems) == 1
    assert sentence in data.problems[0]
    trial = data.arms[2].trials[2]
    assert trial.record is None
    assert trial.value is not None


def test_run_outside_the_sweep_is_not_read(sweep: Path) -> None:
    build_sweep(sweep.parent / "other")
    edit_json(sweep / "sweep.json", lambda raw: raw["trials"][0].update(run="../other/runs/full-0000"))
    assert "lies outside the sweep's" in load_sweep_data(sweep).problems[0]


def test_trial_of_an_unlisted_arm_is_named(sweep: Path) -> None:
    edit_json(sweep / "sweep.json", lambda raw: raw["trials"][0].update(arm="gone"))
    data = load_sweep_data(sweep)
    assert data.problems == ("Trial 0 belongs to arm `gone`, which is not listed.",)
    assert len(data.trials) == 24


def test_folder_that_is_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"must contain sweep\.json"):
        load_sweep_data(tmp_path)


def test_sweep_record_of_wrong_types_is_refused(sweep: Path) -> None:
    edit_json(sweep / "sweep.json", lambda raw: raw["trials"][3].update(params=[1]))
    with pytest.raises(RecordError, match=r"`params` in .* must be a mapping, but got .* Restore the file"):
        load_sweep_data(sweep)


def test_setting_is_the_swept_one_else_the_configured_one(sweep: Path) -> None:
    data = load_sweep_data(sweep)
    lora, frozen = data.arms[1].trials[0], data.arms[0].trials[0]
    assert lora.setting("method.rank") == lora.params["method.rank"]
    assert frozen.setting("optim.lr") == 1e-3
    assert frozen.setting("optim.lr.deeper") is None
    assert replace(frozen, record=None).setting("optim.lr") is None
    assert frozen.number_at("method.name") is None
