"""Trials that train in packs: none is lost when a pack breaks, and a killed pack resumes as it was."""

import itertools
import json
from collections import Counter

import pytest
from tests.sweep.conftest import Killed

from lorasweep.errors import Diverged, OutOfMemory
from lorasweep.record import read_sweep
from lorasweep.sweep.controller.arm_trials import ArmTrials
from lorasweep.sweep.controller.lifecycle import reopen_sweep


@pytest.fixture
def packed(content):
    """Three arms, of which the trials of `lora` train in packs of four."""
    content["settings"] |= {"worker.pack_size": 4, "sampler": "qmc"}
    return content


@pytest.fixture
def lora_only(packed):
    packed["arms"] = {"lora": packed["arms"]["lora"]}
    return packed


def lora_rows(folder):
    return [row for row in read_sweep(folder.path).trials if row.arm == "lora"]


@pytest.mark.parametrize(
    ("errors", "sizes"),
    [
        ([OutOfMemory("no memory"), OutOfMemory("no memory")], [3, 2, 1, 1, 1, 1, 1, 1]),
        ([KeyError("bug")], [3, 1, 1, 1, 3]),
    ],
)
def test_a_pack_that_breaks_goes_on_in_smaller_ones_and_loses_no_trial(begin, work, packed, runs, errors, sizes):
    runs.errors = list(errors)
    folder = begin(packed)
    assert work(folder)
    assert runs.sizes == sizes
    assert [(row.number, row.state) for row in lora_rows(folder)] == [(n, "complete") for n in range(6)]
    warnings = read_sweep(folder.path).warnings
    is_bug = isinstance(errors[0], KeyError)
    assert any("KeyError" in said and "packs of at most 1 slots" in said for said in warnings) is is_bug
    assert not (folder.path / "packs").exists()


@pytest.mark.parametrize("killed_at", [1, 3, 5, None])
def test_a_pack_that_breaks_goes_on_at_its_last_evaluation_wherever_it_is_killed(
    begin, work, lora_only, runs, monkeypatch, killed_at
):
    def score(config, step):
        if step == 6 and not runs.raised:
            raise ZeroDivisionError("a bug")
        return config.optim.lr

    def move(*arguments):
        if next(moments) == killed_at:
            raise Killed
        true_move(*arguments)

    moments, true_move, runs.score = itertools.count(1), ArmTrials.move, score
    monkeypatch.setattr(ArmTrials, "move", move)
    folder = begin(lora_only, "worker.pack_size=6")
    if killed_at:
        with pytest.raises(Killed):
            work(folder)
        folder = reopen_sweep(folder.path)
    assert work(folder)
    assert [row.state for row in lora_rows(folder)] == ["complete"] * 6
    assert runs.sizes[0] == 6
    rest = [1] * 6 if killed_at is None else [1] * (killed_at - 1) + [7 - killed_at]
    assert sorted(runs.sizes[1:]) == rest
    counts = Counter(runs.trained)
    assert {step for _, step in counts} == {2, 4, 6, 8}
    assert {step for (_, step), count in counts.items() if count > 1} <= {6}


def test_a_trial_that_does_not_fit_alone_either_is_infeasible(begin, work, lora_only, runs):
    def score(config, step):
        if config.method.rank == 4:
            raise OutOfMemory("no memory")
        return config.optim.lr

    runs.score = score
    folder = begin(lora_only, "sweep.max_failures=100")
    assert work(folder)
    assert {(row.params["method.rank"] == 4, row.state) for row in lora_rows(folder)} == {
        (True, "infeasible"),
        (False, "complete"),
    }


def test_the_other_trials_of_a_pack_go_on_after_one_was_stopped(begin, work, lora_only, runs):
    number_of = {}

    def score(config, step):
        return 2.0 if number_of.setdefault(config.optim.lr, len(number_of)) in (1, 4) else 0.5

    runs.score = score
    folder = begin(lora_only, constant_answer={"bits_per_byte": 1.0})
    assert work(folder)
    states = ["complete", "stopped", "complete", "complete", "stopped", "complete"]
    assert [row.state for row in lora_rows(folder)] == states
    assert dict(runs.trained) == {f"lora-{n:04d}": 4 if state == "stopped" else 8 for n, state in enumerate(states)}
    assert runs.sizes == [3, 3]


def test_a_trial_that_diverges_in_a_pack_fails_alone(begin, work, lora_only, runs):
    def score(config, step):
        if config.method.rank == 4 and step == 4:
            raise Diverged("the training loss became NaN")
        return config.optim.lr

    runs.score = score
    folder = begin(lora_only, "sweep.max_failures=100")
    assert work(folder)
    assert runs.sizes == [3, 3]
    states = {(row.params["method.rank"], row.state) for row in lora_rows(folder)}
    assert (4, "failed") in states <= {(1, "complete"), (2, "complete"), (4, "failed")}


@pytest.mark.parametrize("stop_at", [2, 4, 7])
def test_a_stopped_pack_resumes_with_the_same_runs_at_the_same_step(begin, work, lora_only, runs, stop_at):
    folder = begin(lora_only)
    assert not work(folder, stop_at=stop_at)
    (checkpoint,) = (folder.path / "packs").iterdir()
    left, before = json.loads(checkpoint.read_text()), len(runs.trained)
    assert checkpoint.stem == runs.begun[-1][0]
    assert work(reopen_sweep(folder.path))
    assert runs.trained[before : before + 3] == [(name, step + 2) for name, step in left.items()]
    assert len(runs.trained) == len(set(runs.trained)) == 6 * 4
