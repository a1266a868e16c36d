"""What the report says about scores that vary from search to search, against numbers computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorasweep.report import write_report
from lorasweep.report.search_spread import SearchWinner, measure_search_spread
from lorasweep.report.sweep_data import load_sweep_data

from .conftest import edit_json
from .test_write import read_csv

SCORES = {"lora": [(1.70, 1.64), (1.66, 1.90), (1.80, 1.60)], "full": [(1.70, 1.71), (1.62, 1.60), (1.65, 1.66)]}
"""By arm, the scores of the two trials of each of three searches."""


@pytest.fixture
def searched(sweep: Path) -> Path:
    """A finished sweep with three searches of two trials of each arm, whose scores are `SCORES`."""

    def change(raw: dict[str, Any]) -> None:
        trials = [trial for trial in raw["trials"] if trial["arm"] == "frozen"]
        for arm, searches in SCORES.items():
            rows = [trial for trial in raw["trials"] if trial["arm"] == arm and trial["state"] == "complete"]
            values = [(search, value) for search, pair in enumerate(searches, start=1) for value in pair]
            for number, (row, (search, value)) in enumerate(zip(rows, values, strict=False)):
                trials.append(row | {"number": number, "search": search, "value": value})
        for arm in raw["arms"]:
            arm["trials"] = 6 if arm["name"] in SCORES else 1
        raw["trials"], raw["search_seeds"] = trials, [11, 12]

    edit_json(sweep / "sweep.json", change)
    return sweep


def test_the_spread_is_that_of_the_best_of_each_search(searched: Path) -> None:
    spread = measure_search_spread(load_sweep_data(searched))
    assert spread is not None
    lora, full = spread.arms
    assert lora.winners == (
        SearchWinner(search=1, trial=1, score=1.64),
        SearchWinner(search=2, trial=2, score=1.66),
        SearchWinner(search=3, trial=5, score=1.60),
    )
    # The winners of lora are 1.64, 1.66 and 1.60, with the mean 4.90 / 3 and the variance 0.0028 / 3.
    assert (lora.arm, lora.lowest, lora.highest) == ("lora", 1.60, 1.66)
    assert lora.mean == pytest.approx(1.633333, abs=1e-6)
    assert lora.std == pytest.approx((0.0028 / 3) ** 0.5)
    # Those of full are 1.70, 1.60 and 1.65.
    assert (full.arm, full.lowest, full.highest) == ("full", 1.60, 1.70)
    assert (full.mean, full.std) == (pytest.approx(1.65), pytest.approx(0.05))
    (pair,) = spread.pairs
    assert (pair.first, pair.second, pair.num_same, pair.num_searches) == ("lora", "full", 2, 3)
    assert "0.031 (`lora`) to 0.05 (`full`)" in spread.sentence
    assert spread.sentence.endswith("`lora` is better than `full` in 2 of 3.")


def test_where_higher_is_better_the_best_and_the_order_turn_round(searched: Path) -> None:
    edit_json(searched / "sweep.json", lambda raw: raw.update(direction="maximize"))
    spread = measure_search_spread(load_sweep_data(searched))
    assert spread is not None
    lora, full = spread.arms
    assert [winner.score for winner in lora.winners] == [1.70, 1.90, 1.80]
    assert [winner.score for winner in full.winners] == [1.71, 1.62, 1.66]
    (pair,) = spread.pairs
    assert (pair.first, pair.num_same, pair.num_searches) == ("lora", 2, 3)


def test_a_search_that_is_not_over_or_has_no_score_is_left_out(searched: Path) -> None:
    def change(raw: dict[str, Any]) -> None:
        lora = [trial for trial in raw["trials"] if trial["arm"] == "lora"]
        lora[5]["state"] = "paused"
        lora[0]["state"] = lora[1]["state"] = "failed"

    edit_json(searched / "sweep.json", change)
    spread = measure_search_spread(load_sweep_data(searched))
    assert spread is not None
    assert [arm.arm for arm in spread.arms] == ["full"]  # one winner is left of lora, which has no spread
    assert spread.pairs == ()


def test_the_report_shows_the_spread_everywhere(searched: Path) -> None:
    summary = write_report(searched)
    assert summary.spread is not None
    assert summary.spread.sentence in summary.sentences
    report = searched / "report"
    raw = json.loads((report / "summary.json").read_text())["searches"]
    assert raw["arms"][0]["winners"][2] == {"search": 3, "trial": 5, "score": 1.60}
    assert raw["pairs"] == [{"first": "lora", "second": "full", "num_searches": 3, "num_same": 2}]
    assert [
        (row["arm"], row["search"], row["trial"], row["bits_per_byte"]) for row in read_csv(report / "searches.csv")
    ][2:4] == [("lora", "3", "5", "1.6"), ("full", "1", "0", "1.7")]
    assert [row["search"] for row in read_csv(report / "trials.csv")] == ["1", *2 * ["1", "1", "2", "2", "3", "3"]]
    page = (report / "index.html").read_text()
    assert 'id="searches"' in page
    assert "2 of 3 searches" in page


def test_with_one_search_nothing_is_shown(sweep: Path) -> None:
    summary = write_report(sweep)
    assert summary.spread is None
    assert not any("searches with different seeds" in sentence for sentence in summary.sentences)
    assert summary.as_json()["searches"] is None
    assert not (sweep / "report" / "searches.csv").exists()
    assert 'id="searches"' not in (sweep / "report" / "index.html").read_text()
