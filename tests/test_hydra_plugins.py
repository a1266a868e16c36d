"""Hydra's launchers and sweepers run `lorasweep train -m`: own folders, an exit code, the score of each job."""

import os
import subprocess
import sys

import pytest
import yaml

from lorasweep import cli
from lorasweep.cli import DONE, FAILED, INTERRUPTED_EXIT_CODE, WRONG_REQUEST, run
from lorasweep.record import read_run


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def short(short_run):
    return [f"{key}={yaml.safe_dump(value).split()[0]}" for key, value in short_run.items()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [["joblib", "hydra.launcher.n_jobs=2"], ["submitit_local"]], ids=lambda words: words[0]
)
def test_a_launcher_gives_each_job_a_folder_and_the_command_an_exit_code(here, short, launcher):
    name, *its_settings = launcher  # on one core joblib would run the jobs in this process
    # what the command line says of folders must reach the other processes
    (here / "more" / "experiment").mkdir(parents=True)
    (here / "more" / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 9\n")
    (here / "my_callbacks.py").write_text("from lightning import Callback\n\n\nclass Mine(Callback):\n    pass\n")
    callback = ["callbacks.mine._target_=my_callbacks.Mine"]
    own = ["hydra.searchpath=[more]", "+experiment=mine", *callback]
    words = ["-m", f"hydra/launcher={name}", *its_settings, *short, *own, "optim.lr=1e30,1e-3"]
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


def test_the_exit_code_of_a_grid_is_that_of_the_first_job_that_failed(here, monkeypatch, capsys):
    """The second of three jobs is wrong in a way that only its start shows, the third fails."""
    codes = iter([DONE, WRONG_REQUEST, FAILED])
    monkeypatch.setattr("lorasweep.train_app._train", lambda *_, **__: fake_result)
    fake_result = type("Result", (), {"record": type("Record", (), {"score": 1.0, "reason": "why"})})
    monkeypatch.setattr(cli, "_say_run", lambda *_: next(codes))
    assert run(["train", "-m", "seed=1,2,3"]) == WRONG_REQUEST
    assert "Traceback" not in capsys.readouterr().err
    assert [path.name for path in (here / "outputs" / "train").iterdir()] == ["multirun.yaml"]


def test_an_interrupted_job_ends_the_grid(here, monkeypatch, capsys):
    codes = iter([INTERRUPTED_EXIT_CODE])  # a second job would raise StopIteration
    monkeypatch.setattr("lorasweep.train_app._train", lambda *_, **__: fake_result)
    fake_result = type("Result", (), {"record": type("Record", (), {"score": 1.0, "reason": "why"})})
    monkeypatch.setattr(cli, "_say_run", lambda *_: next(codes))
    assert run(["train", "-m", "seed=1,2"]) == INTERRUPTED_EXIT_CODE


def test_a_sweeper_that_is_not_installed_is_one_sentence(capsys):
    assert run(["train", "-m", "hydra/sweeper=optuna", "seed=1"]) == WRONG_REQUEST
    (line,) = capsys.readouterr().err.splitlines()
    assert "Could not find 'hydra/sweeper/optuna'" in line
