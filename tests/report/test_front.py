"""The Pareto front in the report: which trials are on it, what is said about them, and where."""

from __future__ import annotations

import json
from pathlib import Path

from lorasweep.record import read_sweep, write_record
from lorasweep.report import render_terminal, write_report
from lorasweep.report.figures import draw_tradeoff
from lorasweep.report.front import Front, find_front
from lorasweep.report.sweep_data import load_sweep_data

from .conftest import FULL_PARAMS, add_second_objective, add_select_stage, confirm_winners
from .test_page import written


def front_of(sweep: Path) -> Front:
    front = find_front(load_sweep_data(sweep))
    assert front is not None
    return front


def test_a_sweep_with_one_objective_has_no_front(sweep: Path) -> None:
    assert find_front(load_sweep_data(sweep)) is None
    page = written(sweep)
    assert "front" not in page.ids
    assert json.loads((sweep / "report/summary.json").read_text())["front"] is None


def test_each_arm_and_all_arms_together_have_a_front(confirmed: Path) -> None:
    add_second_objective(confirmed)
    record = read_sweep(confirmed)
    complete = [row for row in record.trials if row.second_value and row.value is not None]
    trials = front_of(confirmed).trials

    def is_beaten(row: object, others: list) -> bool:
        return any(
            other.value <= row.value
            and other.second_value <= row.second_value
            and (other.value, other.second_value) != (row.value, row.second_value)
            for other in others
        )

    for arm in ("lora", "full"):
        mine = [row for row in complete if row.arm == arm]
        expected = {row.number for row in mine if not is_beaten(row, mine)}
        assert {one.trial for one in trials if one.arm == arm} == expected
        joint = {row.number for row in mine if not is_beaten(row, complete)}
        assert {one.trial for one in trials if one.arm == arm and one.is_on_joint_front} == joint
    assert [one.cost for one in trials] == sorted(one.cost for one in trials)
    assert {one.arm for one in trials} == {"lora", "full"}  # the frozen base costs nothing
    assert trials[-1].cost == trials[-1].trainable_params == FULL_PARAMS
    assert all(one.wall_s for one in trials)


def test_only_winners_have_test_scores_and_candidates_have_a_mean(confirmed: Path) -> None:
    add_second_objective(confirmed)
    add_select_stage(confirmed, arm="lora")
    data = load_sweep_data(confirmed)
    lora = [one for one in front_of(confirmed).trials if one.arm == "lora"]
    best = next(arm.best for arm in data.arms if arm.name == "lora")
    evidence = data.evidence.arm("lora")
    assert best is not None
    assert evidence is not None
    assert {one.trial: (one.test_mean, one.test_interval) for one in lora if one.test_mean is not None} == {
        best.number: (evidence.mean, evidence.interval)
    }
    assert len([one for one in lora if one.select_mean is not None]) == 2


def test_a_cost_that_is_equal_everywhere_leaves_one_trial(sweep: Path) -> None:
    record = read_sweep(sweep)
    record.second_objective, record.trials = "tokens_trained", [row for row in record.trials if row.arm == "full"]
    for row in record.trials:
        row.second_value = 307_200.0
    write_record(record, sweep)
    front = front_of(sweep)
    (only,) = front.trials
    assert only.score == min(row.value for row in record.trials if row.value is not None)
    assert "training tokens on validation data has one trial: 307 k" in front.sentence


def test_higher_scores_may_be_better(sweep: Path) -> None:
    add_second_objective(sweep)
    record = read_sweep(sweep)
    record.direction = "maximize"
    write_record(record, sweep)
    trials = [one for one in front_of(sweep).trials if one.is_on_joint_front]
    assert [one.score for one in trials] == sorted(one.score for one in trials)


def test_page_terminal_and_summary_show_the_front(confirmed: Path) -> None:
    add_second_objective(confirmed)
    confirm_winners(confirmed)
    front = front_of(confirmed)
    page = written(confirmed)
    assert "front" in page.ids
    for one in front.trials:
        assert f"{one.arm} {one.trial}" in page.text
        assert f"../{one.run}/" in page.links
    assert front.sentence.replace("`", "") in page.text
    summary = json.loads((confirmed / "report/summary.json").read_text())
    assert [one["trial"] for one in summary["front"]["trials"]] == [one.trial for one in front.trials]
    assert front.sentence in summary["sentences"]
    assert render_terminal(confirmed)


def test_the_first_figure_has_a_front_of_each_arm_and_of_all(sweep: Path) -> None:
    add_second_objective(sweep)
    first, *others = draw_tradeoff(load_sweep_data(sweep)).figures
    assert first.layout.xaxis.title.text.startswith("trainable parameters")
    lines = {trace.name: trace for trace in first.data if trace.mode == "lines"}
    assert lines.keys() == {"Pareto front", "lora", "full"}
    lora = sorted((one for one in front_of(sweep).trials if one.arm == "lora"), key=lambda one: one.cost)
    assert [*zip(lines["lora"].x, lines["lora"].y, strict=True)] == [(one.cost, one.score) for one in lora]
    assert all([trace.name for trace in figure.data if trace.mode == "lines"] == ["Pareto front"] for figure in others)


def test_tokens_are_drawn_if_they_are_the_objective(sweep: Path) -> None:
    add_second_objective(sweep)
    assert len(draw_tradeoff(load_sweep_data(sweep)).figures) == 3
    record = read_sweep(sweep)
    record.second_objective = "tokens_trained"
    write_record(record, sweep)
    figures = draw_tradeoff(load_sweep_data(sweep)).figures
    assert len(figures) == 4
    assert figures[0].layout.xaxis.title.text == "training tokens"
    write_report(sweep)
