"""Fairness is judged by what ran: trials, complete trials, tokens and the widths of learning-rate ranges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorasweep.report.fairness import judge_fairness
from lorasweep.report.sweep_data import load_sweep_data

from .conftest import build_rank_sweep, build_sweep, edit_json

TOKENS_PER_STEP = 16 * 128
"""As the sweeps of these tests are made."""


@pytest.fixture
def even(tmp_path: Path) -> Path:
    """A sweep of 6 trials per arm, all complete, with learning rates over 1.5 and 1.7 decades."""
    sweep = build_sweep(tmp_path / "even", lora=6, full=6)
    for number in (2, 4, 5):
        change_run(sweep, number, state="complete", steps=150)
    return sweep


def change_run(sweep: Path, number: int, *, state: str, steps: int) -> None:
    def change_trial(raw: dict[str, Any]) -> None:
        (trial,) = (row for row in raw["trials"] if (row["arm"], row["number"]) == ("lora", number))
        trial.update(state=state, value=1.8)

    edit_json(sweep / "sweep.json", change_trial)
    tokens = steps * TOKENS_PER_STEP
    edit_json(
        sweep / f"runs/lora-{number:04d}/run.json", lambda raw: raw.update(steps_done=steps, tokens_trained=tokens)
    )


def judge(sweep: Path) -> SimpleNamespace:
    """Returns the judgement with each value as an attribute."""
    sentences, facts = judge_fairness(load_sweep_data(sweep))
    arms = [SimpleNamespace(**arm) for arm in facts["arms"]]
    return SimpleNamespace(sentences=sentences, is_fair=facts["is_fair"], arms=arms)


def test_equal_arms_are_fair_and_the_numbers_are_named(even: Path) -> None:
    fairness = judge(even)
    assert fairness.is_fair
    assert "is fair" in fairness.sentences[0]
    for part in ("2 arms", "6 trials", "6 complete trials", "1.84 M tokens", "1.5 to 1.7 decades", "1 to 2 searched"):
        assert part in fairness.sentences[1]


def ask_for_more(raw: dict[str, Any]) -> None:
    raw["arms"][1]["trials"] = 8


def narrow(raw: dict[str, Any]) -> None:
    raw["arms"][1]["space"]["optim.lr"] = {"low": 1e-3, "high": 2e-3, "log": True}


def search_no_rate(raw: dict[str, Any]) -> None:
    del raw["arms"][1]["space"]["optim.lr"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (ask_for_more, "`full` had 6 trials and `lora` 8"),
        (narrow, "`lora` had 0.3 decades of learning rates and `full` 1.7"),
        (search_no_rate, "`lora` had 0.0 decades of learning rates and `full` 1.7"),
    ],
)
def test_what_the_definition_gave_unequally_is_named(
    even: Path, change: Callable[[dict[str, Any]], None], fault: str
) -> None:
    edit_json(even / "sweep.json", change)
    fairness = judge(even)
    assert fairness.is_fair is False
    assert fault in fairness.sentences[0]


@pytest.mark.parametrize("state", ["pruned", "paused"])
def test_trials_that_stopped_early_count_with_the_tokens_that_they_trained(even: Path, state: str) -> None:
    for number in (2, 3, 4, 5):
        change_run(even, number, state=state, steps=50)
    fairness = judge(even)
    lora, full = fairness.arms
    assert (lora.trials_complete, full.trials_complete) == (2, 6)
    assert lora.tokens_trained == (2 * 150 + 4 * 50) * TOKENS_PER_STEP
    assert "`lora` had 2 complete trials and `full` 6" in fairness.sentences[0]
    assert "`lora` had 1.02 M tokens and `full` 1.84 M" in fairness.sentences[0]


def test_two_complete_trials_more_are_fair_and_three_are_not(even: Path) -> None:
    for number, expected in ((5, True), (4, True), (3, False)):
        change_run(even, number, state="pruned", steps=140)
        assert judge(even).is_fair is expected


def set_regret(sweep: Path, regret: float | None) -> None:
    edit_json(sweep / "sweep.json", lambda raw: [row.update(regret=regret) for row in raw["settings"]])


def test_a_search_that_left_more_than_a_margin_open_is_decided_by_luck(tmp_path: Path) -> None:
    sweep = build_rank_sweep(tmp_path, {4: 1.7})
    edit_json(sweep / "sweep.json", lambda raw: [arm.update(trials=5) for arm in raw["arms"]])
    margin = load_sweep_data(sweep).evidence.margin
    assert margin
    for factor in (0.5, 1.5):
        set_regret(sweep, factor * margin)
        fairness = judge(sweep)
        is_lucky = "luck of the search" in fairness.sentences[0]
        assert is_lucky is (factor > 1)
        assert [arm.regret for arm in fairness.arms] == pytest.approx([factor * margin] * 2)
    assert "1.5 margins for `lora-rank-4`" in fairness.sentences[0]


def test_rate_and_alpha_of_lora_are_one_dimension_and_without_a_model_their_trials_count(even: Path) -> None:
    lora, full = judge(even).arms
    assert (lora.dimensions, full.dimensions) == (2, 1)  # rank, and rate with α

    def sweep_dropout(raw: dict[str, Any]) -> None:
        raw["arms"][1]["space"] |= {"method.dropout": {"low": 0.0, "high": 0.5}}

    edit_json(even / "sweep.json", sweep_dropout)
    assert "`lora` had 2 trials for each searched dimension and `full` 6" in judge(even).sentences[0]
