"""Hydra's launchers and sweepers run `lorasweep train -m`: own folders, an exit code, the score of each job."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lorasweep import commands
from lorasweep.cli import run
from lorasweep.errors import INTERRUPTED_EXIT_CODE
from lorasweep.outcome import DONE, FAILED, WRONG_REQUEST
from lorasweep.record import read_run

pytestmark = pytest.mark.usefixtures("here")


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(["joblib", "hydra.launcher.n_jobs=2"], marks=pytest.mark.release),
        pytest.param(["submitit_local"], marks=pytest.mark.cluster),
    ],
    ids=lambda words: words[0],
)
def test_a_launcher_gives_each_job_a_folder_and_the_command_an_exit_code(here, short_words, launcher):
    name, *its_settings = launcher  # on one core joblib would run the jobs in this process
    # what the command line says of folders must reach the other processes
    (here / "more" / "experiment").mkdir(parents=True)
    (here / "more" / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 9\n")
    (here / "my_callbacks.py").write_text("from lightning import Callback\n\n\nclass Mine(Callback):\n    pass\n")
    callback = ["callbacks.mine._target_=my_callbacks.Mine"]
    own = ["hydra.searchpath=[more]", "+experiment=mine", *callback]
    words = ["-m", f"hydra/launcher={name}", *its_settings, *short_words, *own, "optim.lr=1e30,1e-3"]
    command = [sys.executable, "-m", "lorasweep", "train", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == FAILED, done.stderr
    assert "lorasweep: a job failed: " in done.stderr
    assert "Lower `optim.lr`." in done.stderr
    assert "Traceback" not in done.stderr
    records = [read_run(here / "outputs" / "train" / name) for name in ("0001", "0002")]
    assert sorted(record.status for record in records) == ["complete", "failed"]
    assert [record.config["seed"] for record in records] == [9, 9]
    assert all("my_callbacks" in str(record.config["callbacks"]) for record in records)
    assert not list((here / "outputs" / "train").glob(".failures*"))


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([DONE, WRONG_REQUEST, FAILED], WRONG_REQUEST),  # a job is wrong in a way that only its start shows
        ([INTERRUPTED_EXIT_CODE], INTERRUPTED_EXIT_CODE),  # ends the grid: a second job would raise StopIteration
    ],
)
def test_the_exit_code_of_a_grid_is_that_of_the_first_job_that_did_not_end_well(here, monkeypatch, capsys, codes, code):
    codes = iter(codes)
    result = SimpleNamespace(record=SimpleNamespace(score=1.0, reason="why"))
    monkeypatch.setattr("lorasweep.api.train_run", lambda *_, **__: result)
    monkeypatch.setattr(commands, "_say_run", lambda *_: next(codes))
    assert run(["train", "-m", "seed=1,2,3"]) == code
    assert "Traceback" not in capsys.readouterr().err
    assert not list(here.rglob("run.json"))


def test_a_sweeper_that_is_not_installed_is_one_sentence(capsys):
    assert run(["train", "-m", "hydra/sweeper=optuna", "seed=1"]) == WRONG_REQUEST
    (line,) = capsys.readouterr().err.splitlines()
    assert "`hydra/sweeper` must be one of basic, but got 'optuna'" in line
