"""The figures' own arithmetic: ranges, bins, fronts, thinning, and what each panel shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorasweep.report.figures import PANELS, trials
from lorasweep.report.figures.confirmed import draw_confirmed, draw_confirmed_by_rank, find_reference
from lorasweep.report.figures.panel import choose_colours, find_score_range, pad_range, select_evenly
from lorasweep.report.figures.settings import draw_rank_alpha
from lorasweep.report.figures.trials import (
    draw_learning_curves,
    draw_score_by_lr,
    draw_score_by_rank,
    draw_tradeoff,
)
from lorasweep.report.sweep_data import load_sweep_data

from .conftest import BASE_SCORE, build_rank_arms, build_sweep, edit_json


def test_each_arm_keeps_one_colour_of_its_own(sweep: Path) -> None:
    def add_arms(raw: dict[str, Any]) -> None:
        raw["arms"] += [{**raw["arms"][1], "name": f"lora-{index}"} for index in range(20)]

    before = choose_colours(load_sweep_data(sweep))
    edit_json(sweep / "sweep.json", add_arms)
    after = choose_colours(load_sweep_data(sweep))
    assert before == {arm: after[arm] for arm in ("frozen", "lora", "full")}
    assert len({after[f"lora-{index}"] for index in range(8)}) == 8


def test_diverged_score_does_not_flatten_the_others_and_is_counted(sweep: Path) -> None:
    def diverge(raw: dict[str, Any]) -> None:
        next(trial for trial in raw["trials"] if trial["arm"] == "lora")["value"] = 90.0

    edit_json(sweep / "sweep.json", diverge)
    panel = draw_score_by_rank(load_sweep_data(sweep))
    assert panel.figures[0].layout.yaxis.range[1] < 2.3
    assert "1 value lies outside the range shown." in panel.text


def test_range_reaches_from_the_best_to_the_base(sweep: Path) -> None:
    data = load_sweep_data(sweep)
    low, high = find_score_range(data, [1.7, 1.8]) or (0, 0)
    assert low < 1.662 < BASE_SCORE < high
    assert find_score_range(data, []) is None


def test_range_without_a_base_leaves_out_the_worst_tenth(tmp_path: Path) -> None:
    data = load_sweep_data(build_sweep(tmp_path, frozen=0, full=0))
    low, high = find_score_range(data, [*(1.0 + index / 100 for index in range(20)), 50.0]) or (0, 0)
    assert low < 1.0
    assert high < 2
    assert find_score_range(data, [1.0]) == (0.95, 1.05)


def test_axes_of_confirmed_scores_end_where_the_metric_ends(confirmed: Path) -> None:
    def score_equally(raw: dict[str, Any]) -> None:
        raw["metric"] = "f1"
        for rerun in raw["confirm"]:
            rerun["value"] = 0.0 if rerun["arm"] == "frozen" else 1.0

    edit_json(confirmed / "sweep.json", score_equally)
    scores, differences = draw_confirmed(load_sweep_data(confirmed)).figures
    assert scores.layout.xaxis.range == (0.95, 1.0)
    assert differences.layout.xaxis.range == (-1.0, 1.0)
    assert pad_range(0.8, 0.8, limits=(0.0, 1.0)) == pytest.approx((0.76, 0.84))
    assert pad_range(0.0, 0.0, limits=(0.0, 1.0)) == (0.0, 1.0)


def test_rank_line_joins_the_best_of_each_rank(sweep: Path) -> None:
    data = load_sweep_data(sweep)
    line = draw_score_by_rank(data).figures[0].data[1]
    for rank, best in zip(line.x, line.y, strict=True):
        values = [t.value for t in data.arms[1].trials if t.is_complete and t.params["method.rank"] == rank and t.value]
        assert best == min(values)


def test_arms_of_one_rank_each_share_a_line(sweep: Path) -> None:
    def expand(raw: dict[str, Any]) -> None:
        lora = raw["arms"].pop(1)
        raw["arms"] += [
            {**lora, "name": f"r{rank}", "space": {"optim.lr": lora["space"]["optim.lr"]}} for rank in (1, 64)
        ]
        raw["trials"] = [t for t in raw["trials"] if t["params"].get("method.rank", 1) in (1, 64)]
        for trial in raw["trials"]:
            trial["arm"] = f"r{trial['params'].pop('method.rank')}" if trial["arm"] == "lora" else trial["arm"]

    edit_json(sweep / "sweep.json", expand)
    figure = draw_score_by_rank(load_sweep_data(sweep)).figures[0]
    # the rank of such an arm is in the runs' configurations, not among the swept keys
    assert [list(trace.x) for trace in figure.data if trace.mode == "lines"] == [[1, 64]]


def test_arms_that_differ_in_more_than_rank_have_lines_of_their_own(tmp_path: Path) -> None:
    sweep = build_rank_arms(tmp_path, {1: 1.8, 4: 1.7, 16: 1.69, 64: 1.68})

    def add_dora(raw: dict[str, Any]) -> None:
        for arm in raw["arms"][-2:]:
            arm["settings"]["method.variant"] = "dora"

    edit_json(sweep / "sweep.json", add_dora)
    figures = draw_score_by_rank(load_sweep_data(sweep)).figures
    lines = [{trace.name: list(trace.x) for trace in figure.data if "lines" in trace.mode} for figure in figures]
    groups = {"lora-rank1 to lora-rank4": [1, 4], "lora-rank16 to lora-rank64": [16, 64]}
    assert lines[0] == {f"{name}: best": ranks for name, ranks in groups.items()}
    assert lines[1] == {f"{name}, confirmed": ranks for name, ranks in groups.items()}


def test_heat_map_shows_the_best_of_each_cell_and_leaves_untried_ones_empty(sweep: Path) -> None:
    data = load_sweep_data(sweep)
    heat = draw_rank_alpha(data).figures[0].data[0]
    for alpha, row in zip(heat.y, heat.z, strict=True):
        for rank, shown in zip(heat.x, row, strict=True):
            cell = [
                t.value for t in data.arms[1].trials if t.is_complete and _at(t.params) == (rank, alpha) and t.value
            ]
            assert shown == (min(cell) if cell else None)


def test_the_map_is_over_the_multiplier_where_that_was_swept(sweep: Path) -> None:
    def divide(raw: dict[str, Any]) -> None:
        for arm in raw["arms"]:
            if "method.alpha" in arm["space"]:
                arm["space"]["method.alpha_over_rank"] = arm["space"].pop("method.alpha")

    edit_json(sweep / "sweep.json", divide)
    panel = draw_rank_alpha(load_sweep_data(sweep))
    assert panel.figures[0].layout.yaxis.title.text == "α/r"


def _at(params: dict[str, Any]) -> tuple[str, str]:
    return str(params["method.rank"]), str(params["method.alpha"])


def test_many_alphas_are_put_together_by_powers_of_two(tmp_path: Path) -> None:
    sweep = build_sweep(tmp_path, lora=40)

    def spread(raw: dict[str, Any]) -> None:
        for index, trial in enumerate(trial for trial in raw["trials"] if trial["arm"] == "lora"):
            trial["params"]["method.alpha"] = 8 * 1.05**index

    edit_json(sweep / "sweep.json", spread)
    panel = draw_rank_alpha(load_sweep_data(sweep))
    assert set(panel.figures[0].data[0].y) == {"8", "16", "32", "64"}
    assert "α are rounded to powers of two" in panel.text


def test_learning_rates_of_each_arm_are_dots_and_its_best_a_ring(sweep: Path) -> None:
    data = load_sweep_data(sweep)
    figure = draw_score_by_lr(data).figures[0]
    rings = [trace for trace in figure.data if trace.marker.symbol == "circle-open"]
    assert [ring.y[0] for ring in rings] == [data.best_score("lora"), data.best_score("full")]
    crosses = [trace for trace in figure.data if trace.marker.symbol == "x-thin-open"]
    assert [len(cross.x) for cross in crosses] == [6, 0]


def test_best_curves_are_bold_and_named(sweep: Path) -> None:
    figure = draw_learning_curves(load_sweep_data(sweep)).figures[0]
    assert [trace.name for trace in figure.data if trace.line.width == 3] == ["lora", "full"]


def test_tradeoff_leaves_out_what_trains_nothing(sweep: Path) -> None:
    names = {trace.name for figure in draw_tradeoff(load_sweep_data(sweep)).figures for trace in figure.data}
    assert names == {"best up to this cost", "lora", "full"}


def test_tradeoff_without_a_readable_run_is_a_sentence(sweep: Path) -> None:
    for path in sweep.glob("runs/*/run.json"):
        path.unlink()
    panel = draw_tradeoff(load_sweep_data(sweep))
    assert panel.figures == ()
    assert "readable record" in panel.text


def test_confirmed_means_have_their_intervals_as_bars(confirmed: Path) -> None:
    data = load_sweep_data(confirmed)
    panel = draw_confirmed(data)
    scores, differences = panel.figures
    lora = data.evidence.arm("lora")
    assert lora
    assert lora.interval
    mean = next(trace for trace in scores.data if trace.y[0] == "lora" and trace.error_x.array)
    assert mean.x[0] == lora.mean
    ends = (mean.x[0] - mean.error_x.arrayminus[0], mean.x[0] + mean.error_x.array[0])
    assert ends == pytest.approx(lora.interval)
    seeds = next(trace for trace in scores.data if trace.y[0] == "lora" and trace.marker.symbol == "circle-open")
    assert seeds.x == lora.values
    assert seeds.customdata[0] == "../runs/lora-confirm-0000/"
    (difference,) = differences.data
    pair = data.evidence.pair("lora", "full")
    assert pair
    assert difference.x[0] == pair.difference
    assert "worse than full" in difference.text[0]


def test_without_full_fine_tuning_arms_are_compared_with_the_best(confirmed: Path) -> None:
    def drop(raw: dict[str, Any]) -> None:
        raw["confirm"] = [row for row in raw["confirm"] if row["arm"] != "full"]

    edit_json(confirmed / "sweep.json", drop)
    data = load_sweep_data(confirmed)
    assert find_reference(data) == "lora"
    assert len(draw_confirmed(data).figures) == 1


def test_nothing_confirmed_is_a_sentence(sweep: Path) -> None:
    panel = draw_confirmed(load_sweep_data(sweep))
    assert panel.figures == ()
    assert "Nothing was confirmed" in panel.text


def test_confirmed_scores_by_rank_are_a_line_with_bars(tmp_path: Path) -> None:
    data = load_sweep_data(build_rank_arms(tmp_path, {1: 1.8, 4: 1.7, 16: 1.69}, examples=20))
    (figure,) = draw_confirmed_by_rank(data)
    line = next(trace for trace in figure.data if trace.mode == "lines+markers")
    assert list(line.x) == [1, 4, 16]
    assert list(line.y) == [data.evidence.arm(f"lora-rank{rank}").mean for rank in (1, 4, 16)]  # type: ignore[union-attr]
    assert len(draw_score_by_rank(data).figures) == 2


def test_a_large_group_keeps_evenly_spaced_items_with_the_first_and_a_small_one_stays_whole() -> None:
    groups = [[(score * 37) % 101 for score in range(101)], [7, 3]]
    (first, second), sentence = select_evenly(groups, key=lambda score: score, max_items=40)
    assert list(first) == list(range(0, 101, 6))
    assert second == [7, 3]
    assert "19 of 103 are drawn" in sentence
    assert select_evenly(groups, key=None, max_items=103) == (groups, "")


def test_every_figure_of_a_large_sweep_draws_the_best_and_says_that_it_skips_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = load_sweep_data(build_sweep(tmp_path, lora=60))
    before = {panel.key: panel for panel in (draw(large) for draw in PANELS)}
    monkeypatch.setattr("lorasweep.report.figures.panel.MAX_FIGURE_POINTS", 20)
    monkeypatch.setattr(trials, "MAX_CURVES", 20)
    drawn = {panel.key: panel for panel in (draw(large) for draw in PANELS)}
    for key in ("rank", "lr", "curves", "tradeoff"):
        assert "are drawn" in drawn[key].text, key
        assert len(drawn[key].figures[0].to_json()) < 0.7 * len(before[key].figures[0].to_json()), key
    scores = {score for trace in drawn["tradeoff"].figures[0].data for score in trace.y}
    assert {arm.best.value for arm in large.arms[1:] if arm.best} <= scores
