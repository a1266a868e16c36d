"""What `summary.json` and the sentences say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorasweep.report.findings import ONE_SEED
from lorasweep.report.summary import Summary, summarize

from .conftest import BASE_SCORE, build_sweep, edit_json


def test_summary_has_the_promised_keys(sweep: Path) -> None:
    raw = summarize(sweep).as_json()
    assert {
        "sweep",
        "metric",
        "direction",
        "makespan_s",
        "tokens_trained",
        "steps_saved_by_pruning",
        "base",
        "arms",
    } <= set(raw)
    assert raw["base"]["score"] == BASE_SCORE
    for arm in raw["arms"]:
        assert {"name", "method", "trainable_params", "trainable_fraction", "adapter_bytes"} <= set(arm)
        assert {"peak_memory_bytes", "share_of_full_gain"} <= set(arm)
        assert {"score", "params", "run"} == set(arm["best"])
        assert {"complete", "paused", "pruned", "failed", "infeasible"} <= set(arm["trials"])


def shares_of(summary: Summary) -> list[float | None]:
    return [arm["share_of_full_gain"] for arm in summary.as_json()["arms"]]


def test_share_of_full_gain_is_nothing_at_the_base_and_one_at_full(sweep: Path) -> None:
    summary = summarize(sweep)
    frozen, lora, full = shares_of(summary)
    scores = [arm["best"]["score"] for arm in summary.as_json()["arms"]]
    assert (frozen, full) == (0, 1)
    assert lora == pytest.approx((BASE_SCORE - scores[1]) / (BASE_SCORE - scores[2]))


def test_share_of_full_gain_is_mirrored_when_maximizing(sweep: Path) -> None:
    def negate(raw: dict[str, Any]) -> None:
        raw["direction"] = "maximize"
        for trial in raw["trials"]:
            trial["value"] = None if trial["value"] is None else -trial["value"]

    before = shares_of(summarize(sweep))
    edit_json(sweep / "sweep.json", negate)
    assert shares_of(summarize(sweep)) == pytest.approx(before)


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ({"full": 0}, "without full fine-tuning"),
        ({"frozen": 0}, "without the frozen base"),
        ({"full": 0, "frozen": 0}, "no score of the frozen base or of full"),
    ],
)
def test_share_is_null_and_said_so_where_an_end_is_missing(
    tmp_path: Path, missing: dict[str, Any], sentence: str
) -> None:
    summary = summarize(build_sweep(tmp_path, **missing))
    assert set(shares_of(summary)) == {None}
    assert sentence in summary.sentences[1]


def test_share_is_null_where_full_fine_tuning_gained_nothing(sweep: Path) -> None:
    def spoil_full(raw: dict[str, Any]) -> None:
        for trial in raw["trials"]:
            trial["value"] = 2.5 if trial["arm"] == "full" else trial["value"]

    edit_json(sweep / "sweep.json", spoil_full)
    summary = summarize(sweep)
    assert set(shares_of(summary)) == {None}
    assert "it gained nothing" in summary.sentences[1]


def test_pruning_saves_what_pruned_trials_did_not_train(sweep: Path) -> None:
    summary = summarize(sweep)
    # 6 trials pruned at step 50 of 150; the failed one did not save its steps
    assert summary.data.steps_saved_by_pruning == 6 * 100
    assert any("pruning saved 600 of 3,600 planned steps (17 %)" in sentence for sentence in summary.sentences)


def test_paused_trials_count_like_pruned_ones_and_are_named(sweep: Path) -> None:
    def pause(raw: dict[str, Any]) -> None:
        for trial in raw["trials"]:
            trial["state"] = "paused" if trial["state"] == "pruned" else trial["state"]

    before = summarize(sweep)
    edit_json(sweep / "sweep.json", pause)
    summary = summarize(sweep)
    lora = summary.as_json()["arms"][1]
    assert (lora["trials"]["paused"], lora["trials"]["pruned"]) == (6, 0)
    assert lora["best"] == before.as_json()["arms"][1]["best"]
    assert summary.data.steps_saved_by_pruning == before.data.steps_saved_by_pruning
    assert any("pruning saved 600 of 3,600 planned steps so far (17 %)" in text for text in summary.sentences)


def test_arm_without_a_complete_trial_has_nulls_and_a_sentence(sweep: Path) -> None:
    def fail_lora(raw: dict[str, Any]) -> None:
        for trial in raw["trials"]:
            trial["state"] = "failed" if trial["arm"] == "lora" else trial["state"]

    edit_json(sweep / "sweep.json", fail_lora)
    summary = summarize(sweep)
    lora = summary.as_json()["arms"][1]
    assert lora["best"] == {"score": None, "params": None, "run": None}
    assert (lora["trainable_params"], lora["share_of_full_gain"]) == (None, None)
    assert lora["trials"]["failed"] == 18
    assert "`lora` has no complete trial." in summary.sentences


def test_sweep_in_which_all_failed_says_so(sweep: Path) -> None:
    edit_json(sweep / "sweep.json", lambda raw: [trial.update(state="failed") for trial in raw["trials"]])
    assert summarize(sweep).sentences[0].startswith("No trial is complete")


def test_one_seed_is_said_plainly(sweep: Path) -> None:
    assert ONE_SEED in summarize(sweep).sentences
    assert all(part in ONE_SEED for part in ("one seed", "validation", "not tested"))


def test_unfinished_sweep_says_how_many_trials_were_asked_for(sweep: Path) -> None:
    edit_json(sweep / "sweep.json", lambda raw: raw.update(status="interrupted"))
    assert "The sweep is interrupted: 25 trials were asked for." in summarize(sweep).sentences


@pytest.mark.parametrize(
    ("space", "value", "end"),
    [
        ([1, 4, 16], 16, "upper"),
        ([1, 4, 16], 4, None),
        ([2, 4, 16], 2, "lower"),
        ([1, 4, 16], 1, None),  # no rank is lower than 1
        ([8], 8, None),
        (["a", "b"], "b", None),
        ({"low": 1, "high": 64}, 63, "upper"),
        ({"low": 1e-4, "high": 1e-2, "log": True}, 1.1e-4, "lower"),
        ({"low": 1e-4, "high": 1e-2, "log": True}, 1e-3, None),
        ({"low": 1e-4, "high": 1e-2, "log": True}, -1.0, None),
        ({"low": 1e-4}, 1e-3, None),
        (None, 3, None),
    ],
)
def test_best_value_at_the_end_of_its_range_is_said(sweep: Path, space: object, value: object, end: str | None) -> None:
    def sweep_one_rank(raw: dict[str, Any]) -> None:
        raw["arms"][1]["space"] = {"method.rank": space}
        for trial in raw["trials"]:
            trial["params"] = {"method.rank": value} if trial["arm"] == "lora" else {}
        # a complete trial at another place, so that there is something to compare the end with
        raw["trials"][2].update(value=3.0, params={"method.rank": 8 if isinstance(value, int) else 2e-3})

    edit_json(sweep / "sweep.json", sweep_one_rank)
    said = [text for text in summarize(sweep).sentences if "end of its range" in text]
    assert [end for text in said if f"lies at the {end} end" in text] == ([end] if end else [])
    assert len(said) == (1 if end else 0)
