"""What `lorasweep doctor` finds on healthy and on broken machines."""

from __future__ import annotations

import subprocess
from urllib.error import URLError

import pytest
import torch

from lorasweep import doctor
from lorasweep.cli import DONE, FAILED, run


@pytest.fixture
def no_network(monkeypatch):
    def refuse(request, timeout):
        raise URLError("no route to host")

    monkeypatch.setattr(doctor.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(doctor.constants, "HF_HUB_OFFLINE", False)


def test_a_healthy_machine_has_no_problem(no_network, tmp_path, capsys):
    assert run(["doctor", "--folder", str(tmp_path / "outputs")]) == DONE
    printed = capsys.readouterr().out
    for name in ("packages", "devices", "precision", "memory", "disk", "Hugging Face hub", "Ray", "Slurm"):
        assert name in printed
    assert "problem" not in printed
    assert doctor.find_version("bitsandbytes") or "lorasweep[quantised]" in printed
    assert not (tmp_path / "outputs").exists()


def test_missing_and_old_packages_are_named(monkeypatch):
    monkeypatch.setattr(
        doctor, "requires", lambda name: ["torch>=99", "nothing-of-this-name", "ray>=1; extra == 'ray'"]
    )
    finding = doctor.check_packages()
    assert finding.state == "problem"
    assert "torch>=99 is required, but " in finding.text
    assert "nothing-of-this-name is not installed" in finding.text
    assert "ray" not in finding.text


def test_a_gpu_that_torch_does_not_see_is_a_problem(monkeypatch, no_network, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    answer = subprocess.CompletedProcess([], 0, stdout="NVIDIA X1\n", stderr="")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *arguments, **options: answer)
    finding = doctor.check_device()
    assert finding.state == "problem"
    assert "NVIDIA X1" in finding.text
    assert run(["doctor", "--folder", str(tmp_path)]) == FAILED
    assert "nvidia-smi lists NVIDIA X1" in " ".join(capsys.readouterr().out.split())


def test_a_driver_that_fails_lists_no_gpu(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    answer = subprocess.CompletedProcess([], 9, stdout="NVIDIA-SMI has failed", stderr="")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *arguments, **options: answer)
    assert doctor.list_gpus_of_driver() == []


def test_a_folder_that_can_not_be_written_is_a_problem(monkeypatch, tmp_path):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    finding = doctor.check_disk(tmp_path / "outputs")
    assert finding.state == "problem"
    assert "Permission denied" in finding.text


def test_little_disk_is_noted(monkeypatch, tmp_path):
    usage = doctor.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage._replace(free=2**30))
    assert doctor.check_disk(tmp_path).state == "note"


def test_the_hub_without_network_is_noted_and_a_login_is_seen(monkeypatch, no_network):
    assert "no route to host" in doctor.check_hub().text
    monkeypatch.setattr(doctor.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in doctor.check_hub().text


def test_sbatch_without_submitit_is_noted(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor, "find_version", lambda package: None)
    assert "lorasweep[slurm]" in doctor.check_slurm().text
    assert "lorasweep[ray]" in doctor.check_ray().text
