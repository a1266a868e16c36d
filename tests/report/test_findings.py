"""The sentences below the answers: test examples, the margin, and ends of ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorasweep.report.fairness import list_edges
from lorasweep.report.sweep_data import load_sweep_data

from .conftest import edit_json


@pytest.mark.parametrize(
    ("space", "value", "end"),
    [
        ([1, 4, 16], 16, "upper"),
        ([16, 1, 4], 16, "upper"),
        ([1, 4, 16], 4, None),
        ([2, 4, 16], 2, "lower"),
        ([1, 4, 16], 1, None),  # no rank is lower than 1
        ([8], 8, None),
        (["a", "b"], "b", None),
        ({"low": 1, "high": 64}, 63, "upper"),
        ({"low": 1e-4, "high": 1e-2, "log": True}, 1.1e-4, "lower"),
        ({"low": 1e-4, "high": 1e-2, "log": True}, 1e-3, None),
        ({"low": 1e-4, "high": 1e-2, "log": True}, -1.0, None),
    ],
)
def test_best_value_at_the_end_of_its_range_is_said_if_a_complete_trial_lies_elsewhere(
    sweep: Path, space: object, value: object, end: str | None
) -> None:
    def sweep_one_rank(raw: dict[str, Any]) -> None:
        raw["arms"][1]["space"] = {"method.rank": space}
        for trial in raw["trials"]:
            trial["params"] = {"method.rank": value} if trial["arm"] == "lora" else {}
        raw["trials"][2].update(value=3.0, params={"method.rank": 8 if isinstance(value, int) else 2e-3})

    edit_json(sweep / "sweep.json", sweep_one_rank)
    said = list_edges(load_sweep_data(sweep))
    assert len(said) == (1 if end else 0)
    assert all(key == "method.rank" and f"`{key}` of `lora`" in text and f"{end} end" in text for key, text in said)
    edit_json(sweep / "sweep.json", lambda raw: raw["trials"][2].update(state="pruned"))  # its score at a rung counts
    assert len(list_edges(load_sweep_data(sweep))) == len(said)
    edit_json(sweep / "sweep.json", lambda raw: raw["trials"][2].update(value=None))
    assert list_edges(load_sweep_data(sweep)) == []
