"""`lorasweep sweep ... worker=slurm`: what is said, what is submitted, and what is on disk afterwards."""

from __future__ import annotations

import socket
import sys

import pytest
import yaml

import lorasweep.sweep.slurm.launch as launch_file
from lorasweep.cli import DONE, FAILED, WRONG, run

MINI = {
    "name": "mini",
    "settings": {
        "data.block_length": 32,
        "data.max_validation_blocks": 4,
        "trainer.batch_size": 2,
        "trainer.max_steps": 2,
        "trainer.eval_every_steps": 1,
        "trainer.precision": "fp32",
        "trainer.device": "cpu",
        "worker": "slurm",
        "worker.gpus": 0,
        "worker.time_min": 60,
        "confirm.seeds": 0,
    },
    "arms": {"lora": {"settings": {"method": "lora"}, "space": {"method.rank": [1, 2]}, "trials": 2}},
}


@pytest.fixture
def sweep(fake_slurm, tmp_path, monkeypatch, capsys):
    """Types the command in an empty folder; returns its exit code and what it printed."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "mini.yaml").write_text(yaml.safe_dump(MINI))

    def type_words(*words):
        code = run(["sweep", "mini.yaml", *words])
        return code, capsys.readouterr()

    type_words.folder = here
    return type_words


def test_a_dry_run_needs_no_slurm_and_starts_nothing(sweep, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, printed = sweep("worker.dry_run=true", "worker.num=3")
    assert code == DONE
    assert "#SBATCH --array=0-2%3\n" in printed.out
    assert f"{sys.executable} -u -m submitit.core._submit {sweep.folder}/outputs/mini/workers/slurm" in printed.out
    assert [path.name for path in sweep.folder.iterdir()] == ["mini.yaml"]


def test_bad_input_is_one_sentence_and_leaves_the_disk_as_it_was(sweep, fake_slurm):
    code, printed = sweep("worker.partition=mian")
    assert code == WRONG
    assert printed.err == (
        "lorasweep: `worker.partition` must be one of gpu, long, main, but got 'mian'. Did you mean `main`?\n"
    )
    assert [path.name for path in sweep.folder.iterdir()] == ["mini.yaml"]
    assert not [call for call in fake_slurm.calls if call.startswith("sbatch")]


def test_workers_that_all_ended_are_one_sentence_and_the_sweep_can_be_taken_up(sweep, fake_slurm, monkeypatch):
    monkeypatch.setattr(launch_file, "LOOK_EVERY_S", 0.0)
    fake_slurm.says("sinfo", f"main*|16|64000|(null)|2:00:00|{socket.gethostname()}\n")
    code, printed = sweep()
    assert code == FAILED
    assert "Slurm job 77: the workers' output is in outputs/mini/workers/slurm" in printed.out.replace("\n", " ")
    assert "a worker must run until the sweep is complete, but none is left in Slurm's line." in printed.err
    assert (sweep.folder / "outputs" / "mini" / "workers" / "slurm" / "arrays.json").is_file()
