"""The chance that is said of a step is the chance that it settles the question."""

from dataclasses import replace

import numpy as np
import pytest

from lorasweep.config.data import ScoreMetric
from lorasweep.config.sweep import parse_margin
from lorasweep.record import Question
from lorasweep.report.evidence.advice import compute_chance, draw_scores, find_step
from lorasweep.report.evidence.estimates import ConfirmScores
from lorasweep.report.evidence.evidence import Evidence
from lorasweep.report.evidence.questions import MarginScale, answer_questions

METRIC = ScoreMetric(name="loss", direction="minimize")
SCALE = MarginScale(margin=parse_margin(1.0), metric=METRIC, base=None, full="full")
QUESTIONS = [Question(name="as_good_as_full", arm="lora", key=None, subjects=["lora"], reference="full")]


def draw(truth, *, seeds, groups=40, rng, seeds_std=1.0, groups_std=0.0):
    """Scores of full (around 0) and of LoRA (around `truth`), whose difference varies over seeds and over groups."""
    of_groups = groups_std * rng.standard_normal(groups)
    rows = {seed: truth + seeds_std * rng.standard_normal() + of_groups for seed in range(seeds)}
    return {"full": {seed: np.zeros(groups) for seed in rows}, "lora": rows}


def build(values, *, search_errors=None, looks=(3,)):
    groups = len(next(iter(values["lora"].values())))
    scores = ConfirmScores(
        values=values,
        shares=np.full(groups, 1 / groups),
        num_examples=groups,
        problems=(),
        search_errors=search_errors or {},
    )
    return Evidence(
        questions=QUESTIONS,
        answers=answer_questions(QUESTIONS, scores, SCALE, looks=looks),
        scores=scores,
        scale=SCALE,
        looks=looks,
        looks_done=looks,
    )


def test_chances_are_calibrated_where_the_truth_is_drawn():
    """The prior of the truth is wide, as the draws assume; what is settled later is counted beside what was said."""
    rng, said, came = np.random.default_rng(1), [], []
    while len(said) < 40:
        values = draw(rng.uniform(-3, 3), seeds=15, groups=2, rng=rng)
        now = build({name: {seed: found[seed] for seed in range(5)} for name, found in values.items()}, looks=(5,))
        if now.answers[0].is_settled:
            continue
        said.append(compute_chance(QUESTIONS, now, 15))
        came.append(build(values, looks=(5, 15)).answers[0].is_settled)
    assert np.mean(came) == pytest.approx(np.mean(said), abs=3 * (0.25 / len(said)) ** 0.5)


def test_seeds_are_advised_only_where_affordable_seeds_help():
    few_seeds = build(draw(0.0, seeds=3, rng=np.random.default_rng(3)))
    assert find_step(QUESTIONS, few_seeds).seeds > 3
    assert find_step(QUESTIONS, few_seeds, max_cost=3.0) is None
    few_trials = build(draw(0.0, seeds=9, rng=np.random.default_rng(3)), search_errors={"lora": 9.0}, looks=(9,))
    assert not few_trials.answers[0].is_settled
    assert find_step(QUESTIONS, few_trials, max_cost=50) is None


def test_one_seed_has_no_chance_to_compute():
    assert find_step(QUESTIONS, build(draw(0.0, seeds=1, rng=np.random.default_rng(0)), looks=(1,))) is None


def test_known_scores_stay_and_further_seeds_are_drawn():
    present = build(draw(0.0, seeds=3, rng=np.random.default_rng(3)))
    kept = draw_scores(present, 5, rng=np.random.default_rng(0))
    assert all(np.array_equal(kept.values["lora"][seed], present.scores.values["lora"][seed]) for seed in range(3))
    assert len(kept.values["lora"]) == 5


def test_runs_without_a_common_seed_have_no_chance():
    zeros = np.zeros(4)
    assert find_step(QUESTIONS, build({"full": {1: zeros}, "lora": {2: zeros + 0.1}}, looks=(2,))) is None


def test_a_sweep_that_gave_up_before_its_last_look_gets_no_fewer_seeds_than_planned():
    """`confirm.seeds` below the planned number would be refused, or change nothing."""
    now = build(draw(0.0, seeds=3, rng=np.random.default_rng(3)))
    step = find_step(QUESTIONS, replace(now, looks=(3, 12)))
    assert step.seeds >= 12
