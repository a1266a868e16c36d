"""A finished run as it was at its best evaluation: its settings, its base model and the trained weights on it.

First of this package: `changes` reads what is made here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lorasweep.config.method import LoraConfig
from lorasweep.config.run import RunConfig
from lorasweep.errors import RecordError
from lorasweep.methods import METHODS, copy_sharing_weights, draw_head
from lorasweep.models.load import BaseModel
from lorasweep.record import RUN_FILE, RunRecord, read_run
from lorasweep.training.restore import check_kept_files, restore_config, restore_model

WEIGHTS_FOLDER = "best"


@dataclass(frozen=True, kw_only=True, eq=False)
class FinishedRun:
    """A run's folder as read, its weights known to be whole; no model is loaded yet."""

    folder: Path
    record: RunRecord
    config: RunConfig

    @property
    def method(self) -> str:
        """What trained."""
        return self.config.method.name


def read_finished_run(folder: Path) -> FinishedRun:
    """Reads a run that has weights to look at.

    Raises:
        RecordError: The folder is not a run's, its record is damaged, or its weights are missing, changed or damaged;
            or the run trains nothing.
    """
    record = read_run(folder)
    for name in ("config", "platform", "data", "base", "best", "files"):
        if not isinstance(getattr(record, name), dict):
            raise RecordError(
                f"`{name}` in {str(folder / RUN_FILE)!r} must be a mapping, but is not. Restore the file."
            )
    config = restore_config(record)
    if config.method.name == "frozen":
        raise RecordError(
            f"a run must have trained something to be inspected, but {str(folder)!r} has `method=frozen`. "
            "Name a run of another method."
        )
    check_kept_files(record, folder, part=WEIGHTS_FOLDER)
    return FinishedRun(folder=folder, record=record, config=_anywhere(config, record))


def restore_trained(run: FinishedRun, base: BaseModel) -> nn.Module:
    """Returns the run's model with its best weights, in evaluation mode; it shares the base's frozen tensors.

    LoRA layers are made as the run made them, so that the parts of a fused projection are known apart. Not those of
    PiSSA, whose start another machine may work out otherwise: they come as they are stored, of twice the rank.

    Raises:
        RecordError: The base is another one than the run's, or the weights do not fit it.
    """
    check_base(run, base)
    folder, config = run.folder / WEIGHTS_FOLDER, run.config.method
    if not isinstance(config, LoraConfig) or config.init == "pissa":
        return restore_model(run.config, base, folder=folder)
    model, method = copy_sharing_weights(base.model), METHODS[run.method]
    method.prepare(model, config, generator=_init_stream(run), head=base.head)
    method.load(model, folder)
    return model.eval()


def starting_model(run: FinishedRun, base: BaseModel) -> nn.Module:
    """Returns the base as the run began: with the new head that it drew, if it drew one."""
    model = copy_sharing_weights(base.model)
    draw_head(model, base.head, generator=_init_stream(run))
    return model.eval()


def _init_stream(run: FinishedRun) -> torch.Generator:
    return torch.Generator().manual_seed(run.config.seeds.init)


def check_base(run: FinishedRun, base: BaseModel) -> None:
    """Makes sure that a base model is the one that a run was trained on.

    Raises:
        RecordError: It is not.
    """
    trained_on = run.record.base.get("fingerprint")
    if trained_on != base.fingerprint:
        raise RecordError(
            f"{str(run.folder)!r} must be inspected on the base model it was trained on ({trained_on!r}), but "
            f"{base.path!r} has {base.fingerprint!r}. Restore that model, or train the run again."
        )


def require_same_base(run: FinishedRun, other: FinishedRun) -> None:
    """Makes sure that two runs changed the same base, so that their directions lie in one space.

    Raises:
        RecordError: They did not.
    """
    bases = [one.record.base for one in (run, other)]
    if bases[0].get("fingerprint") != bases[1].get("fingerprint"):
        described = " and ".join(f"{base.get('path')!r} ({base.get('fingerprint')})" for base in bases)
        raise RecordError(
            f"two runs must have one base model in one precision to be compared, but {str(run.folder)!r} and "
            f"{str(other.folder)!r} have {described}. Name two runs of the same base."
        )


def _anywhere(config: RunConfig, record: RunRecord) -> RunConfig:
    """The run's settings, on any device but in the precision that it found: the base is to be loaded as it was."""
    precision = record.platform.get("precision")
    known = precision if precision in ("bf16", "fp32") else config.trainer.precision
    return replace(config, trainer=replace(config.trainer, device="auto", precision=known))
