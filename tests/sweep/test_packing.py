"""Which trials train together: those that differ only in what a slot owns; and what happens when a pack breaks."""

from __future__ import annotations

from typing import Any

import lorasweep.sweep.driver as driver_file
import pytest

from lorasweep.errors import ConfigError, OutOfMemory
from lorasweep.record import RunRecord
from lorasweep.sweep import read_definition
from lorasweep.sweep.packing import plan_packing


def plan(write_file, content: Any, *overrides: str):
    return plan_packing(read_definition(write_file(content), overrides))


def test_lora_trials_share_packs_and_others_run_alone(write_file, content):
    plans = plan(write_file, content)
    assert plans["lora"].key is not None
    assert plans["full"].key is None
    assert "`method=full` has no slots" in plans["full"].reason
    assert plans["lora"].largest.method.rank == 4


@pytest.mark.parametrize("method", ["head", "bitfit", "intrinsic"])
def test_methods_that_change_the_base_itself_run_alone_and_say_why(write_file, content, method):
    content["arms"]["full"]["settings"]["method"] = method
    plans = plan(write_file, content)
    assert plans["full"].key is None
    assert plans["full"].reason == f"`method={method}` has no slots on a frozen base, so its trials run alone."


def test_arms_that_differ_in_what_a_slot_owns_share_a_pack(write_file, content):
    content["arms"]["other"] = {"settings": {"method": "lora", "method.alpha": 4, "schedule": "cosine"}, "trials": 1}
    content["arms"]["longer"] = {"settings": {"method": "lora", "trainer.max_steps": 16}, "trials": 1}
    plans = plan(write_file, content)
    assert plans["other"].key == plans["lora"].key
    assert plans["longer"].key not in (None, plans["lora"].key)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("method.variant", "dora", "`method.variant=dora` can't be packed"),
        ("method.init", "pissa", "`method.init=pissa` can't be packed"),
        ("trainer.max_steps", 9, "not a multiple of `trainer.eval_every_steps`"),
        ("optim.eps", 0.0, "`optim.eps` is 0"),
        ("trainer.devices", 2, "`trainer.devices` does not go with packs"),
    ],
)
def test_what_a_slot_cannot_own_runs_alone_and_says_why(write_file, content, key, value, reason):
    content["arms"]["lora"]["settings"][key] = value
    plans = plan(write_file, content)
    assert plans["lora"].key is None
    assert reason in plans["lora"].reason


def test_a_swept_setting_that_slots_share_runs_alone(write_file, content):
    content["arms"]["lora"]["space"]["trainer.batch_size"] = [2, 4]
    assert "`trainer.batch_size` is swept" in plan(write_file, content)["lora"].reason


def test_a_model_of_the_users_own_runs_alone(write_file, content):
    content["settings"] |= {"model": "own", "model.factory": "models:build"}
    assert "`model.factory` may mix the rows of a batch" in plan(write_file, content)["lora"].reason


def test_a_pack_larger_than_its_trials_is_refused(write_file, content):
    with pytest.raises(ConfigError, match=r"`worker.pack_size <= 6` must hold.*but got 7"):
        plan(write_file, content, "worker.pack_size=7")


def test_a_pack_asked_for_an_arm_without_slots_is_refused(write_file, content):
    with pytest.raises(ConfigError, match=r"`worker.pack_size` must be 1 or auto for arm `full`, but got 2"):
        plan(write_file, content, "arms.full.worker.pack_size=2")


class MadeUpPacks:
    """Stands in for `train_pack`: every job of a pack ends at once, and freed slots are refilled."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.sizes: list[int] = []

    def __call__(self, jobs, *, bench, supply, stop_requested) -> bool:
        self.sizes.append(len(jobs))
        if self.errors:
            raise self.errors.pop(0)
        waiting = list(jobs)
        while waiting:
            job = waiting.pop(0)
            assert not job.should_stop(2, job.config.optim.lr)
            record = RunRecord(status="complete", config={}, metric="bits_per_byte", direction="minimize")
            record.best = {"bits_per_byte": job.config.optim.lr}
            job.ended(record)
            refill = supply()
            if refill is not None:
                waiting.append(refill)
        return True


def packed_sweep(begin, work, content, monkeypatch, packs: MadeUpPacks, size: int):
    content["settings"]["worker.pack_size"] = size
    monkeypatch.setattr(driver_file, "train_pack", packs)
    folder = begin(content)
    assert work(folder)
    return folder.record


def test_a_packed_arm_has_exactly_its_trials(begin, work, content, runs, monkeypatch):
    packs = MadeUpPacks()
    record = packed_sweep(begin, work, content, monkeypatch, packs, 4)
    lora = [row for row in record.trials if row.arm == "lora"]
    assert [row.number for row in lora] == list(range(6))
    assert {row.state for row in lora} == {"complete"}
    assert packs.sizes == [4]
    assert {arm for arm, _ in runs.begun} == {"frozen", "full"}


def test_a_pack_out_of_memory_goes_on_in_smaller_ones_and_loses_no_trial(begin, work, content, runs, monkeypatch):
    packs = MadeUpPacks(OutOfMemory("no memory"))
    record = packed_sweep(begin, work, content, monkeypatch, packs, 4)
    assert packs.sizes == [4, 2]
    lora = [row for row in record.trials if row.arm == "lora"]
    assert [(row.number, row.state) for row in lora] == [(n, "complete") for n in range(6)]


def test_a_pack_that_breaks_runs_its_trials_alone(begin, work, content, runs, monkeypatch):
    packs = MadeUpPacks(KeyError("bug"))
    record = packed_sweep(begin, work, content, monkeypatch, packs, 3)
    assert packs.sizes == [3]
    assert sorted(trial for arm, trial in runs.begun if arm == "lora") == list(range(6))
    assert {row.state for row in record.trials} == {"complete"}


def test_a_measured_size_is_used(begin, work, content, runs, monkeypatch):
    monkeypatch.setattr(driver_file, "measure_pack_sizes", lambda config, *, bench, most: [most])
    monkeypatch.setattr(driver_file, "choose_pack_size", lambda measured: measured[0] // 2)
    packs = MadeUpPacks()
    packed_sweep(begin, work, content, monkeypatch, packs, "auto")
    assert packs.sizes == [3]
