"""What of a large sweep is drawn and listed: a part with the best in it, and a sentence on the rest."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from lorasweep.report import downsampling, page
from lorasweep.report.downsampling import (
    MIN_GROUP_ITEMS,
    allocate,
    describe_downsampling,
    downsample,
    downsample_groups,
)
from lorasweep.report.figures import PANELS, curves
from lorasweep.report.page import render_page, select_rows
from lorasweep.report.summary import summarize
from lorasweep.report.sweep_data import SweepData, load_sweep_data

from .conftest import build_sweep


@pytest.fixture
def large(tmp_path: Path) -> SweepData:
    """A sweep of 60 LoRA trials."""
    return load_sweep_data(build_sweep(tmp_path, lora=60))


@pytest.mark.parametrize("length", [1, 8, 1000])
def test_what_is_reduced_keeps_its_ends_and_is_spread_evenly(length: int) -> None:
    reduced = downsample(range(length), 8)
    assert len(reduced) == min(length, 8)
    assert (reduced[0], reduced[-1]) == (0, length - 1)
    gaps = [after - before for before, after in pairwise(reduced)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_groups_get_shares_by_their_size_and_a_small_one_stays_whole() -> None:
    assert allocate([600, 300, 5, 100], 100) == [59, 29, 5, MIN_GROUP_ITEMS]
    assert allocate([60, 30, 5], 95) == [60, 30, 5]
    assert allocate([], 10) == []


def test_reduced_groups_are_in_order_and_have_the_lowest_and_highest() -> None:
    groups = [[(score * 37) % 101 for score in range(101)], [7, 3]]
    first, second = downsample_groups(groups, key=lambda score: score, max_items=40)
    assert (first[0], first[-1], len(first)) == (0, 100, 39)
    assert list(first) == sorted(first)
    assert second == [7, 3]
    assert "41 of 103 are drawn" in describe_downsampling([first, second], groups, file="trials.csv")
    assert describe_downsampling(groups, groups, file="trials.csv") == ""


def test_every_figure_of_a_large_sweep_says_what_it_leaves_out(
    large: SweepData, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {panel.key: panel for panel in (draw(large) for draw in PANELS)}
    monkeypatch.setitem(downsampling.downsample_groups.__kwdefaults__, "max_items", 20)
    monkeypatch.setattr(curves, "MAX_CURVES", 20)
    drawn = {panel.key: panel for panel in (draw(large) for draw in PANELS)}
    for key in ("rank", "lr", "curves", "tradeoff", "settings"):
        assert " are drawn, evenly over their scores" in drawn[key].text, key
        assert drawn[key].rows == before[key].rows, "the file has all"
        assert len(drawn[key].figures[0].to_json()) < 0.7 * len(before[key].figures[0].to_json()), key


def test_best_of_each_arm_is_drawn_however_few_are(large: SweepData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(downsampling.downsample_groups.__kwdefaults__, "max_items", 20)
    best = {arm.name: arm.best.value for arm in large.arms if arm.best}
    panel = next(panel for panel in (draw(large) for draw in PANELS) if panel.key == "tradeoff")
    drawn = {score for trace in panel.figures[0].data for score in trace.y}
    assert {best["lora"], best["full"]} <= drawn


def test_table_of_a_large_sweep_has_the_best_of_each_arm_and_says_so(
    large: SweepData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "MAX_TABLE_ROWS", 30)
    rows = select_rows(large)
    lora = [trial for trial in rows if trial.arm == "lora"]
    complete = [trial for trial in large.trials if trial.arm == "lora" and trial.is_complete]
    scores = sorted(trial.value or 9.0 for trial in complete)
    assert {arm.name for arm in large.arms} == {trial.arm for trial in rows}
    assert sorted(trial.value or 9.0 for trial in lora) == scores[: len(lora)]
    assert [trial.number for trial in lora] == sorted(trial.number for trial in lora)
    html = render_page(summarize(large.folder), [])
    assert f"The table has {len(rows)} of {len(large.trials)} trials, the best" in html
    assert html.count('<th scope="row" data-key=') == len(rows)
    assert "Best trials" in html


def test_table_of_a_sweep_that_is_not_large_has_all(large: SweepData) -> None:
    assert select_rows(large) == list(large.trials)
    assert "The table has" not in render_page(summarize(large.folder), [])


def test_reasons_are_listed_up_to_a_number(large: SweepData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MAX_REASONS", 3)
    html = render_page(summarize(large.folder), [])
    pruned = sum(trial.state == "pruned" for trial in large.trials)
    assert f"<summary>{pruned} pruned, of which the first 3 are listed</summary>" in html
    assert html.count("Worse than half of the trials") == 3
