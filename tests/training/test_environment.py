"""What a record says about the machine, and which device and precision `auto` chooses."""

import dataclasses
import subprocess

import pytest
import torch

import lorasweep.training.environment as environment_file
from lorasweep.config.compose import compose_run
from lorasweep.errors import ConfigError
from lorasweep.training.environment import (
    NUMERIC_VARIABLES,
    code_patch,
    describe_code,
    describe_environment,
    deterministic_algorithms,
    peak_memory_bytes,
    reset_peak_memory,
    resolve_precision,
)

TRAINER = compose_run({"trainer.device": "cpu"}).trainer


def test_bf16_is_refused_on_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    wanted = dataclasses.replace(TRAINER, device="gpu", precision="bf16")
    with pytest.raises(ConfigError, match=r"`trainer.precision` must be fp32 .*'bf16'"):
        resolve_precision(wanted)
    assert resolve_precision(dataclasses.replace(wanted, precision="auto")) == "fp32"


def test_the_patch_leads_from_the_commit_to_the_code(monkeypatch, tmp_path):
    """In a checkout of its own, with a changed and a secret line."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    file = tmp_path / "src" / "a" / "b" / "file.py"
    file.parent.mkdir(parents=True)
    file.write_text("one = 1\n")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    monkeypatch.setattr(environment_file, "__file__", str(file))
    forget()
    assert not describe_code()["modified"]
    assert "patch" not in describe_code()
    file.write_text("one = 2\nurl = 'https://me:open-sesame@host'\n")
    forget()
    described = describe_code()
    assert described["modified"]
    assert described["patch"]["file"] == "code.patch"
    assert "open-sesame" not in code_patch()
    subprocess.run([*git, "stash", "-q"], check=True)
    subprocess.run([*git, "apply"], input=code_patch(), text=True, check=True)
    assert file.read_text() == "one = 2\nurl = 'https://***@host'\n"
    forget()


def forget():
    describe_code.cache_clear()
    code_patch.cache_clear()


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
