"""A folder of programs that stand in for Slurm's commands, so that each can say what a test wants."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lorasweep.config.compose import compose_driver
from lorasweep.config.slurm import SlurmWorkers

MACHINES = """\
main*|16|64000|(null)|2:00:00|n1
main*|16|64000|(null)|2:00:00|n2
gpu|64|512000|gpu:a100:4(S:0-1)|1-00:00:00|g1
gpu|32|256000|gpu:h100:1,gpu:v100:1|1-00:00:00|g2
long|16|64000|(null)|infinite|n1
"""
PROGRAM = """#!/bin/sh
printf '%s\\n' "$0 $*" >> {log}
{body}
"""


@dataclass
class FakeSlurm:
    """Programs on the path, in a folder of their own."""

    folder: Path
    log: Path

    def says(self, program: str, text: str = "", *, error: str = "", code: int = 0, body: str = "") -> None:
        """Makes a program print and end with an exit code; `body` is shell to run first."""
        lines = [body, f"printf '%s' {shlex.quote(text)}", f"printf '%s' {shlex.quote(error)} >&2", f"exit {code}"]
        path = self.folder / program
        path.write_text(PROGRAM.format(log=shlex.quote(str(self.log)), body="\n".join(filter(None, lines))))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    @property
    def calls(self) -> list[str]:
        """The commands that were run, in order."""
        return [line.rpartition("/")[2] if "/" in line.split()[0] else line for line in self._lines()]

    def _lines(self) -> list[str]:
        folder = f"{self.folder}/"
        return [line.replace(folder, "") for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A cluster of three partitions that takes everything."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SUBMITIT_"))]:
        monkeypatch.delenv(name)
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    cluster = FakeSlurm(folder, tmp_path / "calls.txt")
    cluster.says("sinfo", MACHINES)
    cluster.says("sbatch", "Submitted batch job 77\n", error="sbatch: Job 77 to start at once\n")
    cluster.says("srun")
    cluster.says("squeue")
    cluster.says("scontrol")
    cluster.says("sacctmgr", error="You are not running a supported accounting_storage plugin\n", code=1)
    return cluster


@pytest.fixture
def workers() -> Callable[..., SlurmWorkers]:
    """Settings of workers; without GPUs."""

    def make(**settings: Any) -> SlurmWorkers:
        given = {f"worker.{key}": value for key, value in {"gpus": 0, **settings}.items()}
        config = compose_driver({"worker": "slurm", **given}).worker
        assert isinstance(config, SlurmWorkers)
        return config

    return make
