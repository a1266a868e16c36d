"""Files of single examples are used where they fit, and named where they do not; groups add up to the run's score."""

import numpy as np
import pytest

from lorasweep.report.evidence.estimates import RunExampleScores, build_scores, read_examples


def score_of(scores, subject, seed):
    """The score of a run, from the means of its groups."""
    return float(scores.values[subject][seed] @ scores.shares)


def examples(scores, weights=None, *, first=0, groups=None):
    rows = tuple(str(first + row) for row in range(len(scores)))
    return RunExampleScores(
        rows=rows,
        scores=np.array(scores),
        weights=np.array(weights or [1.0] * len(scores)),
        groups=rows if groups is None else tuple(groups),
    )


@pytest.mark.parametrize("weight", ["-1", "nan", "inf", "0", ""])
def test_a_file_with_a_weight_that_no_run_writes_is_refused(tmp_path, weight):
    (tmp_path / "a.csv").write_text(f"row,score,weight,group\n0,1.5,{weight},a\n1,2,{weight},b\n")
    with pytest.raises(ValueError, match=r"weights must be finite|could not convert"):
        read_examples(tmp_path / "a.csv")


def test_the_means_of_groups_with_their_shares_are_the_score_of_the_run():
    rng = np.random.default_rng(1)
    scores, weights = rng.normal(0, 1, 50), rng.uniform(0, 3, 50)
    found = examples(list(scores), list(weights), groups="abcde" * 10)
    built = build_scores({("a", 0): found.mean}, {("a", 0): found})
    assert built.problems == ()
    assert built.num_groups == 5
    assert built.num_examples == 50
    assert built.shares.sum() == pytest.approx(1)  # rounding of five terms
    assert score_of(built, "a", 0) == pytest.approx(np.average(scores, weights=weights))
    for place in range(5):
        expected = np.average(scores[place::5], weights=weights[place::5])
        assert built.values["a"][0][place] == pytest.approx(expected)


def test_examples_of_one_group_are_taken_as_independent_and_the_report_says_so():
    built = build_scores({("a", 0): 7 / 3}, {("a", 0): examples([1.0, 2.0, 4.0], groups="xxx")})
    assert built.num_groups == 3
    (problem,) = built.problems
    assert "one group" in problem


@pytest.mark.parametrize(
    "second",
    [
        None,
        examples([1.0]),
        examples([1.0, 2.0, 3.0]),
        examples([1.0, float("nan")]),
        examples([1.0, 2.0], first=1),
        examples([1.0, 2.0], [2.0, 2.0]),
        examples([1.0, 2.0], groups="xy"),
    ],
)
def test_examples_that_do_not_fit_are_named_and_none_are_used(second):
    values = {("a", 0): 1.5, ("b", 0): 1.5}
    found = {("a", 0): examples([1.0, 2.0])} | ({} if second is None else {("b", 0): second})
    built = build_scores(values, found)
    assert built.num_groups == 0
    assert [score_of(built, name, 0) for name in "ab"] == [1.5, 1.5]
    (problem,) = built.problems
    assert "`b`, seed 0" in problem


def test_the_one_run_of_a_deterministic_subject_stands_beside_every_seed():
    values = {("base", 3): 2.0, ("a", 3): 1.0, ("a", 5): 1.1, ("b", 7): 1.2}
    built = build_scores(values, {}, deterministic=["base"])
    assert sorted(built.values["base"]) == [3, 5, 7]
    assert {score_of(built, "base", seed) for seed in (3, 5, 7)} == {2.0}
    assert sorted(build_scores(values, {}).values["base"]) == [3]
