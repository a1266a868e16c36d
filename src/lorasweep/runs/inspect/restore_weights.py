"""A finished run with its best weights: read from its folder, checked, and put on its base model."""

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
from lorasweep.record import RunRecord, read_run
from lorasweep.training.restore import check_kept_files, restore_config, restore_model

WEIGHTS_FOLDER = "best"


@dataclass(frozen=True, kw_only=True, eq=False)
class FinishedRun:
    """Folder, record and settings of a run whose weights are as it wrote them. No model is loaded yet."""

    folder: Path
    record: RunRecord
    config: RunConfig

    @property
    def method(self) -> str:
        """Name of its method."""
        return self.config.method.name


def read_finished_run(folder: Path) -> FinishedRun:
    """Reads a run that has weights to inspect.

    Raises:
        RecordError: The folder is not a run's; its record or weights are damaged or missing; or the run trains nothing.
    """
    record = read_run(folder)
    config = restore_config(record)
    if config.method.name == "frozen":
        raise RecordError(
            f"a run must have trained something to be inspected, but {str(folder)!r} has `method=frozen`. "
            "Name a run of another method."
        )
    check_kept_files(record, folder, part=WEIGHTS_FOLDER)
    # the base is loaded on any device, but in the precision that `trainer.precision=auto` chose
    precision = record.platform.get("precision", config.trainer.precision)
    trainer = replace(config.trainer, device="auto", precision=precision)
    return FinishedRun(folder=folder, record=record, config=replace(config, trainer=trainer))


def restore_trained(run: FinishedRun, base: BaseModel) -> nn.Module:
    """Returns the run's model with its best weights, in evaluation mode. It shares the base's frozen tensors.

    Raises:
        RecordError: The base is not the run's, or the weights do not fit it.
    """
    trained_on = run.record.base.get("fingerprint")
    if trained_on != base.fingerprint:
        raise RecordError(
            f"{str(run.folder)!r} must be inspected on the base model it was trained on ({trained_on!r}), but "
            f"{base.path!r} has {base.fingerprint!r}. Restore that model, or train the run again."
        )
    folder, config = run.folder / WEIGHTS_FOLDER, run.config.method
    # Preparing LoRA as the run did keeps the changes of a fused projection apart. PiSSA's start depends on the
    # machine's arithmetic, so its adapter is taken as it is stored, with twice the rank.
    if not isinstance(config, LoraConfig) or config.init == "pissa":
        return restore_model(run.config, base, folder=folder)
    model, method = copy_sharing_weights(base.model), METHODS[run.method]
    method.prepare(model, config, generator=_init_stream(run), new_head_names=base.head)
    method.load(model, folder)
    return model.eval()


def starting_model(run: FinishedRun, base: BaseModel) -> nn.Module:
    """Returns the base as the run began, with the new head that the run initialised, if it has one."""
    model = copy_sharing_weights(base.model)
    draw_head(model, base.head, generator=_init_stream(run))
    return model.eval()


def _init_stream(run: FinishedRun) -> torch.Generator:
    return torch.Generator().manual_seed(run.config.seeds.init)


def require_same_base(run: FinishedRun, other: FinishedRun) -> None:
    """Raises RecordError unless two runs trained the same base model, so that their directions lie in one space."""
    bases = [one.record.base for one in (run, other)]
    if bases[0].get("fingerprint") != bases[1].get("fingerprint"):
        described = " and ".join(f"{base.get('path')!r} ({base.get('fingerprint')})" for base in bases)
        raise RecordError(
            f"two runs must have one base model in one precision to be compared, but {str(run.folder)!r} and "
            f"{str(other.folder)!r} have {described}. Name two runs of the same base."
        )
