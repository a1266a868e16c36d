"""Several sweeps side by side: what stands between their scores is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasweep.report.side_by_side import describe_cell, describe_differences
from lorasweep.report.summary import summarize
from lorasweep.report.tables import load_sweep_data

from .conftest import build_sweep, confirm_sweep, edit_json


def test_cell_is_the_confirmed_score_else_the_best_of_the_search(confirmed: Path, tmp_path: Path) -> None:
    summary = summarize(load_sweep_data(confirmed))
    searched = summarize(load_sweep_data(build_sweep(tmp_path / "b")))
    cells = [describe_cell(summary, "lora"), describe_cell(searched, "lora"), describe_cell(searched, "gone")]
    assert cells[0]
    assert cells[1]
    assert (cells[0].is_confirmed, cells[1].is_confirmed, cells[2]) == (True, False, None)
    assert "[" in cells[0].score
    assert cells[1].score == "1.688"
    assert cells[1].about.startswith("93 % of full's gain; rank ")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": {"test": {"fingerprint": "b"}}}, "different test data"),
        ({"data": {"validation": {"fingerprint": "b"}}}, "different validation data"),
        ({"base": {"fingerprint": "b"}}, "different base models"),
        ({"data": {"test": {"fingerprint": "a"}}, "base": {"fingerprint": "a"}}, None),
        ({"data": {"test": "b"}}, None),
    ],
)
def test_what_stands_between_the_scores_is_said(
    tmp_path: Path, change: dict[str, object], sentence: str | None
) -> None:
    same = {"data": {"test": {"fingerprint": "a"}, "validation": {"fingerprint": "a"}}, "base": {"fingerprint": "a"}}
    sweeps = [build_sweep(tmp_path / name, lora=2) for name in ("one", "two")]
    for sweep, values in zip(sweeps, (same, change), strict=True):
        for path in sweep.glob("runs/*/run.json"):
            edit_json(path, lambda raw, values=values: raw.update(values))
    said = [text for text in describe_differences([load_sweep_data(s) for s in sweeps]) if "different" in text]
    assert len(said) == (1 if sentence else 0)
    assert sentence is None or sentence in said[0]


def test_different_metrics_are_said(sweep: Path, tmp_path: Path) -> None:
    other = build_sweep(tmp_path / "other")
    edit_json(other / "sweep.json", lambda raw: raw.update(metric="loss"))
    sentences = describe_differences([load_sweep_data(sweep), load_sweep_data(other)])
    assert sentences[0] == "The sweeps have different metrics (bits per byte, loss): scores can't be compared."


def test_whether_differences_are_tested_is_said(sweep: Path, tmp_path: Path) -> None:
    confirmed = confirm_sweep(build_sweep(tmp_path / "c"))
    data = [load_sweep_data(folder) for folder in (confirmed, sweep)]
    assert describe_differences([data[0], data[0]])[-1].startswith("Arms were tested inside each sweep")
    assert "one seed on validation data" in describe_differences(data)[-1]
