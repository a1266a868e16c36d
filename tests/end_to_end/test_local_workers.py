"""A real sweep by two worker processes of this machine, whatever process is killed."""

import random
import signal
import time
from contextlib import suppress

import psutil
import pytest
import yaml

from lorasweep.record import read_sweep

from .conftest import TIMEOUT_S, state_of
from .ray_sweep import SWEEP, check_whole, count_evaluations

pytestmark = pytest.mark.slow
NUM_KILLS = (1, pytest.param(25, marks=pytest.mark.soak))
STEPS = 24


@pytest.fixture
def words(tmp_path):
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    return ["sweep", "two.yaml", "worker.num=2", "worker.pack_size=2", f"trainer.max_steps={STEPS}"]


@pytest.fixture
def alone(words, tmp_path, finish):
    """What one worker in the sweep's own process makes of it."""
    finish(*words, "worker.num=1", "sweep.output=alone")
    return state_of(tmp_path / "alone")


def find_workers(session):
    """The worker processes of a sweep that has trained a little."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(session.pid).children()
    return []


def wait_for_evaluations(session, folder, number):
    session.wait_for(lambda: folder.exists() and count_evaluations(folder) >= number)


@pytest.mark.parametrize("num_kills", NUM_KILLS)
def test_killed_workers_lose_nothing(begin, tmp_path, words, alone, num_kills):
    folder, chance = tmp_path / "sweep", random.Random(0)
    session = begin(*words, "sweep.output=sweep")
    for number in range(num_kills):
        wait_for_evaluations(session, folder, number + 1)
        time.sleep(chance.uniform(0, 0.5))
        if (workers := find_workers(session)) and len(list(folder.glob("packs/*"))):
            with suppress(psutil.NoSuchProcess):
                chance.choice(workers).kill()
    assert session.wait() == 0, session.output
    check_whole(folder, steps=STEPS)
    assert [state[:6] for state in state_of(folder).values()] == [state[:6] for state in alone.values()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_sweep_which_resumes_as_it_was(begin, finish, tmp_path, words, alone, number):
    folder = tmp_path / "sweep"
    session = begin(*words, "sweep.output=sweep")
    wait_for_evaluations(session, folder, 1)
    workers = find_workers(session)
    assert len(workers) == 2
    session.send(number)
    code = session.wait()
    _, left = psutil.wait_procs(workers, timeout=TIMEOUT_S)
    assert left == []
    if number == signal.SIGINT:
        assert (code, read_sweep(folder).status) == (130, "interrupted"), session.output
        assert "lorasweep sweep --resume sweep" in session.output
    finish("sweep", "--resume", "sweep")
    check_whole(folder, steps=STEPS)
    assert [state[:6] for state in state_of(folder).values()] == [state[:6] for state in alone.values()]
