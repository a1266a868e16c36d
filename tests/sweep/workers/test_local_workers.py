"""Several worker processes on this machine: the same sweep as with one, whatever happens to them."""

import multiprocessing
import os
import pickle
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lorasweep.errors import OutOfMemory, WorkerError
from lorasweep.record import read_sweep
from lorasweep.sweep.controller import controller as controller_file
from lorasweep.sweep.controller.lifecycle import reopen_sweep
from lorasweep.sweep.cost import count_workers
from lorasweep.sweep.workers import local_workers, worker
from lorasweep.sweep.workers.local_workers import limit_threads, number_workers


@pytest.fixture(autouse=True)
def no_child_outlives_the_test():
    yield
    assert multiprocessing.active_children() == []


@pytest.fixture
def packed(content):
    """Three arms, of which the trials of `lora` train in packs of two, with a confirm stage."""
    content["settings"] |= {"worker.pack_size": 2, "confirm.seeds": 3, "sampler": "qmc"}
    return content


def table_of(path):
    record = read_sweep(path)
    rows = [(row.arm, row.number, row.params, row.state, row.search_score) for row in record.trials]
    rows += [(row.subject, row.seed, row.state, row.test_scores) for row in record.confirm]
    return record.status, rows, record.settings, record.looks_done


@pytest.fixture
def alone(begin, work, packed, runs):
    """What one worker in this process makes of the sweep."""
    folder = begin(packed, "worker.num=1", folder="alone")
    assert work(folder)
    return table_of(folder.path)


@pytest.mark.parametrize("num", [2, 3])
def test_several_workers_end_with_the_sweep_of_one(begin, work, packed, runs, alone, num):
    folder = begin(packed, f"worker.num={num}")
    assert work(folder)
    assert table_of(folder.path) == alone
    record = read_sweep(folder.path)
    assert (record.workers, record.threads) == (num, 1)
    assert not any("died" in said for said in record.warnings)
    assert not (folder.path / "packs").exists()


@pytest.mark.parametrize(
    ("die", "how"), [(lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"), (lambda: sys.exit(0), "exit code 0")]
)
def test_the_pack_of_a_worker_that_ended_early_goes_on_in_another(begin, work, packed, runs, alone, tmp_path, die, how):
    score, mark = runs.score, tmp_path / "died"

    def die_once(config, step):
        if step == 6 and config.method.kind == "lora":
            try:
                mark.touch(exist_ok=False)
            except FileExistsError:
                return score(config, step)
            die()
        return score(config, step)

    runs.score = die_once
    folder = begin(packed, "worker.num=2")
    assert work(folder)
    assert mark.exists()
    assert table_of(folder.path) == alone
    warnings = read_sweep(folder.path).warnings
    assert [said for said in warnings if how in said], warnings


def test_workers_that_always_die_end_the_sweep_with_a_sentence(begin, work, packed, runs, monkeypatch):
    monkeypatch.setattr(controller_file, "MAX_DEATHS_IN_A_ROW", 3)
    runs.score = lambda config, step: os._exit(9)
    with pytest.raises(WorkerError, match="3 workers in a row died"):
        work(begin(packed, "worker.num=2"))


def test_a_pack_that_does_not_fit_goes_on_in_smaller_ones(begin, work, packed, runs, alone):
    runs.errors = [OutOfMemory("no memory")]  # of each worker
    folder = begin(packed, "worker.num=2")
    assert work(folder)
    assert table_of(folder.path) == alone
    assert any("OutOfMemory" in said for said in read_sweep(folder.path).warnings)


class OwnError(Exception):
    """An error of a user, which can be pickled and not be read again."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def test_the_error_of_a_trial_reaches_the_record_whatever_its_class(begin, work, content, runs):
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(OwnError("a", "b")))

    def fail(config, step):
        raise OwnError("one", "two")

    runs.score = fail
    content["arms"] = {"full": content["arms"]["full"]}
    folder = begin(content, "worker.num=2", "sweep.max_failures=9", "arms.full.trials=2")
    work(folder)
    assert [row.state for row in read_sweep(folder.path).trials] == ["failed", "failed"]
    assert all("OwnError: one and two" in row.reason for row in read_sweep(folder.path).trials)


def test_a_fault_of_a_worker_itself_is_raised_here_with_its_traceback(begin, work, packed, runs, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(worker, "choose_slots", fail)
    with pytest.raises(ZeroDivisionError, match="a fault") as caught:
        work(begin(packed, "worker.num=2"))
    assert "in _choose_slots" in str(caught.value.__cause__)


def test_too_many_failures_end_all_workers(begin, work, content, runs):
    def fail(config, step):
        raise ValueError("a fault")

    runs.score = fail
    content["arms"] = {"lora": content["arms"]["lora"]}
    with pytest.raises(WorkerError, match=r"sweep\.max_failures"):
        work(begin(content, "worker.num=2", "sweep.max_failures=2"))


def test_a_stop_ends_all_workers_after_a_step_and_the_sweep_resumes(begin, work, packed, runs, alone, tmp_path):
    score, mark = runs.score, tmp_path / "trained"

    def note(config, step):
        mark.touch()
        return score(config, step)

    runs.score = note
    folder = begin(packed, "worker.num=2")
    assert not work(folder, stop_when=mark.exists)
    assert read_sweep(folder.path).status == "interrupted"
    assert work(reopen_sweep(folder.path))
    assert table_of(folder.path) == alone


class Inputs:
    """A base of a million weights in fp32."""

    base = SimpleNamespace(model=nn.Linear(1000, 1000, bias=False))
    precision = "fp32"

    def load(self, config):
        return self


@pytest.mark.parametrize(
    ("cores", "memory", "overrides", "num"),
    [
        (4, 2**40, [], 4),
        (1, 2**40, [], 1),
        (64, 2**40, [], 10),  # 1 + 3 + 6 trials
        (4, 2 * (local_workers.PROCESS_BYTES + 16 * 10**6) + 4 * 10**6, [], 2),  # `full`: 16 bytes a weight
        (4, 2**20, [], 1),
        (4, 2**40, ["worker.num=3"], 3),
    ],
)
def test_auto_starts_a_process_for_each_core_that_has_trials_and_memory(
    begin, packed, monkeypatch, cores, memory, overrides, num
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    monkeypatch.setattr(local_workers, "total_memory_bytes", lambda: memory)
    folder = begin(packed, *overrides)
    folder.close()
    numbered = number_workers(folder.definition, Inputs())
    assert count_workers(numbered) == num
    assert number_workers(numbered, Inputs()) is numbered  # a resumed sweep keeps its number


def test_the_cores_are_divided_among_the_workers(begin, packed, monkeypatch):
    now = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: now.__setitem__(0, number))
    folder = begin(packed, "worker.num=3")
    folder.close()
    with limit_threads(folder.definition):
        assert now == [2]
    assert now == [8]
