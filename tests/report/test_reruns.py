"""The confirm stage as it is read: whatever can't be used is a sentence, and the rest stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorasweep.errors import RecordError
from lorasweep.report.tables import load_sweep_data

from .conftest import build_sweep, confirm_sweep, edit_json


def test_each_rerun_is_joined_with_its_run_by_arm_and_seed(confirmed: Path) -> None:
    edit_json(confirmed / "sweep.json", lambda raw: raw["confirm"].reverse())
    data = load_sweep_data(confirmed)
    assert [len(arm.reruns) for arm in data.arms] == [1, 5, 5]
    assert [rerun.seed for rerun in data.arms[1].reruns] == [0, 1, 2, 3, 4]
    assert all(rerun.record and rerun.is_scored for rerun in data.reruns)
    assert data.evidence.num_examples == 40
    assert data.problems == ()


def test_winner_is_the_trial_that_was_confirmed_even_if_another_is_better_now(confirmed: Path) -> None:
    edit_json(confirmed / "sweep.json", lambda raw: raw["trials"][1].update(value=0.5))
    lora = load_sweep_data(confirmed).arms[1]
    assert lora.best
    assert lora.winner
    assert lora.best.number == 0
    assert lora.winner.number == lora.reruns[0].trial != 0


def test_score_that_the_row_lacks_is_that_of_the_run(confirmed: Path) -> None:
    before = [rerun.value for rerun in load_sweep_data(confirmed).reruns]
    edit_json(confirmed / "sweep.json", lambda raw: [row.update(value=None) for row in raw["confirm"]])
    assert [rerun.value for rerun in load_sweep_data(confirmed).reruns] == before


def test_arm_without_a_confirmed_run_is_named_and_the_others_are_compared(confirmed: Path) -> None:
    def drop(raw: dict[str, Any]) -> None:
        raw["confirm"] = [row for row in raw["confirm"] if row["arm"] != "full"]

    edit_json(confirmed / "sweep.json", drop)
    data = load_sweep_data(confirmed)
    assert "`full` was not confirmed: it has no score on test data." in data.problems
    assert [arm.name for arm in data.evidence.arms] == ["frozen", "lora"]
    assert data.evidence.num_compared == 1


def test_all_reruns_of_an_arm_failed_is_said(confirmed: Path) -> None:
    def fail(raw: dict[str, Any]) -> None:
        for row in raw["confirm"]:
            row.update(state="failed", value=None)

    edit_json(confirmed / "sweep.json", fail)
    data = load_sweep_data(confirmed)
    assert "`lora` has no score on test data: none of its 5 reruns finished with one." in data.problems
    assert data.evidence.arms == ()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("row,score,weight\n0,nan,1\n", "its scores must be finite"),
        ("<script>", "its scores must be finite"),
        ("row,score,weight\n0,9,1\n1,9,1\n", "they give 9 where the run's score is"),
    ],
)
def test_damaged_examples_are_a_sentence_and_seeds_still_count(confirmed: Path, content: str, sentence: str) -> None:
    (confirmed / "runs/lora-confirm-0002/test_scores.csv").write_text(content)
    data = load_sweep_data(confirmed)
    said = [*data.problems, *data.evidence.notes]
    assert any(sentence in text for text in said)
    lora = data.evidence.arm("lora")
    assert lora
    assert (lora.uses_examples, len(lora.seeds)) == (False, 5)


def test_sweep_without_examples_has_intervals_over_seeds(tmp_path: Path) -> None:
    data = load_sweep_data(confirm_sweep(build_sweep(tmp_path), examples=0))
    assert any("intervals are over seeds alone" in note for note in data.evidence.notes)
    assert data.evidence.num_compared == 3


@pytest.mark.parametrize(
    "row",
    [
        {"arm": 3},
        {"seed": "x"},
        {"trial": None},
        {"value": [1]},
        {"run": 5},
        {"reason": {}},
        {"seed": True},
    ],
)
def test_row_of_wrong_kinds_is_named(confirmed: Path, row: dict[str, Any]) -> None:
    edit_json(confirmed / "sweep.json", lambda raw: raw["confirm"][2].update(row))
    with pytest.raises(RecordError, match=f"`{next(iter(row))}` in .* must be .*, but got .* Restore the file"):
        load_sweep_data(confirmed)


def test_row_of_an_arm_that_is_gone_is_left_out_and_said(confirmed: Path) -> None:
    edit_json(confirmed / "sweep.json", lambda raw: raw["confirm"][2].update(arm="gone"))
    data = load_sweep_data(confirmed)
    assert any(problem.startswith("A row of the confirm stage is left out") for problem in data.problems)
    assert len(data.reruns) == 10


@pytest.mark.parametrize("run", ["../other/runs/full-0000", "/etc", ""])
def test_rerun_outside_the_sweep_is_not_read(confirmed: Path, run: str) -> None:
    build_sweep(confirmed.parent / "other")
    edit_json(confirmed / "sweep.json", lambda raw: raw["confirm"][2].update(run=run))
    data = load_sweep_data(confirmed)
    assert data.arms[1].reruns[1].record is None


def test_arm_scored_by_another_metric_is_said_and_not_compared(confirmed: Path) -> None:
    for path in confirmed.glob("runs/full-*/run.json"):
        edit_json(path, lambda raw: raw.update(metric="accuracy", best={"accuracy": 0.9}, test={"accuracy": 0.9}))
    data = load_sweep_data(confirmed)
    assert (
        "Runs of `full` are scored by `accuracy` and not by `bits_per_byte` like the sweep: they are not compared."
        in data.problems
    )
    assert data.arms[2].best is None
    assert data.evidence.full is None
    assert data.arms[1].best
