import os
import subprocess
import sys
from pathlib import Path

import pytest

import lorasweep
from lorasweep.training.torch_variables import set_torch_variables

NUM_CORES = len(os.sched_getaffinity(0))


def spin_count_of_openmp(code, **environment):
    """Returns the number that OpenMP itself shows when a process that runs this code loads it."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            "PYTHONPATH": str(Path(lorasweep.__file__).parents[1]),
            "PATH": "/usr/bin:/bin",
            "OMP_DISPLAY_ENV": "verbose",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    shown = [line.split("'")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not shown:
        pytest.skip("torch's OpenMP is not GNU's")
    assert len(set(shown)) == 1, shown  # no second OpenMP with other settings, such as one of NumPy or MKL
    return int(shown[0])


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({"OMP_NUM_THREADS": str(NUM_CORES)}, 20_000),
        pytest.param(
            {"OMP_NUM_THREADS": str(NUM_CORES - 1)}, 0, marks=pytest.mark.skipif(NUM_CORES < 2, reason="one core")
        ),
        ({"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "123"}, 123),
    ],
)
def test_threads_sleep_at_once_only_if_cores_are_shared_and_the_user_did_not_choose(environment, count):
    assert spin_count_of_openmp("import lorasweep, torch", **environment) == count


def test_onednn_keeps_few_products_unless_the_user_chose(monkeypatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    set_torch_variables()
    assert (os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) == ("7", "256")
