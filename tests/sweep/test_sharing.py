"""Several workers on one sweep: each trial is asked for, run and told once, whoever goes."""

from __future__ import annotations

import itertools
import subprocess
import threading

import optuna
import pytest
from optuna.trial import TrialState

import lorasweep.sweep.software as software_file
from lorasweep.errors import ConfigError, RecordError, WorkerError, WorkerLost
from lorasweep.record import WorkerRow, read_sweep, read_workers, write_worker
from lorasweep.sweep import Worker, join_sweep, reopen_sweep
from lorasweep.sweep.rows import WORKER_ATTRIBUTE
from lorasweep.sweep.trials import Trials
from lorasweep.sweep.workers import this_process


@pytest.fixture
def content(content):
    content["settings"]["worker.lease_s"] = 2
    content["settings"]["sampler"] = "random"
    return content


def serve(path, work, failures):
    try:
        assert work(join_sweep(path))
    except BaseException as error:  # shown by the test, not by the thread
        failures.append(error)


@pytest.mark.parametrize("seeds", [0, 3])
def test_workers_share_the_trials_of_both_stages(begin, work, runs, content, seeds):
    content["settings"]["confirm.seeds"] = seeds
    content["arms"]["lora"]["trials"] = 20
    alone = begin(content, folder="alone")
    assert work(alone)
    runs.begun.clear()
    folder = begin(content, folder="shared")
    failures: list[BaseException] = []
    others = [threading.Thread(target=serve, args=(folder.path, work, failures)) for _ in range(2)]
    for thread in others:
        thread.start()
    assert work(folder)
    for thread in others:
        thread.join()
    assert failures == []
    shared, expected = read_sweep(folder.path), read_sweep(alone.path)
    assert shared.status == "complete"
    assert sorted((row.arm, row.number, str(row.params), row.value) for row in shared.trials) == sorted(
        (row.arm, row.number, str(row.params), row.value) for row in expected.trials
    )
    assert sorted((row.arm, row.seed, row.value) for row in shared.confirm) == sorted(
        (row.arm, row.seed, row.value) for row in expected.confirm
    )
    assert len(runs.begun) == len(shared.trials) + len(shared.confirm)
    assert {row.status for row in read_workers(folder.path)} == {"ended"}
    assert sum(row.done for row in read_workers(folder.path)) == len(runs.begun)


def leave_a_trial(folder, *, worker, arm="lora"):
    """Asks for a trial as a worker that then is no more."""
    study = folder.studies[arm]
    trial = study.ask(fixed_distributions=next(a for a in folder.definition.arms if a.name == arm).space)
    if worker is not None:
        trial.set_user_attr(WORKER_ATTRIBUTE, worker)
    return trial.number


def dead_worker(folder, **changes):
    ended = subprocess.Popen(["true"])
    ended.wait()
    here = this_process()
    row = WorkerRow(
        id="gone-1",
        host=here.host,
        pid=ended.pid,
        boot=here.boot,
        pid_namespace=here.pid_namespace,
        started_at="2026-01-01T00:00:00+00:00",
    )
    write_worker(row, folder.path)
    return row.id


@pytest.mark.parametrize("signed", [True, False])
def test_a_trial_whose_worker_is_gone_is_run_by_another(begin, work, runs, content, signed):
    folder = begin(content)
    number = leave_a_trial(folder, worker=dead_worker(folder) if signed else None)
    assert work(folder)
    rows = read_sweep(folder.path).trials
    assert len(rows) == 10
    assert {row.state for row in rows} == {"complete"}
    assert runs.begun.count(("lora", number)) == 1
    assert [row.status for row in read_workers(folder.path) if row.id == "gone-1"] == (["lost"] if signed else [])


def test_a_worker_waits_for_the_trials_of_others(begin, work, runs, content):
    folder = begin(content)
    study = folder.studies["lora"]
    number = leave_a_trial(folder, worker="elsewhere-1")  # of which nothing is known: its lease runs from now on
    ended = threading.Timer(1.0, lambda: study.tell(number, 0.5))
    ended.start()
    assert work(folder)
    ended.join()
    assert ("lora", number) not in runs.begun
    assert study.trials[number].value == 0.5
    assert read_sweep(folder.path).status == "complete"


