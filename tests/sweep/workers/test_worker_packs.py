"""Trials that train in packs: none is lost when a pack breaks, and a killed pack resumes as it was."""

import pytest

from lorasweep.errors import Diverged, OutOfMemory
from lorasweep.record import read_sweep
from lorasweep.sweep.controller.lifecycle import reopen_sweep
from lorasweep.training.checkpoint import read_pack


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


def test_a_pack_grows_again_as_soon_as_a_batch_of_an_adaptive_sampler_has_ended(begin, work, lora_only, runs, packs):
    lora_only["settings"] |= {"sampler": "tpe", "worker.pack_size": 8}
    lora_only["arms"]["lora"]["trials"] = 8
    folder = begin(lora_only)
    assert work(folder)
    assert packs.sizes == [4]  # one pack, which the second batch takes over
    assert packs.trained[16:18] == [("lora-0004", 2), ("lora-0005", 2)]
    assert len(packs.trained) == 8 * 4


@pytest.mark.parametrize(
    ("errors", "sizes"),
    [([OutOfMemory("no memory"), OutOfMemory("no memory")], [4, 2, 1]), ([KeyError("bug")], [4, 1])],
)
def test_a_pack_that_breaks_goes_on_in_smaller_ones_and_loses_no_trial(begin, work, packed, runs, packs, errors, sizes):
    packs.errors = list(errors)
    folder = begin(packed)
    assert work(folder)
    assert packs.sizes == sizes
    assert {arm for arm, _ in runs.begun} == {"frozen", "full"}  # a run that began in a pack goes on in packs only
    assert [(row.number, row.state) for row in lora_rows(folder)] == [(n, "complete") for n in range(6)]
    warnings = read_sweep(folder.path).warnings
    is_bug = isinstance(errors[0], KeyError)
    assert any("KeyError" in said and "packs of at most 1 slots" in said for said in warnings) is is_bug


def test_a_trial_that_breaks_a_pack_of_one_slot_trains_alone(begin, work, lora_only, runs, packs):
    packs.errors = [OutOfMemory("no memory")] * 3
    folder = begin(lora_only)
    assert work(folder)
    assert packs.sizes == [4, 2, 1]
    assert {arm for arm, _ in runs.begun} == {"lora"}
    assert [row.state for row in lora_rows(folder)] == ["complete"] * 6


def test_a_trial_of_a_pack_that_is_stopped_frees_its_slot_for_the_next(begin, work, lora_only, runs, packs):
    number_of = {}

    def score(config, step):
        return 2.0 if number_of.setdefault(config.optim.lr, len(number_of)) in (1, 4) else 0.5

    runs.score = score
    folder = begin(lora_only, constant_answer={"bits_per_byte": 1.0})
    assert work(folder)
    states = ["complete", "stopped", "complete", "complete", "stopped", "complete"]
    assert [row.state for row in lora_rows(folder)] == states
    trained = {f"lora-{n:04d}": 4 if state == "stopped" else 8 for n, state in enumerate(states)}
    assert dict(packs.trained) == trained
    assert packs.trained[8] == ("lora-0000", 6)
    assert ("lora-0004", 2) in packs.trained[8:12]  # in the first interval after trial 1 was stopped


def test_a_trial_that_diverges_in_a_pack_fails_alone(begin, work, packed, runs, packs):
    def score(config, step):
        if config.method.rank == 4 and config.method.name == "lora" and step == 4:
            raise Diverged("the training loss became NaN")
        return config.optim.lr

    runs.score = score
    folder = begin(packed, "sweep.max_failures=100")
    assert work(folder)
    assert len(packs.sizes) == 1
    states = {(row.params["method.rank"], row.state) for row in lora_rows(folder)}
    assert (4, "failed") in states <= {(1, "complete"), (2, "complete"), (4, "failed")}


@pytest.mark.parametrize("stop_at", [7])  # after slots were refilled
def test_a_stopped_pack_resumes_with_the_same_runs_in_the_same_slots(begin, work, lora_only, runs, packs, stop_at):
    folder = begin(lora_only)
    assert not work(folder, stop_at=stop_at)
    left = {name: state["global_step"] for name, state in read_pack(folder.path / "pack.ckpt").runs.items()}
    before = len(packs.trained)
    assert work(reopen_sweep(folder.path))
    slots = [(name, step + 2) for name, step in left.items()]
    assert packs.trained[before : before + len(slots)] == slots
    assert packs.sizes == [4, len(left)]
    assert len(packs.trained) == len(set(packs.trained)) == 6 * 4
