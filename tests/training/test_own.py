"""A model and data of the user's own train together, and come to the same each time."""

from __future__ import annotations

import sys

import pytest
import torch
from lightning import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

import lorasweep
from lorasweep.config.compose import compose_run
from lorasweep.errors import ConfigError
from lorasweep.record import read_run
from lorasweep.training.inputs import build_inputs
from lorasweep.training.processes import quiet_lightning
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunFolder


class Points(LightningDataModule):
    """Points of the plane, labelled by the quadrant's diagonal: no linear layer alone can tell."""

    def _loader(self, seed, size):
        points = torch.randn(size, 2, generator=torch.Generator().manual_seed(seed))
        labels = (points.prod(1) > 0).long()
        rows = [{"points": point, "labels": label} for point, label in zip(points, labels, strict=True)]
        return DataLoader(rows)

    def train_dataloader(self):
        return self._loader(0, 64)

    def val_dataloader(self):
        return self._loader(1, 32)


class Net(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.top = nn.Linear(32, outputs)

    def forward(self, points):
        return self.top(self.body(points))


def build(labels):
    return Net(labels.num_outputs), None, ("top",)


SETTINGS = {
    "model": "own",
    "model.factory": "own_points:build",
    "model.kind": "classifier",
    "data": "own",
    "data.factory": "own_points:Points",
    "data.labels": ["apart", "together"],
    "trainer.batch_size": 16,
    "trainer.eval_batch_size": 16,
    "trainer.max_steps": 60,
    "trainer.eval_every_steps": 30,
    "trainer.precision": "fp32",
    "trainer.device": "cpu",
    "trainer.progress": False,
    "optim.lr": 0.02,
}


@pytest.fixture(autouse=True)
def own_points(monkeypatch):
    monkeypatch.setitem(sys.modules, "own_points", sys.modules[__name__])


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_own_model_learns_own_data(tmp_path, method):
    config = compose_run(SETTINGS | {"method": method} | ({"method.rank": 2} if method == "lora" else {}))
    inputs = build_inputs(config)
    record = train_run(config, RunFolder(path=tmp_path / "run"), inputs=inputs)
    assert record.status == "complete"
    assert record.best["accuracy"] > 0.8  # half of the points by guessing, about as many by the best line
    assert read_run(tmp_path / "run").base["path"] == "own_points:build"
    again = train_run(config, RunFolder(path=tmp_path / "again"), inputs=build_inputs(config))
    assert again.last == record.last


def test_own_model_and_data_train_under_a_trainer_of_ones_own(tmp_path):
    words = [f"{key}={value}".replace("'", "") for key, value in (SETTINGS | {"method.rank": 2}).items()]
    module, data = lorasweep.TrainingModule(words), lorasweep.DataModule(words)
    with quiet_lightning():
        trainer = Trainer(max_steps=60, accelerator="cpu", logger=False, default_root_dir=tmp_path)
        trainer.fit(module, data)
    assert trainer.callback_metrics["validation/accuracy"] > 0.8
    with pytest.raises(ConfigError, match="`trust=True`"):
        lorasweep.TrainingModule.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    path = trainer.checkpoint_callback.best_model_path
    loaded = lorasweep.TrainingModule.load_from_checkpoint(path, trust=True)
    with quiet_lightning():
        (scores,) = trainer.validate(loaded, data, verbose=False)
    assert scores["validation/accuracy"] == trainer.callback_metrics["validation/accuracy"]