def test_a_trial_that_was_taken_over_is_not_told_by_its_first_worker(begin, work, runs, content):
    folder = begin(content)

    def taken_over(config, step):
        study = folder.studies["lora"]
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            optuna.Trial(study, trial._trial_id).set_user_attr(WORKER_ATTRIBUTE, "other-1")
        return 1.0

    runs.score = taken_over
    with pytest.raises(
        WorkerLost,
        match=r"a trial must be run by the worker that owns it, but trial 0 of arm `lora` was taken over by ot",
    ):
        work(folder)
    assert folder.studies["lora"].trials[0].state == TrialState.RUNNING
    assert folder.studies["lora"].trials[0].intermediate_values == {}


def test_a_second_worker_joins_while_one_runs_and_taking_up_is_refused(begin, work, runs, content):
    folder = begin(content)
    joined = join_sweep(folder.path)
    with pytest.raises(WorkerError, match=r"a sweep is taken up when no worker runs it, but .* `lorasweep worker"):
        reopen_sweep(folder.path)
    folder.close()
    with pytest.raises(WorkerError, match=r"a sweep is taken up when no worker runs it"):
        reopen_sweep(folder.path)
    joined.close()
    reopen_sweep(folder.path).close()


def test_a_folder_that_is_no_sweep_cannot_be_joined(tmp_path):
    with pytest.raises(RecordError, match=r"sweep.json"):
        join_sweep(tmp_path)


def test_workers_must_have_the_code_and_packages_of_the_sweep(begin, runs, content, monkeypatch):
    folder = begin(content)
    here = software_file.describe_software()
    monkeypatch.setattr(software_file, "describe_software", lambda: here | {"torch": "1.0"})
    with pytest.raises(
        ConfigError,
        match=r"all workers of a sweep must have the same code and packages, but torch is 1.0 here and was .*--allow",
    ):
        join_sweep(folder.path)
    join_sweep(folder.path, allow_different=True).close()
    folder.close()
    reopen_sweep(folder.path).close()  # who takes it up alone decides for those that come
    join_sweep(folder.path).close()


def test_a_journal_serves_one_machine(begin, content):
    folder = begin(content)
    row = WorkerRow(id="far-1", host="far", pid=1, started_at="2026-01-01T00:00:00+00:00")
    write_worker(row, folder.path)
    with pytest.raises(ConfigError, match=r"`storage=journal` must be used from one machine, but worker far-1 serves"):
        join_sweep(folder.path)


def test_a_worker_takes_no_trial_that_cannot_end_in_time(begin, runs, content, silent, benches):
    import lorasweep.sweep.driver as driver_file  # noqa: PLC0415 (the fixtures change it)

    left = {"s": 100.0}
    folder = begin(content)
    worker = driver_file.Worker(
        folder,
        benches,
        observer=silent,
        stop_requested=lambda: False,
        run_ended=lambda *_: None,
        time_left_s=lambda: left["s"],
    )

    class KnownTimes:
        def expected_s(self, arm):
            return {"frozen": None, "full": 50.0, "lora": 500.0}[arm.name]

    worker.trials = KnownTimes()
    arms = folder.definition.arms
    assert [arm.name for arm in worker._arms_in_time(arms)] == ["frozen", "full", "lora"]
    left["s"] = 10.0
    assert [arm.name for arm in worker._arms_in_time(arms)] == ["frozen", "lora"]  # lora never fits: in pieces then
    folder.close()


def test_a_worker_without_time_for_any_trial_leaves_while_others_run(
    begin, runs, content, silent, benches, monkeypatch
):
    folder = begin(content)
    leave_a_trial(folder, worker="elsewhere-1")
    monkeypatch.setattr(Trials, "expected_s", lambda self, arm: 50.0)
    left_s = itertools.chain([100.0], itertools.repeat(10.0))
    worker = Worker(
        folder,
        benches,
        observer=silent,
        stop_requested=lambda: False,
        run_ended=lambda *_: None,
        time_left_s=lambda: next(left_s),
    )
    assert not worker.run()
    folder.close()
    assert runs.begun == []
