"""What a record says about the machine, and which device and precision `auto` chooses."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lorasweep
import lorasweep.training.environment as environment_file
from lorasweep.config.compose import compose_run
from lorasweep.errors import ConfigError
from lorasweep.training.environment import (
    NUMERIC_VARIABLES,
    describe_code,
    describe_environment,
    deterministic_algorithms,
    resolve_precision,
)
from lorasweep.training.memory import peak_memory_bytes, reset_peak_memory
from lorasweep.training.torch_variables import SPIN_COUNT, set_torch_variables

TRAINER = compose_run({"trainer.device": "cpu"}).trainer


def test_bf16_is_refused_on_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    wanted = dataclasses.replace(TRAINER, device="gpu", precision="bf16")
    with pytest.raises(ConfigError, match=r"`trainer.precision` must be fp32 .*'bf16'"):
        resolve_precision(wanted)
    assert resolve_precision(dataclasses.replace(wanted, precision="auto")) == "fp32"


def test_a_changed_checkout_is_recorded_with_its_commit(monkeypatch, tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    file = tmp_path / "src" / "a" / "b" / "file.py"
    file.parent.mkdir(parents=True)
    file.write_text("one = 1\n")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    monkeypatch.setattr(environment_file, "__file__", str(file))
    describe_code.cache_clear()
    assert not describe_code()["modified"]
    file.write_text("one = 2\n")
    describe_code.cache_clear()
    assert describe_code()["modified"]
    describe_code.cache_clear()


def test_only_variables_that_change_numbers_are_recorded(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HF_TOKEN", "open-sesame")
    monkeypatch.setenv("TORCH_TOKEN", "open-sesame")
    described = describe_environment()
    assert described["OMP_NUM_THREADS"] == "3"
    assert all(name.startswith(NUMERIC_VARIABLES) for name in described)
    assert "open-sesame" not in str(described)


@pytest.mark.parametrize(("wanted", "strict"), [(True, False), ("strict", True), (False, False)])
def test_torch_is_deterministic_within_and_as_before_afterwards(wanted, strict):
    with deterministic_algorithms(wanted):
        assert torch.are_deterministic_algorithms_enabled() is bool(wanted)
        assert torch.is_deterministic_algorithms_warn_only_enabled() is (not strict)
        values = torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False) if not strict else None
        if strict:
            with pytest.raises(RuntimeError, match="deterministic"):
                torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
    assert values is None or values[0] == 1
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU its own memory is measured")
def test_peak_memory_sees_a_large_tensor_and_forgets_it_at_a_reset():
    size = 200 * 2**20
    reset_peak_memory()
    before = peak_memory_bytes()
    tensor = torch.ones(size // 4)
    assert peak_memory_bytes() >= before + size * 0.9  # some of it may lie in memory freed earlier
    del tensor
    reset_peak_memory()
    assert peak_memory_bytes() < before + size * 0.5


NUM_CORES = len(os.sched_getaffinity(0))


def test_openmp_sees_the_spin_count_when_torch_is_imported():
    done = subprocess.run(
        [sys.executable, "-c", "import lorasweep, torch"],
        env={
            "PYTHONPATH": str(Path(lorasweep.__file__).parents[1]),
            "PATH": "/usr/bin:/bin",
            "OMP_DISPLAY_ENV": "verbose",
            "OMP_NUM_THREADS": str(NUM_CORES),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    shown = {line.split("'")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line}
    if not shown:
        pytest.skip("torch's OpenMP is not GNU's")
    assert shown == {str(SPIN_COUNT)}  # no second OpenMP with other settings, such as one of NumPy or MKL


@pytest.mark.parametrize(
    ("variables", "modules", "count"),
    [
        ({"OMP_NUM_THREADS": str(NUM_CORES)}, {}, str(SPIN_COUNT)),
        ({"OMP_NUM_THREADS": str(NUM_CORES - 1)}, {}, "0"),
        ({"OMP_NUM_THREADS": str(NUM_CORES)}, {"ray": None}, "0"),
        ({"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "123"}, {}, "123"),
        # as a parent has set it
        ({"OMP_NUM_THREADS": str(NUM_CORES), "GOMP_SPINCOUNT": str(SPIN_COUNT)}, {"ray": None}, "0"),
        ({"OMP_WAIT_POLICY": "active"}, {}, None),
    ],
)
def test_threads_sleep_at_once_only_if_cores_are_shared_and_the_user_did_not_choose(
    monkeypatch, variables, modules, count
):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that the variable is as before afterwards
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    set_torch_variables()
    assert os.environ.get("GOMP_SPINCOUNT") == count


def test_onednn_keeps_few_products_unless_the_user_chose(monkeypatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    set_torch_variables()
    assert (os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) == ("7", "256")
