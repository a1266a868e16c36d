"""Each second of a worker belongs to one phase, tokens are counted once, and looking costs nothing that matters."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lorasweep.training.telemetry as telemetry_file
from lorasweep.training import Benches, Job, RunPlace, Telemetry, score_run, train_pack, train_run

PHASES = ("loading_s", "training_s", "evaluating_s", "saving_s", "storage_s")


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when it is told to."""
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(telemetry_file, "time", SimpleNamespace(monotonic=lambda: now.s, process_time=lambda: now.s))
    return now


@pytest.fixture
def fresh(bench):
    """The base model and data of the other tests under a clock of its own."""
    return dataclasses.replace(bench, telemetry=Telemetry())


def seconds(usage):
    return {name: value for name in PHASES if (value := getattr(usage, name))}


def test_each_second_belongs_to_the_innermost_phase(clock):
    telemetry = Telemetry()
    clock.s += 1
    with telemetry.phase("training"):
        clock.s += 2
        with telemetry.phase("storage"):
            clock.s += 4
        clock.s += 8
        telemetry.switch("evaluating")
        clock.s += 16
        assert seconds(telemetry.sample()) == {"training_s": 10, "storage_s": 4, "evaluating_s": 16}
    clock.s += 32
    usage = telemetry.sample()
    assert seconds(usage) == {"training_s": 10, "storage_s": 4, "evaluating_s": 16}
    assert usage.wall_s == 63
    assert usage.idle_fraction == pytest.approx(37 / 63)


def test_a_phase_ends_with_an_error_too_whatever_it_was_in_then(clock):
    telemetry = Telemetry()

    def fail():
        with telemetry.phase("loading"):
            telemetry.switch("training")
            clock.s += 1
            raise KeyError

    with telemetry.phase("saving"):
        with pytest.raises(KeyError):
            fail()
        clock.s += 2
    assert seconds(telemetry.sample()) == {"training_s": 1, "saving_s": 2}


def test_tokens_per_second_do_not_sag_until_the_next_count(clock):
    telemetry = Telemetry()
    with telemetry.phase("training"):
        clock.s += 2
        telemetry.add_tokens(100)
        clock.s += 50
        assert telemetry.sample().tokens_per_s == 50


def test_the_use_of_processors_is_that_since_the_last_sample(clock, monkeypatch):
    monkeypatch.setattr(telemetry_file, "usable_cores", lambda: 4)
    telemetry = Telemetry()
    clock.s += 10
    assert (telemetry.sample().cpu_fraction, telemetry.sample().cpu_fraction) == (0.25, 0)


def test_a_new_worker_has_done_nothing(clock):
    usage = Telemetry().sample()
    assert (seconds(usage), usage.idle_fraction, usage.tokens_per_s) == ({}, 1, 0)


def test_the_numbers_are_json_and_say_which_gpu_they_are_of():
    gpus = (
        telemetry_file.GpuUse(use_fraction=None, memory_bytes=1, peak_memory_bytes=2),
        telemetry_file.GpuUse(use_fraction=0.5, memory_bytes=3, peak_memory_bytes=4),
    )
    numbers = dataclasses.replace(Telemetry().sample(), gpus=gpus).as_numbers()
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    assert {name: value for name, value in numbers.items() if name.startswith("gpu")} == {
        "gpu0_memory_bytes": 1,
        "gpu0_peak_memory_bytes": 2,
        "gpu1_use_fraction": 0.5,
        "gpu1_memory_bytes": 3,
        "gpu1_peak_memory_bytes": 4,
    }
    assert all(name.endswith(("_s", "_bytes", "_fraction", "_tokens")) for name in numbers)


def test_a_run_alone_is_training_and_evaluating_and_its_tokens_are_counted(make_config, fresh, tmp_path):
    record = train_run(make_config(), RunPlace(folder=tmp_path / "run"), bench=fresh)
    usage = fresh.telemetry.sample()
    assert usage.trained_tokens == record.tokens_trained > 0
    assert min(usage.training_s, usage.evaluating_s, usage.saving_s, usage.loading_s) > 0
    assert sum(seconds(usage).values()) <= usage.wall_s
    assert usage.tokens_per_s == pytest.approx(usage.trained_tokens / usage.training_s, rel=0.5)


