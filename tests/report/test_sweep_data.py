"""A sweep's records are joined, and whatever can't be read is a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorasweep.errors import RecordError
from lorasweep.report.sweep_data import load_sweep_data

from .conftest import build_sweep, confirm_sweep, edit_json


def test_trials_and_reruns_are_joined_with_their_runs(confirmed: Path) -> None:
    edit_json(confirmed / "sweep.json", lambda raw: raw["confirm"].reverse())
    data = load_sweep_data(confirmed)
    assert [(arm.name, len(arm.trials), len(arm.confirm_runs)) for arm in data.arms] == [
        ("frozen", 1, 1),
        ("lora", 18, 5),
        ("full", 6, 5),
    ]
    assert all((t.record.arm, t.record.trial) == (t.arm, t.number) for t in data.trials if t.record)
    assert [rerun.seed for rerun in data.arms[1].confirm_runs] == [0, 1, 2, 3, 4]
    assert all(rerun.record and rerun.is_complete for rerun in data.confirm_runs)
    assert (data.evidence.num_examples, data.evidence.num_groups, data.problems) == (40, 20, ())


def test_intervals_end_where_an_own_metric_ends(confirmed: Path) -> None:
    lora = load_sweep_data(confirmed).evidence.subject("lora")
    assert lora
    assert lora.interval
    assert lora.mean is not None
    low = (lora.interval[0] + lora.mean) / 2
    edit_json(confirmed / "sweep.json", lambda raw: raw.update(metric="Own", metric_range=[low, None]))
    cut = load_sweep_data(confirmed).evidence.subject("lora")
    assert cut
    assert cut.interval == (low, lora.interval[1])


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_best_trial_is_the_best_complete_one(sweep: Path, direction: str) -> None:
    def make_pruned_best(raw: dict[str, Any]) -> None:
        raw["direction"] = direction
        pruned = next(trial for trial in raw["trials"] if trial["state"] == "pruned")
        pruned["value"] = 0.5 if direction == "minimize" else 5.0

    edit_json(sweep / "sweep.json", make_pruned_best)
    lora = load_sweep_data(sweep).arms[1]
    complete = [trial.value for trial in lora.trials if trial.state == "complete" and trial.value is not None]
    assert lora.best
    assert lora.best.value == (min(complete) if direction == "minimize" else max(complete))


def test_of_equal_trials_the_earlier_is_best(sweep: Path) -> None:
    edit_json(sweep / "sweep.json", lambda raw: [trial.update(value=1.0) for trial in raw["trials"]])
    assert [arm.best.number for arm in load_sweep_data(sweep).arms if arm.best] == [0, 0, 0]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "must contain run.json"),
        ("{", "damaged"),
        ('{"format": "lorasweep.run", "version": 1}', "damaged"),
    ],
)
def test_run_that_cannot_be_read_is_a_sentence_and_its_trial_stays(
    sweep: Path, content: str | None, sentence: str
) -> None:
    path = sweep / "runs/full-0002/run.json"
    path.unlink() if content is None else path.write_text(content)
    data = load_sweep_data(sweep)
    (problem,) = data.problems
    assert sentence in problem
    assert data.arms[2].trials[2].record is None
    assert data.arms[2].trials[2].value is not None


@pytest.mark.parametrize("row", ["trials", "confirm"])
def test_sweep_record_of_wrong_types_is_refused(confirmed: Path, row: str) -> None:
    edit_json(confirmed / "sweep.json", lambda raw: raw[row][2].update(run=5))
    with pytest.raises(RecordError, match="run"):
        load_sweep_data(confirmed)


def test_setting_is_the_swept_one_else_the_configured_one(sweep: Path) -> None:
    data = load_sweep_data(sweep)
    lora, frozen = data.arms[1].trials[0], data.arms[0].trials[0]
    assert lora.setting("method.rank") == lora.params["method.rank"]
    assert frozen.setting("optim.lr") == 1e-3
    assert frozen.setting("optim.lr.deeper") is None
    assert frozen.numeric_setting("method.name") is None


def test_arm_without_a_rerun_is_named_and_the_others_are_compared(confirmed: Path) -> None:
    def drop(raw: dict[str, Any]) -> None:
        raw["confirm"] = [row for row in raw["confirm"] if row["arm"] != "full"]

    edit_json(confirmed / "sweep.json", drop)
    data = load_sweep_data(confirmed)
    assert data.problems == ("`full` has no score on test data.",)
    assert [arm.name for arm in data.evidence.subjects] == ["frozen", "lora"]
    assert [answer.verdict for answer in data.evidence.answers] == ["open"]


def test_arm_whose_reruns_all_failed_is_named(confirmed: Path) -> None:
    edit_json(confirmed / "sweep.json", lambda raw: [row.update(state="failed", value=None) for row in raw["confirm"]])
    data = load_sweep_data(confirmed)
    assert any("`lora` has no score on test data" in problem for problem in data.problems)
    assert data.evidence.subjects == ()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("row,score,weight,group\n0,nan,1,0\n1,1,1,1\n", "their mean is nan"),
        ("row,score,weight,group\n0,9,1,0\n1,9,1,1\n", "their mean is 9"),
    ],
)
def test_damaged_examples_are_a_sentence_and_seeds_still_count(confirmed: Path, content: str, sentence: str) -> None:
    (confirmed / "runs/lora-confirm-0002/test_scores.csv").write_text(content)
    data = load_sweep_data(confirmed)
    assert any(sentence in text for text in (*data.problems, *data.evidence.notes))
    lora = data.evidence.subject("lora")
    assert lora
    assert (data.evidence.num_examples, len(lora.seeds)) == (0, 5)


def test_sweep_without_examples_has_intervals_over_seeds(tmp_path: Path) -> None:
    data = load_sweep_data(confirm_sweep(build_sweep(tmp_path), examples=0))
    assert any("over seeds alone" in note for note in data.evidence.notes)
    assert data.evidence.answers[0].is_settled
