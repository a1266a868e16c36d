"""d90: which dimension it names, and what it says where there is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lorasweep.report.evidence import ArmEvidence, Evidence
from lorasweep.report.intrinsic_dimension import describe_d90, find_d90, kept_by_dimension
from lorasweep.report.summary import summarize
from lorasweep.report.sweep_data import SweepData, load_sweep_data

from .conftest import BASE_SCORE, build_sweep, edit_json


def sweep_of(folder: Path, shares: Mapping[int, float], *, maximize: bool = False, **missing: int) -> SweepData:
    """A sweep with an arm per dimension that keeps that share of full's gain, and a worse trial in each."""
    build_sweep(folder, **missing)
    full = (
        min(t.value for t in load_sweep_data(folder).trials if t.method == "full" and t.value) if not missing else 1.7
    )

    def add(raw: dict[str, Any]) -> None:
        for dim, share in shares.items():
            arm = {**raw["arms"][-1], "name": f"dim_{dim}", "method": "intrinsic", "settings": {"method.dim": dim}}
            raw["arms"].append(arm)
            for number, kept in enumerate((share - 0.3, share)):
                value = BASE_SCORE - kept * (BASE_SCORE - full)
                row = {**raw["trials"][-1], "arm": arm["name"], "number": number, "value": value, "state": "complete"}
                raw["trials"].append({**row, "params": {"method.dim": dim}})
        if maximize:
            raw["direction"] = "maximize"
            for trial in raw["trials"]:
                trial["value"] = None if trial["value"] is None else -trial["value"]

    edit_json(folder / "sweep.json", add)
    return load_sweep_data(folder)


def shares_of(data: SweepData) -> dict[int, float]:
    return {dim: kept.share for dim, kept in kept_by_dimension(data).items()}


def confirm(data: SweepData, shares: Mapping[int, float]) -> SweepData:
    """The same sweep, with those shares on test data."""
    arms = tuple(
        ArmEvidence(
            name=f"dim_{dim}",
            seeds=(1, 2),
            values=(1.8, 1.8),
            mean=1.8,
            std=0.0,
            interval=None,
            seed_interval=None,
            uses_examples=False,
            share_of_full_gain=share,
            share_interval=(share - 0.04, share + 0.05),
        )
        for dim, share in shares.items()
    )
    return dataclasses.replace(data, evidence=Evidence(arms=arms))


@pytest.mark.parametrize("maximize", [False, True])
def test_d90_is_the_smallest_dimension_that_keeps_90_percent_of_the_gain(tmp_path: Path, maximize: bool) -> None:
    data = sweep_of(tmp_path, {512: 0.93, 8: 0.4, 64: 0.89, 2048: 0.99}, maximize=maximize)
    assert shares_of(data) == pytest.approx({8: 0.4, 64: 0.89, 512: 0.93, 2048: 0.99})
    assert find_d90(data) == 512
    (sentence,) = describe_d90(data)
    assert sentence.startswith("d90 = 512")
    assert sentence.endswith("in the search; it keeps 93 %.")


def test_where_none_keeps_enough_the_sentence_says_so(tmp_path: Path) -> None:
    data = sweep_of(tmp_path, {8: 0.4, 64: 0.7})
    assert find_d90(data) is None
    (sentence,) = describe_d90(data)
    assert sentence.startswith("d90 is above 64")
    assert "64 keeps most, 70 %" in sentence


def test_smallest_tried_and_larger_ones_that_fall_short_are_said(tmp_path: Path) -> None:
    sentences = describe_d90(sweep_of(tmp_path, {8: 0.91, 64: 0.88, 512: 0.95}))
    assert "smaller ones may do" in sentences[1]
    assert "Of larger ones, 64 did not" in sentences[2]


def test_where_each_dimension_was_confirmed_test_data_counts(tmp_path: Path) -> None:
    data = confirm(sweep_of(tmp_path, {8: 0.92, 64: 0.95}), {8: 0.7, 64: 0.91})
    assert find_d90(data) == 64
    (sentence,) = describe_d90(data)
    assert "on test data; it keeps 91 % (95 % interval 87 % to 96 %)" in sentence


def test_where_one_dimension_was_not_confirmed_the_search_counts_for_all(tmp_path: Path) -> None:
    data = confirm(sweep_of(tmp_path, {8: 0.92, 64: 0.95}), {64: 0.91})
    assert find_d90(data) == 8
    assert "in the search" in describe_d90(data)[0]


@pytest.mark.parametrize("missing", ["full", "frozen"])
def test_without_an_end_of_the_comparison_nothing_is_said(tmp_path: Path, missing: str) -> None:
    assert describe_d90(sweep_of(tmp_path, {8: 0.9}, **{missing: 0})) == []


def test_trials_that_did_not_end_do_not_count(tmp_path: Path) -> None:
    data = sweep_of(tmp_path, {8: 0.95})

    def prune(raw: dict[str, Any]) -> None:
        raw["trials"][-1]["state"] = "pruned"

    edit_json(data.folder / "sweep.json", prune)
    assert shares_of(load_sweep_data(data.folder)) == pytest.approx({8: 0.65})


def test_summary_has_d90_and_its_sentence(tmp_path: Path) -> None:
    data = sweep_of(tmp_path, {8: 0.4, 64: 0.92})
    summary = summarize(data.folder)
    assert summary.as_json()["d90"] == 64
    assert describe_d90(data)[0] in summary.sentences


def test_summary_without_the_method_has_none(sweep: Path) -> None:
    summary = summarize(sweep)
    assert summary.as_json()["d90"] is None
    assert not any("d90" in sentence for sentence in summary.sentences)
