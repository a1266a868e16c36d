"""Answers are wrong as rarely as they say, at every look, and no verdict contradicts the interval beside it."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from lorasweep.config.data import ScoreMetric
from lorasweep.config.sweep import parse_margin
from lorasweep.record import Question
from lorasweep.report.evidence.estimates import ConfirmScores
from lorasweep.report.evidence.evidence import compare_settings
from lorasweep.report.evidence.questions import (
    NEGATIVE_VERDICTS,
    POSITIVE_VERDICTS,
    MarginScale,
    answer_questions,
    compute_look_level,
)

RANKS = ["r1", "r4", "r16"]
METRIC = ScoreMetric(name="loss", direction="minimize")
SHARE = MarginScale(margin=parse_margin("5%"), metric=METRIC, base="base", full="full")
UNIT = MarginScale(margin=parse_margin(0.05), metric=METRIC, base="base", full="full")
LOOKS = (3, 6, 10)


def plant(means, rng, *, num_seeds=LOOKS[-1], num_groups=20, seed_spread=0.05, group_spread=0.05, own_spread=0.1):
    """Returns scores with true means; `base` has no spread over seeds, as the frozen base of a language model."""
    common = rng.normal(0, 1, num_groups)
    values = {}
    for name, mean in means.items():
        of_groups = common + rng.normal(0, group_spread, num_groups)
        of_seeds = rng.normal(0, seed_spread if name != "base" else 0.0, num_seeds)
        own = rng.normal(0, own_spread if name != "base" else 0.0, (num_seeds, num_groups))
        values[name] = dict(enumerate(mean + of_seeds[:, None] + of_groups[None] + own))
    return ConfirmScores(
        values=values, shares=np.full(num_groups, 1 / num_groups), num_examples=num_groups, problems=()
    )


def cut(scores, num_seeds):
    """Returns the scores of the first seeds alone."""
    values = {name: dict(itertools.islice(runs.items(), num_seeds)) for name, runs in scores.values.items()}
    return ConfirmScores(values=values, shares=scores.shares, num_examples=scores.num_examples, problems=())


def ask(name, subjects, reference=None):
    return Question(name=name, arm="lora", key="method.rank", subjects=list(subjects), reference=reference)


AS_GOOD, SMALLEST = ask("as_good_as_full", RANKS, "full"), ask("smallest", RANKS)
PAIR = ask("as_good_as_full", ["r1"], "full")


def answer(question, scores, scale=SHARE, *, looks=LOOKS):
    answers = answer_questions([question], scores, scale, looks=looks)
    return {found.subject: found for found in answers}


def count_false(question, means, scale, false, *, repeats):
    """Returns the share of sweeps that give a false verdict at any look."""
    rng, wrong = np.random.default_rng(11), 0
    for _ in range(repeats):
        scores = plant(means, rng)
        verdicts = [answer(question, cut(scores, look), scale) for look in LOOKS]
        wrong += any(found[name].verdict in kinds for found in verdicts for name, kinds in false.items())
    return wrong / repeats


GOOD_ENOUGH = ("better", "equivalent", "not worse")
AT_MARGIN = {"base": 2.0, "full": 1.0, "r1": 1.05, "r4": 1.05, "r16": 1.05}
CASES = {
    "no difference": (ask("pair", ["r1"], "full"), AT_MARGIN | {"r1": 1.0}, {"r1": ("better", "worse")}, 0.05),
    "all values at the margin": (AS_GOOD, AT_MARGIN, dict.fromkeys(RANKS, GOOD_ENOUGH), 0.025),
    "the smallest at the margin": (
        SMALLEST,
        AT_MARGIN | {"r4": 1.0, "r16": 1.0},
        {"r1": ("sufficient", "insufficient"), "r4": ("insufficient",)},
        0.05,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_false_verdict_at_any_look_is_as_rare_as_the_level_says(case):
    question, means, false, level = CASES[case]
    # a margin of nearly nothing, so that `equivalent` is never the answer to a difference of zero
    margin = 1e-9 if case == "no difference" else 0.05
    scale = MarginScale(margin=parse_margin(margin), metric=METRIC, base="base", full="full")
    repeats = 300
    found = count_false(question, means, scale, false, repeats=repeats)
    assert found <= level + 3 * (level * (1 - level) / repeats) ** 0.5


def test_a_share_that_is_lower_by_the_margin_is_rarely_called_good_enough():
    repeats = 100  # few, because the interval of a share is slow
    found = count_false(PAIR, AT_MARGIN, SHARE, {"r1": GOOD_ENOUGH}, repeats=repeats)
    assert found <= 0.025 + 3 * (0.025 * 0.975 / repeats) ** 0.5


def draw_answers(question, scale, *, repeats=100):
    """Answers of many sweeps whose true values and spreads differ, smallest value first."""
    rng, found = np.random.default_rng(12), []
    for _ in range(repeats):
        means = {"base": 2.0, "full": 1.0} | {name: 1 + rng.normal(0, 0.06) for name in RANKS}
        spreads = {f"{name}_spread": 10 ** rng.uniform(-3.5, -1) for name in ("seed", "group", "own")}
        scores = plant(means, rng, num_seeds=3, num_groups=10, **spreads)
        found.append(list(answer(question, scores, scale).values()))
    return found


@pytest.mark.parametrize("question", [AS_GOOD, SMALLEST], ids=lambda question: question.name)
@pytest.mark.parametrize("scale", [SHARE, UNIT], ids=["share", "unit"])
def test_a_verdict_contradicts_neither_its_interval_nor_those_of_other_values(question, scale):
    seen = set()
    for answers in draw_answers(question, scale):
        verdicts = [found.verdict for found in answers]
        for place, verdict in enumerate(verdicts):
            # good enough only if all larger values are, worse only if all smaller ones are
            if verdict in POSITIVE_VERDICTS:
                assert set(verdicts[place:]) <= {*POSITIVE_VERDICTS}
            if verdict in NEGATIVE_VERDICTS:
                assert set(verdicts[: place + 1]) <= {*NEGATIVE_VERDICTS}
        for found in [found for found in answers if found.interval is not None]:
            low, high = found.interval
            assert low <= found.value <= high
            # as an advantage over the reference: lower scores are better here
            low, high = (low - 1, high - 1) if found.is_share else (-high, -low)
            expected = {
                "better": low > 0,
                "worse": high < 0,
                "equivalent": low > -0.05 and high < 0.05,
                "not worse": low > -0.05,
                "sufficient": low > -0.05,
                "insufficient": high < -0.05,
                "open": True,
            }
            assert expected[found.verdict], found
            seen.add(found.verdict)
    assert len(seen) >= 3


def test_a_refuted_value_is_shown_beside_the_value_that_refutes_it():
    """`r16` looks better, but is noisy; `r4` is certainly better."""
    steady, noisy = np.array([0.0, 0.001, -0.001]), np.array([0.0, 0.3, -0.3])
    columns = {"base": 2 + 0 * steady, "full": 1 + steady, "r1": 1.3 + steady, "r4": 1 - steady, "r16": 0.9 + noisy}
    values = {name: {seed: np.array([value]) for seed, value in enumerate(row)} for name, row in columns.items()}
    scores = ConfirmScores(values=values, shares=np.ones(1), num_examples=0, problems=())
    found = answer(SMALLEST, scores)["r1"]
    assert (found.verdict, found.reference) == ("insufficient", "r4")
    assert found.interval
    assert found.interval[1] < 0.95


def plant_open(*, seed_spread, group_spread):
    """Three seeds and ten groups whose means are exactly equal, with these spreads."""
    seeds, groups = np.array([-1.0, 0.0, 1.0]), np.linspace(-1.0, 1.0, 10)
    values = {name: dict.fromkeys(range(3), np.full(10, mean)) for name, mean in (("base", 2.0), ("full", 1.0))}
    values["r1"] = {seed: 1 + seed_spread * seeds[seed] + group_spread * groups for seed in range(3)}
    return ConfirmScores(values=values, shares=np.full(10, 0.1), num_examples=10, problems=())


def test_more_seeds_are_planned_where_they_may_settle_it_and_not_where_test_examples_dominate():
    of_seeds = answer(PAIR, plant_open(seed_spread=0.03, group_spread=0.001), UNIT)["r1"]
    of_groups = answer(PAIR, plant_open(seed_spread=0.001, group_spread=0.3), UNIT)["r1"]
    assert (of_seeds.verdict, of_groups.verdict) == ("open", "open")
    assert (of_seeds.may_settle, of_groups.may_settle) == (True, False)
    assert (of_seeds.blocker, of_groups.blocker) == ("few seeds", "few examples")


@pytest.mark.parametrize(
    ("seed_spread", "group_spread", "blocker"), [(0.1, 0.001, "few seeds"), (0.001, 0.3, "few examples")]
)
def test_an_open_difference_that_no_question_states_names_its_largest_error(seed_spread, group_spread, blocker):
    scores = plant_open(seed_spread=seed_spread, group_spread=group_spread)
    (row,) = compare_settings("present", [("r1", "full")], scores, metric=METRIC, margin=0.05, level=0.025)
    assert (row.verdict, row.blocker) == ("open", blocker)


QUIET = {"seed_spread": 0.001, "group_spread": 0.001, "own_spread": 0.001}
WITHOUT_BASE, WITHOUT_FULL = replace(SHARE, base=None), replace(SHARE, full=None)
PAIR_OF_ARMS = ask("pair", ["r1"], "full")


@pytest.mark.parametrize(
    ("question", "means", "scale", "verdicts"),
    [
        (AS_GOOD, {"r1": 1.5, "r4": 1.0, "r16": 1.0}, SHARE, ("worse", "equivalent", "equivalent")),
        (SMALLEST, {"r1": 1.5, "r4": 1.0, "r16": 1.0}, SHARE, ("insufficient", "sufficient")),
        # a share of a gain that is not known decides nothing but the sign
        (PAIR_OF_ARMS, {"r1": 1.5}, WITHOUT_BASE, ("worse",)),
        (PAIR_OF_ARMS, {"r1": 1.5}, WITHOUT_FULL, ("worse",)),
        (SMALLEST, {"r1": 1.5, "r4": 1.5, "r16": 1.5}, WITHOUT_BASE, ("open", "open")),
        (SMALLEST, {"r1": 1.5, "r4": 1.5, "r16": 1.5}, WITHOUT_FULL, ("open", "open")),
        # a subject without scores is open, and blocks smaller ones alone
        (AS_GOOD, {"r1": 1.0, "r16": 1.0}, SHARE, ("open", "open", "equivalent")),
        # higher scores are better
        (PAIR, {"base": 0.0, "r1": 0.5}, replace(SHARE, metric=replace(METRIC, direction="maximize")), ("worse",)),
    ],
)
def test_clear_scores_have_their_verdicts_at_the_first_look(question, means, scale, verdicts):
    scores = plant({"base": 2.0, "full": 1.0} | means, np.random.default_rng(0), **QUIET)
    found = answer(question, cut(scores, LOOKS[0]), scale)
    assert tuple(one.verdict for one in found.values()) == verdicts
    assert all(one.is_share is (scale.base is not None and scale.full is not None) for one in found.values())
    assert all(one.is_settled or one.blocker for one in found.values())


POCOCK = [(2, 2.178), (3, 2.289), (5, 2.413)]
"""Numbers of equally spaced looks, and Pocock's constants for a two-sided level of 5 % (Pocock 1977, table 1)."""


@pytest.mark.parametrize(("num_looks", "boundary"), POCOCK)
def test_boundaries_of_equal_looks_are_pococks(num_looks, boundary):
    level = compute_look_level(tuple(range(2, 2 * num_looks + 1, 2)), level=0.025)
    assert norm.isf(level) == pytest.approx(boundary, abs=1e-3)  # the table has three decimals


@pytest.mark.parametrize("level", [0.025, 0.025 / 8])
def test_paths_without_a_difference_cross_the_boundary_with_the_level(level):
    looks, num_paths = (3, 6, 10), 200_000
    boundary = norm.isf(compute_look_level(looks, level=level))
    sums = np.random.default_rng(0).standard_normal((num_paths, looks[-1])).cumsum(axis=1)
    crossed = np.mean(np.any([sums[:, look - 1] > boundary * look**0.5 for look in looks], axis=0))
    assert crossed == pytest.approx(level, abs=4 * (level / num_paths) ** 0.5)  # 4 standard errors
