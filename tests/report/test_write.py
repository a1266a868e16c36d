"""The files that a report consists of."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from lorasweep.errors import RecordError
from lorasweep.report import write_report


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_trials_csv_has_a_line_per_trial_with_dotted_keys(sweep: Path) -> None:
    write_report(sweep)
    rows = read_csv(sweep / "report/trials.csv")
    assert len(rows) == 25
    assert {"method.rank", "method.alpha", "optim.lr", "bits_per_byte", "run", "reason"} <= set(rows[0])
    failed = next(row for row in rows if row["state"] == "failed")
    assert (failed["bits_per_byte"], failed["reason"]) == ("", "The loss became NaN at step 12.")


def test_curves_csv_has_a_line_per_evaluation(sweep: Path) -> None:
    write_report(sweep)
    rows = read_csv(sweep / "report/curves.csv")
    assert len(rows) == 1 + 11 * 7 + 6 * 3 + 6 * 7
    assert rows[0] == {"arm": "frozen", "trial": "0", "step": "0", "bits_per_byte": "2.031"}


def test_summary_json_is_what_was_returned(sweep: Path) -> None:
    summary = write_report(sweep)
    assert json.loads((sweep / "report/summary.json").read_text()) == json.loads(json.dumps(summary.as_json()))


def test_folder_that_is_no_sweep_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"must contain sweep\.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
