"""Files of single examples are used where they fit, named where they don't, and drawn from the same way each time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lorasweep.report.evidence.scores import (
    ExampleScores,
    build_scores,
    draw_deviations,
    read_examples,
    stretch_factor,
)


def examples(
    scores: list[float], weights: list[float] | None = None, *, first: int = 0, groups: str | None = None
) -> ExampleScores:
    rows = tuple(str(first + row) for row in range(len(scores)))
    return ExampleScores(
        rows=rows,
        scores=np.array(scores),
        weights=np.array(weights or [1.0] * len(scores)),
        groups=rows if groups is None else tuple(groups),
    )


def test_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "test_scores.csv"
    path.write_text('row,score,weight,group\n0,1.5,2,"a, b"\n7,0.5,6,c\n')
    found = read_examples(path)
    assert found.rows == ("0", "7")
    assert found.groups == ("a, b", "c")
    assert found.mean == pytest.approx((1.5 * 2 + 0.5 * 6) / 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("row,value\n0,1\n", "columns must be"),
        ("row,score,weight\n0,1,1\n", "`group`"),
        ("row,score,weight,group\n0,<b>,1,0\n", "could not convert string to float"),
    ],
)
def test_file_that_is_not_as_it_must_be_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "test_scores.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_examples(path)


def test_draws_have_the_spread_of_a_weighted_mean() -> None:
    rng = np.random.default_rng(1)
    scores, weights = rng.normal(0, 1, 200), rng.uniform(1, 3, 200)
    found = examples(list(scores), list(weights))
    deviations = draw_deviations({("a", 0): found}, draws=4000)["a", 0]
    residuals = weights * (scores - found.mean) / weights.sum()
    # the delta method's standard error of a ratio; 4,000 draws know it to about 1 %
    assert deviations.std() == pytest.approx(np.sqrt((residuals**2).sum()), rel=0.05)
    assert abs(deviations.mean()) < 0.1 * deviations.std()


def test_draws_are_the_same_for_every_run_and_every_time() -> None:
    same = examples([1.0, 2.0, 4.0])
    found = draw_deviations({("a", 0): same, ("b", 0): same}, draws=50)
    assert (found["a", 0] == found["b", 0]).all()
    assert (found["a", 0] == draw_deviations({("a", 0): same}, draws=50)["a", 0]).all()


def test_many_examples_get_fewer_draws() -> None:
    many = examples([0.0] * 60_000)
    assert len(draw_deviations({("a", 0): many}, draws=4000)["a", 0]) == 833


def test_of_perplexity_the_draws_are_those_of_exp_of_the_loss() -> None:
    losses = examples([1.0, 1.5, 2.0, 0.5])
    scores = build_scores({("a", 0): np.exp(1.25)}, {("a", 0): losses}, is_perplexity=True, draws=100)
    plain = draw_deviations({("a", 0): losses}, draws=100)["a", 0]
    assert scores.problems == ()
    assert scores.deviations["a", 0] == pytest.approx(np.exp(1.25 + plain) - np.exp(1.25))


def test_draws_of_groups_have_the_spread_of_a_mean_of_groups() -> None:
    rng = np.random.default_rng(2)
    sizes = rng.integers(2, 9, 100)
    groups = np.repeat(np.arange(100), sizes)
    scores = rng.normal(0, 1, 100)[groups] + rng.normal(0, 0.1, len(groups))
    rows = tuple(map(str, range(len(scores))))
    found = ExampleScores(rows=rows, scores=scores, weights=np.ones(len(scores)), groups=tuple(map(str, groups)))
    deviations = draw_deviations({("a", 0): found}, draws=4000)["a", 0]
    # the delta method's standard error of a ratio, from sums over groups
    residuals = np.bincount(groups, weights=scores - found.mean) / len(scores)
    assert deviations.std() == pytest.approx(np.sqrt((residuals**2).sum()) * stretch_factor(100), rel=0.05)
    single = draw_deviations({("a", 0): replace(found, groups=rows)}, draws=4000)["a", 0]
    assert deviations.std() > 1.5 * single.std()


def test_few_groups_stretch_the_draws_to_the_interval_of_t() -> None:
    rng = np.random.default_rng(3)
    means = rng.normal(0, 1, 10)
    found = examples(list(np.repeat(means, 2)), groups="aabbccddeeffgghhiijj")
    deviations = draw_deviations({("a", 0): found}, draws=4000)["a", 0]
    half_width = (np.quantile(deviations, 0.975) - np.quantile(deviations, 0.025)) / 2
    expected = stats.t(9).ppf(0.975) * means.std(ddof=1) / np.sqrt(10)
    # means of 10 are only about normal, and 4,000 draws know a quantile to about 2 %
    assert half_width == pytest.approx(expected, rel=0.1)


def test_examples_of_one_group_are_taken_as_independent_and_the_report_says_so() -> None:
    one = {("a", 0): examples([1.0, 2.0, 4.0], groups="xxx")}
    scores = build_scores({("a", 0): 7 / 3}, one, draws=50)
    assert scores.num_groups == 3
    assert (scores.deviations["a", 0] == draw_deviations({("a", 0): examples([1.0, 2.0, 4.0])}, draws=50)["a", 0]).all()
    (problem,) = scores.problems
    assert "one group" in problem


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        (examples([1.0]), "there are fewer than two"),
        (examples([1.0, 2.0, 3.0]), "their mean is 2"),
        (examples([1.0, float("nan")]), "their mean is nan"),
        (examples([1.0, 2.0], first=1), "not the examples of the first run"),
        (examples([1.0, 2.0], [2.0, 2.0]), "not the examples of the first run"),
        (examples([1.0, 2.0], groups="xy"), "not the examples of the first run"),
    ],
)
def test_examples_that_do_not_fit_are_named_and_left_out(second: ExampleScores, sentence: str) -> None:
    values = {("a", 0): 1.5, ("b", 0): 1.5}
    scores = build_scores(values, {("a", 0): examples([1.0, 2.0]), ("b", 0): second}, draws=10)
    assert set(scores.deviations) == {("a", 0)}
    (problem,) = scores.problems
    assert "`b`, seed 0" in problem
    assert sentence in problem


@pytest.mark.parametrize("weight", ["-1", "nan", "inf", "0", ""])
def test_a_file_with_a_weight_that_no_run_writes_is_refused(tmp_path: Path, weight: str) -> None:
    (tmp_path / "a.csv").write_text(f"row,score,weight,group\n0,1.5,{weight},a\n1,2,{weight},b\n")
    with pytest.raises(ValueError, match=r"weights must be finite|could not convert"):
        read_examples(tmp_path / "a.csv")


def test_a_run_without_a_score_has_no_examples() -> None:
    scores = build_scores({}, {("a", 0): examples([1.0, 2.0])}, draws=10)
    assert (scores.deviations, scores.num_examples, scores.num_groups, scores.values) == ({}, 0, 0, {})
