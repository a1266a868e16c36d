"""A worker that was stopped is put in line again where it is to go on, and only there."""

from __future__ import annotations

import functools
import os
import pickle
import signal
import time

import pytest

from lorasweep.sweep.slurm import SlurmTask, job_time_left_s
from lorasweep.sweep.slurm.task import own_job_id, parse_duration_s

RUNNING = "JobId=80 ArrayJobId=77 ArrayTaskId=3 JobState=RUNNING Reason=None\n"
OUT_OF_TIME = "JobId=80 ArrayJobId=77 ArrayTaskId=3 JobState=COMPLETING Reason=TimeLimit\n"
CANCELLED = "JobId=80 ArrayJobId=77 ArrayTaskId=3 JobState=COMPLETING Reason=None\n"


@pytest.fixture
def in_job(fake_slurm, monkeypatch, tmp_path):
    """A task of an array that trains so many bytes and ends with an exit code; returns what it called."""
    monkeypatch.setenv("SLURM_JOB_ID", "80")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    (tmp_path / "runs" / "lora-0000").mkdir(parents=True)
    heard = []

    def command(code, trained, words):
        heard.append(words)
        (tmp_path / "runs" / "lora-0000" / "steps.jsonl").write_bytes(bytes(trained))
        return code

    def run(*, code, state=RUNNING, trained=10, refused=""):
        body = f'case "$1" in requeue) printf \'%s\' "{refused}" >&2; exit {int(bool(refused))};; esac'
        fake_slurm.says("scontrol", state, body=body)
        task = SlurmTask(sweep=tmp_path, command=functools.partial(command, code, trained))
        try:
            ended = task()
        except SystemExit as exit:
            ended = exit.code
        assert ended == code
        assert heard == [["worker", str(tmp_path)]]
        return [call for call in fake_slurm.calls if "requeue" in call]

    before = signal.getsignal(signal.SIGUSR2)
    yield run
    signal.signal(signal.SIGUSR2, before)


@pytest.mark.parametrize("state", [RUNNING, OUT_OF_TIME])
def test_a_worker_that_was_told_of_the_end_of_its_time_is_put_in_line_again(in_job, state, capsys):
    assert in_job(code=130, state=state) == ["scontrol requeue 77_3"]
    assert "job 77_3 is in line again" in capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_worker_that_ended_by_itself_is_not_put_in_line_again(in_job, code):
    assert in_job(code=code) == []


@pytest.mark.parametrize("state", [CANCELLED, ""])
def test_a_cancelled_worker_is_not_put_in_line_again(in_job, state):
    assert in_job(code=130, state=state) == []


def test_a_signal_after_the_end_of_the_worker_does_not_end_the_process(in_job):
    in_job(code=0)
    os.kill(os.getpid(), signal.SIGUSR2)
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN


def test_a_rank_that_is_not_the_first_leaves_the_job_alone(in_job, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert in_job(code=130) == []


def test_outside_of_slurm_nothing_is_put_in_line(in_job, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name)
    assert in_job(code=130) == []


def test_a_worker_that_got_nowhere_is_not_put_in_line_for_ever(in_job, capsys):
    assert in_job(code=130, trained=0) == []
    assert "a worker must train a step before its time is over, but job 77_3 did not." in capsys.readouterr().err


def test_what_keeps_slurm_from_putting_a_job_in_line_is_said(in_job, capsys):
    assert in_job(code=130, refused="Requested operation is presently disabled") == ["scontrol requeue 77_3"]
    assert "but scontrol says: Requested operation is presently disabled. Then type" in capsys.readouterr().err


def test_a_task_is_pickled_by_the_name_of_its_command(tmp_path):
    task = pickle.loads(pickle.dumps(SlurmTask(sweep=tmp_path, command=os.path.basename)))
    assert task == SlurmTask(sweep=tmp_path, command=os.path.basename)


@pytest.mark.parametrize(
    ("environment", "job_id"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "12"}, "12"),
        ({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "0"}, "12_0"),
    ],
)
def test_a_task_of_an_array_is_named_by_both_numbers(environment, job_id):
    assert own_job_id(environment) == job_id


def test_the_time_left_ends_where_slurm_tells_the_worker(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 600))
    assert job_time_left_s(signal_s=120) == pytest.approx(480, abs=5)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) - 5))
    assert job_time_left_s() == 0.0


def test_an_older_slurm_is_asked_for_the_time_left(fake_slurm, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    fake_slurm.says("squeue", "1:00:10\n")
    for _ in range(3):
        assert job_time_left_s(signal_s=10) == pytest.approx(3600, abs=5)
    assert len(fake_slurm.calls) == 1
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    fake_slurm.says("squeue", "UNLIMITED\n")
    assert job_time_left_s() is None


def test_outside_of_slurm_there_is_no_limit(fake_slurm):
    assert job_time_left_s() is None
    assert fake_slurm.calls == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0:05", 5), ("10:00", 600), ("2:00:00", 7200), ("1-00:00:00", 86400), ("infinite", None), ("NOT_SET", None)],
)
def test_durations_are_read_as_slurm_writes_them(text, seconds):
    assert parse_duration_s(text) == seconds
