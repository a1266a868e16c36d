"""Computes the numbers of the frozen base that an objective needs for each row, once for all runs of a sweep.

They are in memory with the tokens, and in a folder. Other processes and a resumed sweep read them from there.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from lorasweep.config.run import TrainerConfig
from lorasweep.data.batching import EvaluationSampler
from lorasweep.data.rows import Rows, move_batch
from lorasweep.disk import write_atomically
from lorasweep.methods import copy_sharing_weights
from lorasweep.models.load import BaseModel
from lorasweep.objectives.objective import Objective
from lorasweep.tasks.splits import DataSplits
from lorasweep.training.environment import get_device
from lorasweep.training.memory import convert_memory_errors

REFERENCE_FOLDER = "reference"
"""Subfolder of a sweep's folder, or of that of a single run, with a file for each split."""


def add_reference(
    splits: DataSplits, *, base: BaseModel, trainer: TrainerConfig, folder: Path | None, names: Sequence[str]
) -> DataSplits:
    """Returns splits with the reference: those of `names` at once, and the test split at its first use.

    Returns the same object if the objective needs no reference. Without a folder, the numbers are in memory only.
    """
    if splits.has_reference or not splits.objective.needs_reference:
        return splits
    add = functools.partial(_add, objective=splits.objective, base=base, trainer=trainer, folder=folder)
    chosen: dict[str, Any] = {name: add(getattr(splits, name)) for name in names}
    return replace(splits, **chosen, test=functools.cache(lambda: add(splits.test())), has_reference=True)


def _add(split: Rows, *, objective: Objective, base: BaseModel, trainer: TrainerConfig, folder: Path | None) -> Rows:
    # the batch size, because rounding depends on the shape of a batch
    facts = (base.fingerprint, next(base.model.parameters()).dtype, type(objective), trainer.eval_batch_size)
    digest = hashlib.sha256(str(facts).encode())
    for sequences in split.sequences.values():
        for tensor in (sequences.starts, sequences.lengths, sequences.values):
            digest.update(tensor.numpy().tobytes())
    name = f"{split.name}-{digest.hexdigest()[:16]}.safetensors"
    file = None if folder is None else folder / REFERENCE_FOLDER / name
    if file is not None and file.exists():
        return split.fill_reference(load_file(file)["values"])
    values = torch.empty(len(split.sequences["input_ids"]), dtype=torch.float64)
    batches = EvaluationSampler(split, batch_size=trainer.eval_batch_size).batches
    device, model = get_device(trainer), copy_sharing_weights(base.model)
    with convert_memory_errors(), torch.no_grad():
        model.to(device)
        for batch in batches:
            rows = split.list_rows(batch)
            values[rows] = objective.compute_reference(model, move_batch(split.batch(batch), device)).double().cpu()
        model.cpu()  # it shares the base's weights, which must be on the CPU
    if file is not None:
        write_atomically(file, save({"values": values}))
    return split.fill_reference(values)
