"""What `summary.json` and the sentences say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorasweep.report.summary import Summary, summarize

from .conftest import edit_json


def shares_of(summary: Summary) -> list[float | None]:
    return [arm["share_of_full_gain"] for arm in summary.as_json()["arms"]]


def test_share_of_full_gain_is_mirrored_when_maximizing(sweep: Path) -> None:
    def negate(raw: dict[str, Any]) -> None:
        raw["direction"] = "maximize"
        for trial in raw["trials"]:
            trial["value"] = None if trial["value"] is None else -trial["value"]

    before = shares_of(summarize(sweep))
    edit_json(sweep / "sweep.json", negate)
    assert shares_of(summarize(sweep)) == pytest.approx(before)
