"""Worker processes of one machine: as many as fit, each with its share, ended together."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from lorasweep.config.sweep import LocalWorkers
from lorasweep.errors import ConfigError
from lorasweep.sweep import count_workers, start_workers, watch_workers, why_ended
from lorasweep.sweep.launch import LocalWorker


def workers(num):
    return LocalWorkers(name="local", num=num, pack_size=1, lease_s=10)


def test_without_a_gpu_one_worker_is_the_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert count_workers(workers("auto")) == 1


def test_a_worker_per_gpu_is_the_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert (count_workers(workers("auto")), count_workers(workers(3))) == (8, 3)


def test_more_workers_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"`worker.num <= 2` must hold, the number of GPUs .*, but got 3"):
        count_workers(workers(3))


def test_more_workers_than_cores_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"`worker.num <= \d+` must hold, the number of processor cores"):
        count_workers(workers(100_000))


def started(tmp_path, *programs):
    logs = [tmp_path / f"{number}.log" for number in range(len(programs))]
    running = []
    for code, log in zip(programs, logs, strict=True):
        with log.open("wb") as output:
            running.append(LocalWorker(process=subprocess.Popen([sys.executable, "-c", code], stdout=output), log=log))
    return running


def test_a_request_to_stop_reaches_every_worker_once(tmp_path):
    code = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(130))\n"
        "print(1, flush=True)\ntime.sleep(60)"
    )
    running = started(tmp_path, code, code)
    watch_workers(running, stop_requested=lambda: all(worker.log.read_bytes() for worker in running))
    assert [worker.process.returncode for worker in running] == [130, 130]


def test_workers_do_not_outlive_who_is_interrupted_for_good(tmp_path):
    running = started(tmp_path, "import time; time.sleep(60)")

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch_workers(running, stop_requested=interrupted)
    assert running[0].process.wait() < 0


def test_what_the_workers_said_at_last_is_passed_on(tmp_path):
    running = started(tmp_path, "print('first'); print('no room left.'); raise SystemExit(1)")
    watch_workers(running, stop_requested=lambda: False)
    said = str(why_ended(running))
    assert said.startswith("a worker must run until the sweep is complete, but all of them ended, one with exit code 1")
    assert "no room left." in said


def test_each_worker_has_cores_of_its_own(tmp_path):
    (tmp_path / "workers").mkdir()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("there is one processor core")
    running = start_workers(tmp_path, num=2)
    try:
        shares = [os.sched_getaffinity(worker.process.pid) for worker in running]
    finally:
        watch_workers(running, stop_requested=lambda: True)
    assert not shares[0] & shares[1]
    assert shares[0] | shares[1] == set(cores)
