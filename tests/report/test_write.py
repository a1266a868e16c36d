"""The files that a report consists of."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from lorasweep.errors import RecordError
from lorasweep.report import write_report

from .conftest import build_sweep, confirm_sweep


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_files_have_a_line_per_trial_evaluation_and_pair(confirmed: Path) -> None:
    summary = write_report(confirmed)
    trials = read_csv(confirmed / "report/trials.csv")
    assert len(trials) == 25
    assert {"method.rank", "method.alpha", "optim.lr", "bits_per_byte", "run", "reason"} <= set(trials[0])
    failed = next(row for row in trials if row["state"] == "failed")
    assert (failed["bits_per_byte"], failed["reason"]) == ("", "The loss became NaN at step 12.")
    curves = read_csv(confirmed / "report/curves.csv")
    assert len(curves) == 1 + 11 * 7 + 6 * 3 + 6 * 7
    assert curves[0] == {"arm": "frozen", "trial": "0", "step": "0", "bits_per_byte": "2.031"}
    pairs = read_csv(confirmed / "report/pairs.csv")
    assert len(pairs) == 3
    assert {"first", "second", "verdict", "difference", "low", "high", "adjusted_p_value"} <= set(pairs[0])
    assert json.loads((confirmed / "report/summary.json").read_text()) == json.loads(json.dumps(summary.as_json()))


def test_further_evidence_is_words_on_the_page_and_values_in_files(tmp_path: Path) -> None:
    summary = write_report(confirm_sweep(build_sweep(tmp_path), noise=0.2))
    pair = next(pair for pair in summary.data.evidence.pairs if pair.verdict == "inconclusive")
    assert pair.settled_by
    row = next(row for row in read_csv(tmp_path / "report/pairs.csv") if row["verdict"] == "inconclusive")
    assert (row["settled_by"], row["more_seeds"]) == ("seeds", str(pair.settled_by.more_seeds))
    pairs = json.loads((tmp_path / "report/summary.json").read_text())["evidence"]["pairs"]
    assert {"kind": "seeds", "more_seeds": pair.settled_by.more_seeds} in [row["settled_by"] for row in pairs]
    page = (tmp_path / "report/index.html").read_text()
    assert f"inconclusive: {pair.settled_by.more_seeds} more seeds<" in page


def test_folder_that_is_no_sweep_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"must contain sweep\.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
