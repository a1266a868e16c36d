"""A process counts the seconds of each phase, each token once, and its highest peak of memory."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

import lorasweep.training.telemetry as telemetry_file
from lorasweep.models.attention import AttentionChoice
from lorasweep.record import read_run
from lorasweep.training.memory import process_peak_bytes
from lorasweep.training.open_run import RunFolder
from lorasweep.training.run import train_alone
from lorasweep.training.telemetry import Telemetry

PHASES = ("training_s", "evaluating_s", "saving_s")


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when it is told to."""
    now = SimpleNamespace(s=100.0)
    clocks = dict.fromkeys(("monotonic", "process_time", "time"), lambda: now.s)
    monkeypatch.setattr(telemetry_file, "time", SimpleNamespace(**clocks))
    return now


@pytest.fixture
def fresh(inputs):
    """The base model and data of the other tests under a clock of its own."""
    return dataclasses.replace(inputs, telemetry=Telemetry())


def seconds(usage):
    return {name: usage[name] for name in PHASES if usage[name]}


def test_each_second_belongs_to_one_phase_or_to_none(clock):
    telemetry = Telemetry()
    clock.s += 1
    for seconds_spent, phase in ((2, "training"), (4, "evaluating"), (8, "training"), (16, None)):
        telemetry.switch(phase)
        clock.s += seconds_spent
    usage = telemetry.sample()
    assert seconds(usage) == {"training_s": 10, "evaluating_s": 4}
    assert usage["wall_s"] == usage["cpu_s"] == 31
    assert usage["first_step_at"] == 101


def test_the_tokens_of_a_run_that_goes_on_are_counted_once(make_config, fresh, tmp_path):
    asked = iter(range(100))
    stopped = train_alone(
        make_config(), RunFolder(path=tmp_path / "run"), inputs=fresh, stop_requested=lambda: next(asked) >= 3
    )
    assert stopped.status == "interrupted"
    before = fresh.telemetry.sample()["trained_tokens"]
    record = train_alone(make_config(), RunFolder(path=tmp_path / "run"), inputs=fresh, resume=True)
    assert 0 < before < record.tokens_trained
    usage = fresh.telemetry.sample()
    assert usage["trained_tokens"] == record.tokens_trained
    assert min(usage["training_s"], usage["evaluating_s"], usage["saving_s"]) > 0
    assert sum(seconds(usage).values()) <= usage["wall_s"]


def test_the_peak_stays_when_runs_measure_theirs_anew(make_config, fresh, tmp_path):
    block = np.ones(2**26)  # 512 MiB
    peak = process_peak_bytes()
    del block
    train_alone(make_config(), RunFolder(path=tmp_path / "run"), inputs=fresh)
    assert fresh.telemetry.sample()["peak_memory_bytes"] == pytest.approx(peak, rel=0.01)
    assert process_peak_bytes() < peak - 2**28


def test_the_attention_that_was_chosen_is_said_and_recorded(make_config, inputs, tmp_path):
    config, told = make_config({"method": "frozen"}), "Attention is eager: short."
    assert dataclasses.replace(inputs, attention=None).list_notes(config) == inputs.splits.notes
    chosen = dataclasses.replace(inputs, attention=AttentionChoice("eager", "short"))
    assert chosen.list_notes(config) == (*inputs.splits.notes, told)
    train_alone(config, RunFolder(path=tmp_path), inputs=chosen)
    assert told in read_run(tmp_path).notes