def test_the_tokens_of_a_run_that_goes_on_are_counted_once(make_config, fresh, tmp_path):
    asked = iter(range(100))
    stopped = train_run(
        make_config(), RunPlace(folder=tmp_path / "run"), bench=fresh, stop_requested=lambda: next(asked) >= 2
    )
    assert stopped.status == "interrupted"
    before = fresh.telemetry.sample().trained_tokens
    record = train_run(make_config(), RunPlace(folder=tmp_path / "run"), bench=fresh, resume=True)
    assert 0 < before < record.tokens_trained
    assert fresh.telemetry.sample().trained_tokens == record.tokens_trained


def test_a_packs_tokens_are_those_of_all_its_slots(make_config, fresh, tmp_path):
    records = []
    jobs = [
        Job(
            config=make_config({"seed": seed}),
            place=RunPlace(folder=tmp_path / str(seed)),
            ended=records.append,
            failed=pytest.fail,
        )
        for seed in range(2)
    ]
    assert train_pack(
        jobs,
        bench=fresh,
        slots=len(jobs),
        supply=lambda: None,
        on_evaluation=lambda evaluated: [True] * len(evaluated),
        state_file=tmp_path / "pack.json",
    )
    usage = fresh.telemetry.sample()
    assert usage.trained_tokens == sum(record.tokens_trained for record in records) > 0
    assert min(usage.training_s, usage.evaluating_s, usage.loading_s) > 0


def test_scoring_on_test_data_is_evaluating(make_config, bench, fresh, tmp_path):
    train_run(make_config(), RunPlace(folder=tmp_path / "run"), bench=bench)
    score_run(tmp_path / "run", bench=fresh)
    usage = fresh.telemetry.sample()
    assert (usage.evaluating_s > 0, usage.training_s) == (True, 0)


def test_all_that_a_process_loads_is_on_one_clock(make_config):
    benches = Benches()
    bench = benches.of(make_config())
    assert bench.telemetry is benches.telemetry
    assert benches.telemetry.sample().loading_s > 0


def test_the_peak_stays_when_runs_measure_theirs_anew(make_config, fresh, tmp_path):
    with fresh.telemetry.phase("loading"):
        block = np.ones(2**26)  # 512 MiB
    del block
    train_run(make_config(), RunPlace(folder=tmp_path / "run"), bench=fresh)
    usage = fresh.telemetry.sample()
    assert usage.peak_memory_bytes > usage.memory_bytes + 2**28


@pytest.fixture
def two_gpus(monkeypatch):
    """A process with memory on the second of two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 300 * device)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200 * device)


def test_a_gpus_use_is_the_mean_of_the_samples(two_gpus, monkeypatch):
    shown = iter([100, 50])
    monkeypatch.setattr(telemetry_file, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: next(shown))
    telemetry = Telemetry()
    assert [gpu.use_fraction for gpu in (*telemetry.sample().gpus, *telemetry.sample().gpus)] == [1.0, 0.75]


def test_a_gpu_that_can_not_be_asked_has_memory_only(two_gpus, monkeypatch):
    def refuse(device):
        raise RuntimeError("no driver")

    monkeypatch.setattr(telemetry_file, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "utilization", refuse)
    assert Telemetry().sample().gpus == (
        telemetry_file.GpuUse(use_fraction=None, memory_bytes=200, peak_memory_bytes=300),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_has_memory_and_use():
    telemetry = Telemetry()
    kept = torch.ones(2**20, device="cuda")
    gpu = telemetry.sample().gpus[0]
    assert gpu.memory_bytes >= kept.nbytes
    assert gpu.peak_memory_bytes >= gpu.memory_bytes
