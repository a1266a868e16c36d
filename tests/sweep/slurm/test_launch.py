"""As many workers are submitted as are missing, and an end of all of them is noticed."""

from __future__ import annotations

import itertools

import pytest

from lorasweep.errors import WorkerError
from lorasweep.sweep.slurm import (
    Queue,
    cancel_command,
    cancel_waiting,
    describe_end,
    has_running_workers,
    last_errors,
    read_arrays,
    submit_missing,
)
from lorasweep.sweep.slurm.launch import LOOK_EVERY_S


@pytest.fixture
def submit(fake_slurm, workers, tmp_path):
    def run(num):
        return submit_missing(workers(num=num), tmp_path, name="quickstart", command=len)

    return run


def test_all_workers_of_a_new_sweep_are_submitted_and_noted(submit, tmp_path):
    assert submit(3) == "77"
    assert [(array.job_id, array.num) for array in read_arrays(tmp_path)] == [("77", 3)]
    assert cancel_command(tmp_path) == "scancel 77"


def test_workers_that_run_or_wait_are_not_submitted_again(submit, fake_slurm, tmp_path):
    submit(3)
    fake_slurm.says("squeue", "77|0|RUNNING|None|n1\n77|2|PENDING|BeginTime|\n")
    fake_slurm.says("sbatch", "Submitted batch job 90\n")
    assert submit(3) == "90"
    assert [(array.job_id, array.num) for array in read_arrays(tmp_path)] == [("77", 3), ("90", 1)]
    assert cancel_command(tmp_path) == "scancel 77 90"
    fake_slurm.says("squeue", "77|0|RUNNING|None|n1\n77|2|PENDING|BeginTime|\n90|N/A|PENDING|Resources|\n")
    assert submit(3) is None


def test_the_queue_is_empty_only_by_two_looks_of_a_slurm_that_answers(submit, fake_slurm, tmp_path):
    submit(2)
    queue = Queue(tmp_path, clock=itertools.count(0, LOOK_EVERY_S).__next__)
    fake_slurm.says("squeue", "77|0|RUNNING|None|n1\n77|1|PENDING|Resources|\n")
    assert not queue.is_empty()
    assert queue.describe() == "1 running, 1 pending (Resources)"
    fake_slurm.says("squeue")
    assert not queue.is_empty()
    fake_slurm.says("squeue", error="Unable to contact slurm controller", code=1)
    assert not queue.is_empty()
    fake_slurm.says("squeue")
    assert queue.is_empty()
    assert queue.describe() == "none"


def test_slurm_is_not_asked_at_every_look(submit, fake_slurm, tmp_path):
    submit(1)
    before = len(fake_slurm.calls)
    queue = Queue(tmp_path, clock=itertools.count(0, LOOK_EVERY_S / 10).__next__)
    for _ in range(20):
        queue.is_empty()
    assert len(fake_slurm.calls) - before == 2


def test_what_workers_wrote_of_errors_is_found(submit, tmp_path):
    submit(1)
    assert last_errors(tmp_path) == []
    log = tmp_path / "workers" / "slurm" / "77_0_log.err"
    log.write_text("loading\nlorasweep: a run must fit\nsrun: error: n1: task 0: Exited with exit code 1\nbye\n")
    assert last_errors(tmp_path) == [
        "srun: error: n1: task 0: Exited with exit code 1",
        "lorasweep: a run must fit",
    ]


def test_a_change_in_the_queue_is_told_once(submit, fake_slurm, tmp_path):
    submit(1)
    told = []
    queue = Queue(tmp_path, changed=told.append, clock=itertools.count(0, LOOK_EVERY_S).__next__)
    for state in ("PENDING|Resources|", "PENDING|Resources|", "RUNNING|None|n1"):
        fake_slurm.says("squeue", f"77|N/A|{state}\n")
        queue.is_empty()
    assert told == ["1 pending (Resources)", "1 running"]


def test_a_sweep_whose_workers_only_wait_has_none_that_runs(submit, fake_slurm, tmp_path):
    assert not has_running_workers(tmp_path)
    submit(2)
    fake_slurm.says("squeue", "77|0|PENDING|Resources|\n")
    assert not has_running_workers(tmp_path)
    fake_slurm.says("squeue", "77|0|PENDING|Resources|\n77|1|RUNNING|None|n1\n")
    assert has_running_workers(tmp_path)


def test_the_end_of_all_workers_says_what_one_wrote_or_that_none_did(submit, tmp_path):
    submit(1)
    assert "None of them wrote there: does every machine see that folder?" in str(describe_end(tmp_path))
    (tmp_path / "workers" / "slurm" / "77_0_log.err").write_text("lorasweep: a run must fit.\n")
    said = str(describe_end(tmp_path))
    assert "none is left in Slurm's line. One wrote: lorasweep: a run must fit." in said
    assert f"type `lorasweep sweep --resume {tmp_path}`" in said


def test_nothing_is_submitted_again_while_slurm_does_not_say_what_it_has(submit, fake_slurm, tmp_path):
    submit(2)
    fake_slurm.says("squeue", error="Unable to contact slurm controller", code=1)
    with pytest.raises(WorkerError, match="Slurm must answer before workers are submitted again, but `squeue` does no"):
        submit(2)
    assert [array.num for array in read_arrays(tmp_path)] == [2]


def test_workers_that_wait_for_a_complete_sweep_are_cancelled_and_no_others(submit, fake_slurm, tmp_path):
    fake_slurm.says("scancel")
    cancel_waiting(tmp_path)
    assert fake_slurm.calls == []
    submit(2)
    cancel_waiting(tmp_path)
    assert fake_slurm.calls[-1] == "scancel --state=PENDING 77"
