"""What an arm keeps of full fine-tuning's gain, and at what share of its cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasweep.report.advice.costs import compare_costs
from lorasweep.report.sweep_data import load_sweep_data

from ..conftest import build_sweep, edit_json


def test_confirmed_share_has_an_interval_and_costs_are_those_of_the_reruns(confirmed: Path) -> None:
    data = load_sweep_data(confirmed)
    (kept,) = compare_costs(data)
    lora, full = ([rerun.record for rerun in arm.reruns if rerun.record] for arm in data.arms[1:])
    assert kept.is_confirmed
    assert kept.share_interval
    assert kept.share_interval[0] < kept.share_of_gain < kept.share_interval[1]
    assert kept.time_ratio == pytest.approx(sum(r.wall_s for r in lora) / sum(r.wall_s for r in full))
    sentence = kept.sentence
    assert sentence.startswith("`lora` keeps 9")
    for part in ("of its trainable parameters", "of its bytes on disk", "of its peak memory and ", "of its time."):
        assert part in sentence


def test_without_a_confirm_stage_the_share_is_said_to_be_of_one_seed(sweep: Path) -> None:
    (kept,) = compare_costs(load_sweep_data(sweep))
    assert (kept.is_confirmed, kept.share_interval) == (False, None)
    assert "(one seed, validation data) at" in kept.sentence


def test_memory_of_a_pack_is_said_to_be_that(sweep: Path) -> None:
    for path in sweep.glob("runs/lora-*/run.json"):
        edit_json(path, lambda raw: raw.update(pack={"slot": 0, "slots": 4}))
    (kept,) = compare_costs(load_sweep_data(sweep))
    assert "its memory is that of a pack of runs" in kept.sentence


def test_without_an_end_of_the_scale_nothing_is_kept(tmp_path: Path) -> None:
    assert compare_costs(load_sweep_data(build_sweep(tmp_path / "a", full=0))) == []
    assert compare_costs(load_sweep_data(build_sweep(tmp_path / "b", frozen=0))) == []


def test_unreadable_runs_leave_the_costs_out(sweep: Path) -> None:
    for path in sweep.glob("runs/*/run.json"):
        path.unlink()
    (kept,) = compare_costs(load_sweep_data(sweep))
    assert kept.time_ratio is None
    assert kept.sentence.endswith("(one seed, validation data).")
