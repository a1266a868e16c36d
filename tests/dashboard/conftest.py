"""A small sweep that ended: a record, a journal with one study, and one run's row for TensorBoard."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.pruners import NopPruner

from lorasweep.record import SweepRecord, write_record
from lorasweep.report import write_hparams
from lorasweep.sweep.storage import JournalStudies, open_study


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The sweep's folder."""
    folder = tmp_path / "sweep"
    folder.mkdir()
    record = SweepRecord(
        status="complete", name="small", metric="loss", direction="minimize", definition={}, arms=[], trials=[]
    )
    write_record(record, folder)
    study = open_study(JournalStudies(folder), "lora", direction="minimize", pruner=NopPruner())
    rate = optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True)
    for value in (1.0, 0.5, 0.75):
        params = {"optim.lr": value / 100}
        trial = optuna.create_trial(
            value=value, params=params, distributions={"optim.lr": rate}, intermediate_values={1: 2.0, 2: value}
        )
        study.add_trial(trial)
    write_hparams(folder / "runs" / "lora-0000", swept={"optim.lr": 0.01}, metrics={"best/loss": 1.0})
    return folder
