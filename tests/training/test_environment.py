"""What a record says about the machine, and what `auto` means on it."""

from __future__ import annotations

import dataclasses
import subprocess

import pytest
import torch

import lorasweep.training.environment as environment_file
from lorasweep.config.compose import compose_run
from lorasweep.errors import ConfigError
from lorasweep.training.environment import (
    RECORDED_PACKAGES,
    describe_code,
    describe_packages,
    describe_platform,
    has_cpu_bf16,
    peak_memory_bytes,
    reset_peak_memory,
    resolve_device,
    resolve_precision,
)

TRAINER = compose_run({"trainer.device": "cpu"}).trainer


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_takes_bf16_where_the_processor_has_it(monkeypatch, has_bf16):
    monkeypatch.setattr(environment_file, "has_cpu_bf16", lambda: has_bf16)
    assert resolve_precision(TRAINER) == ("bf16" if has_bf16 else "fp32")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_precision_that_was_asked_for_is_taken(monkeypatch, precision):
    monkeypatch.setattr(environment_file, "has_cpu_bf16", lambda: precision == "fp32")
    assert resolve_precision(dataclasses.replace(TRAINER, precision=precision)) == precision


def test_bf16_is_refused_on_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    wanted = dataclasses.replace(TRAINER, device="gpu", precision="bf16")
    with pytest.raises(ConfigError, match=r"`trainer.precision` must be fp32 on this GPU, but got 'bf16'."):
        resolve_precision(wanted)
    assert resolve_precision(dataclasses.replace(wanted, precision="auto")) == "fp32"


def test_a_gpu_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"`trainer.device` must be cpu where PyTorch sees no GPU, but got 'gpu'."):
        resolve_device(dataclasses.replace(TRAINER, device="gpu"))


@pytest.mark.parametrize(
    ("device", "available", "expected"),
    [("auto", True, "gpu"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("gpu", True, "gpu")],
)
def test_auto_takes_the_gpu_where_there_is_one(monkeypatch, device, available, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert resolve_device(dataclasses.replace(TRAINER, device=device)) == expected


def test_bf16_of_the_processor_is_yes_or_no():
    assert has_cpu_bf16() in (True, False)


def test_packages_have_versions():
    described = describe_packages()
    assert tuple(described) == RECORDED_PACKAGES
    assert described["torch"] == torch.__version__.split("+")[0] or described["torch"] == torch.__version__


def test_a_checkout_says_its_commit(monkeypatch):
    describe_code.cache_clear()
    described = describe_code()
    assert "version" in described
    if "commit" in described:  # absent in an installed package
        assert len(described["commit"]) == 40
        assert described["modified"] in (True, False)


def test_code_without_git_has_a_version_alone(monkeypatch):
    def fail(*_, **__):
        raise OSError("no git")

    monkeypatch.setattr(subprocess, "run", fail)
    describe_code.cache_clear()
    assert list(describe_code()) == ["version"]
    describe_code.cache_clear()


def test_the_platform_has_what_changes_numbers():
    described = describe_platform("fp32")
    assert set(described) == {"python", "os", "processor", "cores", "threads", "gpu", "precision"}
    assert described["threads"] == torch.get_num_threads()


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
