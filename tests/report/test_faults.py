"""Settings that may not be the best are said: values at ends of their ranges, and a search that left much open."""

import pytest
from tests.files import edit_json

from lorasweep.report.caveats import list_edges, list_faults
from lorasweep.report.sweep_data import load_sweep_data
from lorasweep.report.text import describe_fault

from .conftest import build_rank_sweep


def test_a_search_that_left_more_than_a_margin_open_is_decided_by_luck(tmp_path):
    sweep = build_rank_sweep(tmp_path, {4: 1.7})
    margin = load_sweep_data(sweep).evidence.margin
    for factor in (0.5, 1.5):
        edit_json(
            sweep / "sweep.json", lambda raw, f=factor: [row.update(regret=f * margin) for row in raw["settings"]]
        )
        faults = [fault for fault in list_faults(load_sweep_data(sweep)) if fault.name == "regret"]
        assert len(faults) == (factor > 1)
    assert "1.5 margins for `lora-rank-4`" in describe_fault(faults[0])


@pytest.mark.parametrize(
    ("space", "value", "end"),
    [
        ([1, 4, 16], 16, "upper"),
        ([1, 4, 16], 4, None),
        ([2, 4, 16], 2, "lower"),
        ([1, 4, 16], 1, None),  # no rank is lower than 1
        *[
            (wrong, 2, None)
            for wrong in (["a", "b"], [8], [True, False], [1, None], [1, 10**400], {"low": 1}, [[1], [2]])
        ],
        ({"low": 1, "high": 64}, 63, "upper"),
        ({"low": 1e-4, "high": 1e-2, "log": True}, 1.1e-4, "lower"),
        ({"low": 1e-4, "high": 1e-2, "log": True}, 1e-3, None),
        ({"low": 1e-4, "high": 1e-2, "log": True}, -1.0, None),
    ],
)
def test_best_value_at_the_end_of_its_range_is_said_if_a_complete_trial_lies_elsewhere(sweep, space, value, end):
    def sweep_one_rank(raw):
        raw["arms"][1]["space"] = {"method.rank": space}
        for trial in raw["trials"]:
            trial["params"] = {"method.rank": value} if trial["arm"] == "lora" else {}
        raw["trials"][2].update(search_score=3.0, params={"method.rank": 8 if isinstance(value, int) else 2e-3})

    edit_json(sweep / "sweep.json", sweep_one_rank)
    said = list_edges(load_sweep_data(sweep))
    assert len(said) == (1 if end else 0)
    assert all(fault.name == f"{end} end" and fault.key == "method.rank" and "lora" in fault.values for fault in said)
    edit_json(sweep / "sweep.json", lambda raw: raw["trials"][2].update(state="stopped"))  # its score counts
    assert len(list_edges(load_sweep_data(sweep))) == len(said)
    edit_json(sweep / "sweep.json", lambda raw: raw["trials"][2].update(search_score=None))
    assert list_edges(load_sweep_data(sweep)) == []


@pytest.mark.parametrize(("value", "end"), [(0.0, None), (0.2, "upper")])
def test_nothing_is_below_a_rate_of_0(sweep, value, end):
    def sweep_dropout(raw):
        raw["arms"][1]["space"] = {"method.dropout": [0.0, 0.1, 0.2]}
        for trial in raw["trials"]:
            trial["params"] = {"method.dropout": value} if trial["arm"] == "lora" else {}
        raw["trials"][2].update(search_score=3.0, params={"method.dropout": 0.1})

    edit_json(sweep / "sweep.json", sweep_dropout)
    said = [fault.name for fault in list_edges(load_sweep_data(sweep))]
    assert said == [f"{end} end"] * (end is not None)
