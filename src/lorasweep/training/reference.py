"""Computes the numbers of the frozen base that an objective needs for each row, once for all runs of a sweep.

They are in memory with the tokens, and in a folder, from which other processes and a resumed sweep read them.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lorasweep.activity import doing
from lorasweep.config.run import TrainerConfig
from lorasweep.console import say
from lorasweep.data.batching import EvaluationSampler
from lorasweep.data.split import PreferenceSplit, Split, move_batch
from lorasweep.disk import write_atomically
from lorasweep.errors import describe_error
from lorasweep.methods import copy_sharing_weights
from lorasweep.models.load import BaseModel
from lorasweep.objectives.data_splits import DataSplits
from lorasweep.objectives.objective import Objective
from lorasweep.training.environment import get_device
from lorasweep.training.failures import convert_memory_errors

REFERENCE_FOLDER = "reference"
"""The folder, in that of a sweep or of a run alone, that has a file for each split."""
SAVE_INTERVAL_S = 30.0
"""Seconds between two writes of the file. A killed process loses what it computed since the last write."""


def add_reference(
    splits: DataSplits, *, base: BaseModel, trainer: TrainerConfig, folder: Path | None, names: Sequence[str]
) -> DataSplits:
    """Returns splits with the reference: those of `names` at once, and the test split at its first use.

    The same object if the objective needs no reference. Without a folder, the numbers are in memory only.
    """
    if splits.has_reference or not splits.objective.needs_reference:
        return splits
    add = functools.partial(_add, objective=splits.objective, base=base, trainer=trainer, folder=folder)
    chosen: dict[str, Any] = {name: add(getattr(splits, name)) for name in names}
    return replace(splits, **chosen, test=functools.cache(lambda: add(splits.test())), has_reference=True)


def _add(
    split: Split, *, objective: Objective, base: BaseModel, trainer: TrainerConfig, folder: Path | None
) -> PreferenceSplit:
    assert isinstance(split, PreferenceSplit)
    digest = hashlib.sha256(f"{base.fingerprint} {next(base.model.parameters()).dtype} {type(objective)}".encode())
    for column in (split.completions.tokens, split.completions.targets):
        digest.update(column.ends.numpy().tobytes() + column.values.numpy().tobytes())
    name = f"{split.name}-{digest.hexdigest()[:16]}.safetensors"
    file = None if folder is None else folder / REFERENCE_FOLDER / name
    values = read_reference(file, split)
    if not values.isnan().any():
        return split.fill_reference(values)
    # the same batches in every process, because rounding depends on the shape of a batch
    batches = EvaluationSampler(split, batch_size=trainer.eval_batch_size).batches
    device, model, saved_s = get_device(trainer), copy_sharing_weights(base.model), time.monotonic()
    what = f"scoring {split.name} by the base"
    with convert_memory_errors(), torch.no_grad(), doing(what, unit="example", total=len(split)) as activity:
        model.to(device)
        for batch in batches:
            rows = split.list_rows(batch)
            if values[rows].isnan().any():
                values[rows] = objective.compute_reference(model, move_batch(split.batch(batch), device)).double().cpu()
            activity.advance(len(batch))
            if file is not None and (activity.done == len(split) or time.monotonic() - saved_s > SAVE_INTERVAL_S):
                found = read_reference(file, split)  # another process may compute the same
                values = found.where(~found.isnan(), values)
                write_atomically(file, save({"values": values}, metadata={"name": name}))
                saved_s = time.monotonic()
        model.cpu()  # it shares the base's weights, which must be on the CPU
    return split.fill_reference(values)


def read_reference(file: Path | None, split: PreferenceSplit) -> Tensor:
    """Returns the numbers in a file, with NaN where none is known. A file that is damaged or foreign has none."""
    unknown = torch.full((len(split.completions),), torch.nan, dtype=torch.float64)
    if file is None or not file.exists():
        return unknown
    try:
        with safe_open(file, "pt") as opened:
            values: Tensor = opened.get_tensor("values")
            name = (opened.metadata() or {}).get("name")
        if (values.shape, values.dtype, name) == (unknown.shape, unknown.dtype, file.name) and not (values > 0).any():
            return values
        reason = "it is of other data or another base"
    except Exception as error:  # safetensors raises errors of many classes for a damaged header
        reason = describe_error(error)
    say(f"• {str(file)!r} can't be used ({reason}), so the base scores {split.name} again.", file=sys.stderr)
    return unknown
