"""Runs with parts that settings name by `_target_` train, resume exactly, and are recorded to be repeated."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasweep.record import read_run, read_steps
from lorasweep.training import RunPlace, train_run
from lorasweep.training.restore import restore_config

PLATEAU = {
    "schedule._target_": "torch.optim.lr_scheduler.ReduceLROnPlateau",
    "schedule.mode": "max",  # the loss falls, so that every evaluation counts as a bad one
    "schedule.patience": 0,
    "schedule.factor": 0.5,
}


def train(folder, config, *, bench, **hooks):
    return train_run(config, RunPlace(folder=Path(folder)), bench=bench, **hooks)


def rows(folder):
    return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in read_steps(folder)]


def rates(folder):
    return [row["lr"] for row in read_steps(folder) if "lr" in row]


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "sgd"},
        {"optim": "adafactor", "schedule": "warmup_stable_decay"},
        {"schedule": "one_cycle"},
        PLATEAU,
    ],
    ids=["sgd", "adafactor", "one_cycle", "plateau"],
)
def test_a_run_with_another_optimizer_or_schedule_learns_and_resumes_exactly(tmp_path, make_config, bench, settings):
    config = make_config({**settings, "optim.lr": 1e-3})
    whole = train(tmp_path / "whole", config, bench=bench)
    assert whole.status == "complete"
    assert len({row["loss"] for row in rows(tmp_path / "whole") if "loss" in row}) == whole.steps_done
    asked = iter([False, False, True])  # stops after the third step
    train(tmp_path / "halves", config, bench=bench, stop_requested=lambda: next(asked))
    assert train(tmp_path / "halves", config, bench=bench, resume=True).status == "complete"
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")
    assert restore_config(read_run(tmp_path / "whole")) == config


def test_a_schedule_that_waits_for_the_loss_moves_at_evaluations(tmp_path, make_config, bench):
    config = make_config({**PLATEAU, "optim.lr": 1e-3, "trainer.max_steps": 8, "trainer.eval_every_steps": 2})
    train(tmp_path / "whole", config, bench=bench)
    assert rates(tmp_path / "whole") == [1e-3] * 4 + [5e-4] * 2 + [2.5e-4] * 2
    paused = train(tmp_path / "paused", config, bench=bench, on_evaluation=lambda step, values: step != 4)
    assert paused.status == "paused"
    train(tmp_path / "paused", config, bench=bench, resume=True)
    assert rows(tmp_path / "paused") == rows(tmp_path / "whole")
