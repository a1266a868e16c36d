"""Measures the weight updates ΔW of a finished run: `lorasweep inspect RUN`.

`weight_updates` reads ΔW from a model and measures it, and this file writes and shows the results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorasweep.config.method import LoraConfig
from lorasweep.disk import csv_text, write_atomically
from lorasweep.errors import RecordError
from lorasweep.lora.targets import plan_targets
from lorasweep.methods import METHODS, copy_sharing_weights, draw_head
from lorasweep.record import read_run
from lorasweep.runs.weight_updates import LayerRow, decompose, measure_layers, read_weight_updates, relative_norm
from lorasweep.training.restore import check_kept_files, refuse_code, restore_base, restore_config, restore_model
from lorasweep.wording import UNKNOWN, format_share

INSPECT_FOLDER = "inspect"
"""Folder in a run's folder for the measurements."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Inspection:
    """Measurements of the weight updates of one run."""

    layers: tuple[LayerRow, ...]
    spectra: Mapping[str, list[float]]
    """Singular values of every updated matrix by layer, in descending order."""
    sentences: tuple[str, ...]


def inspect_run(folder: Path, *, trust: bool = False) -> Inspection:
    """Inspects a run's best weights, writes the measurements into the run's folder `inspect/` and returns them.

    Args:
        folder: A run's folder.
        trust: Whether to run code or read a pickle that the run's settings name.

    Raises:
        RecordError: The folder has no run, its weights or its base are missing or changed, or nothing was trained.
        ConfigError: The base model can't be loaded.
    """
    record = read_run(folder)
    config = restore_config(record)
    refuse_code(config, trust=trust)
    if config.method.name == "frozen":
        raise RecordError(
            f"a run must have trained something to be inspected, but {str(folder)!r} has `method=frozen`. "
            "Name a run of another method."
        )
    check_kept_files(record, folder, part="best")
    base = restore_base(record, config)
    model = restore_model(config, base, folder=folder / "best")
    if config.method.name == "peft":
        METHODS["peft"].merge(model)  # the updates are read from plain weights
    # the head as the run drew it before training
    start = copy_sharing_weights(base.model)
    draw_head(start, base.new_head_names, generator=torch.Generator().manual_seed(config.seeds.init))
    targets = {}
    if isinstance(config.method, LoraConfig):
        targets = plan_targets(base.model, config.method, allow_full_rank=True)[1]
    updates = read_weight_updates(model, start, targets=targets)
    decompositions = {update.name: decompose(update.left, update.right) for update in updates if update.is_matrix}
    layers = measure_layers(updates, decompositions)
    if not any(row.update_norm for row in layers):
        raise RecordError(
            f"a run must have changed its base to be inspected, but the best weights of {str(folder)!r} equal the "
            "base's. Name a run that trained for longer."
        )
    spectra = {name: parts.s.tolist() for name, parts in decompositions.items()}
    rows = [asdict(row) for row in layers]
    write_atomically(folder / INSPECT_FOLDER / "layers.csv", csv_text(list(rows[0]), (row.values() for row in rows)))
    write_atomically(folder / INSPECT_FOLDER / "spectra.json", json.dumps(spectra) + "\n")
    return Inspection(layers=layers, spectra=spectra, sentences=_describe_layers(config.method.name, layers))


def render_inspection(inspection: Inspection) -> RenderableType:
    """Returns a table with a row for each kind of layer, and the sentences."""
    table = Table(title="updates by kind of layer (medians)", title_justify="left")
    table.add_column("layers", no_wrap=True)
    for name in ("share", "of base", "90 % in", "times base"):
        table.add_column(name, justify="right")
    groups: dict[str, list[LayerRow]] = {}
    for row in inspection.layers:
        groups.setdefault(row.kind if row.energy_rank is not None else "norms, biases", []).append(row)
    shares = {name: sum(row.norm_share for row in rows) for name, rows in groups.items()}
    for name in sorted(groups, key=shares.__getitem__, reverse=True):
        rows = groups[name]
        table.add_row(
            Text(f"{len(rows)} {name}"),
            format_share(shares[name]),
            format_share(relative_norm(rows)),
            _format_median([row.energy_rank for row in rows], digits=0),
            _format_median([row.amplification for row in rows], digits=2),
        )
    return Group(table, *(Text(f"• {sentence}") for sentence in inspection.sentences))


def _describe_layers(method: str, rows: Sequence[LayerRow]) -> tuple[str, ...]:
    """Returns sentences on the size of the updates and their rank."""
    ranks = sorted({row.trained_rank for row in rows if row.trained_rank is not None})
    trained = f" at rank {' to '.join(map(str, dict.fromkeys([ranks[0], ranks[-1]])))}" if ranks else ""
    weights = f"{len(rows)} weight{'s' if len(rows) > 1 else ''}"
    sentences = [
        f"`{method}`{trained} changed {weights} of the base by {format_share(relative_norm(rows))} of their norm."
    ]
    if directions := [row.energy_rank for row in rows if row.energy_rank is not None]:
        count = round(median(directions))
        plural = "s" if count > 1 else ""
        sentences.append(f"90 % of the squared norm lies in {count} direction{plural} (median over layers).")
    return tuple(sentences)


def _format_median(values: Sequence[float | None], *, digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{median(known):.{digits}f}" if known else UNKNOWN
