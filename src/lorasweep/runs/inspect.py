"""Measures the weight updates ΔW of finished runs: `lorasweep inspect RUN [OTHER_RUN]` or `lorasweep inspect SWEEP`.

`weight_updates` reads ΔW from a model, `spectra` measures it, and this file writes and shows the results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lorasweep.config.method import LoraConfig
from lorasweep.config.run import RunConfig
from lorasweep.disk import csv_text, write_atomically
from lorasweep.errors import RecordError
from lorasweep.lora.targets import plan_targets
from lorasweep.methods import METHODS, copy_sharing_weights, draw_head
from lorasweep.models.load import BaseModel
from lorasweep.record import RunRecord, find_winners, get_run_folder, read_run, read_sweep
from lorasweep.runs.spectra import (
    MEAN,
    LayerRow,
    Overlap,
    compare_subspaces,
    decompose,
    measure_layers,
    relative_norm,
    top_directions,
)
from lorasweep.runs.weight_updates import read_weight_updates
from lorasweep.training.restore import check_kept_files, refuse_code, restore_base, restore_config, restore_model
from lorasweep.wording import UNKNOWN, format_share

INSPECT_FOLDER = "inspect"
"""Folder in a run's folder for the measurements."""
DESCRIBED_COUNTS = (1, 4, 16)
"""Numbers of top directions whose φ is in a sentence."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Inspection:
    """Measurements of the weight updates of one run."""

    folder: Path
    record: RunRecord
    layers: tuple[LayerRow, ...]
    spectra: Mapping[str, list[float]]
    """Singular values of every updated matrix by layer, in descending order."""
    directions: Mapping[str, Tensor]
    """Top directions by layer, see `spectra.top_directions`."""
    overlaps: tuple[Overlap, ...] = ()
    """φ between this run and another run."""
    sentences: tuple[str, ...]

    def write(self) -> None:
        """Writes the files of `RUN/inspect/`. Deletes an earlier `similarity.csv` if there are no overlaps."""
        folder = self.folder / INSPECT_FOLDER
        write_atomically(folder / "layers.csv", as_csv({"": self}))
        write_atomically(folder / "spectra.json", json.dumps(self.spectra) + "\n")
        if self.overlaps:
            write_atomically(folder / "similarity.csv", csv_text(Overlap._fields, self.overlaps))
        else:
            (folder / "similarity.csv").unlink(missing_ok=True)


def inspect_run(folder: Path, *, other: Path | None = None, trust: bool = False) -> Inspection:
    """Inspects a run's best weights, writes the measurements into the run's folder `inspect/` and returns them.

    Args:
        folder: A run's folder.
        other: Folder of another run of the same base, whose directions are compared with this run's directions.
        trust: Whether to run code or read a pickle that the run's settings name.

    Raises:
        RecordError: A folder has no run, weights are missing or damaged, nothing was trained, or the bases differ.
        ConfigError: The base model can't be loaded.
    """
    record, config = read_trained_run(folder, trust=trust)
    others = None if other is None else (other, *read_trained_run(other, trust=trust))
    base = restore_base(record, config)
    inspection = measure_run(folder, record, config, base)
    if others is not None:
        overlaps = compare_subspaces(inspection.directions, measure_run(*others, base).directions)
        if not overlaps:
            raise RecordError(
                f"two runs must train a common layer to be compared, but {str(folder)!r} and {str(other)!r} do not. "
                "Name two runs with common `method.targets`."
            )
        sentence = _describe_overlaps(f"`{other}`", overlaps)
        inspection = replace(inspection, overlaps=overlaps, sentences=(*inspection.sentences, sentence))
    inspection.write()
    return inspection


def inspect_sweep(folder: Path, *, trust: bool = False) -> tuple[dict[str, Inspection], list[str]]:
    """Inspects the best run of each arm as `inspect_run` does.

    Returns:
        The inspections by arm, and a sentence for each arm that has no complete trial or can't be inspected.

    Raises:
        RecordError: The folder is not a sweep's, or no arm can be inspected.
        ConfigError: A base model can't be loaded.
    """
    inspections: dict[str, Inspection] = {}
    problems: list[str] = []
    bases: dict[str, BaseModel] = {}
    for arm, winner in find_winners(read_sweep(folder)).items():
        if winner is None:
            problems.append(f"Arm `{arm}` has no complete trial to inspect.")
            continue
        try:
            run = get_run_folder(folder, winner.run)
            record, config = read_trained_run(run, trust=trust)
            key = json.dumps(record.base, sort_keys=True)
            if key not in bases:  # arms on the same base share it
                bases[key] = restore_base(record, config)
            inspections[arm] = measure_run(run, record, config, bases[key])
        except RecordError as error:
            problems.append(f"Arm `{arm}` can't be inspected: {error}")
    if not inspections:
        why = f" ({problems[0]})" if problems else ""
        raise RecordError(f"a sweep must have an arm with a trained winner, but {str(folder)!r} has none{why}.")
    for inspection in inspections.values():
        inspection.write()
    return inspections, problems


def read_trained_run(folder: Path, *, trust: bool = False) -> tuple[RunRecord, RunConfig]:
    """Returns record and settings of a run whose weight files have the recorded checksums.

    Raises:
        RecordError: The folder is not a run's; its record or weights are damaged or missing; or the run trains nothing.
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
    return record, config


def measure_run(folder: Path, record: RunRecord, config: RunConfig, base: BaseModel) -> Inspection:
    """Returns the inspection of a run and writes nothing.

    Raises:
        RecordError: The run was trained on another base, or its weights equal the base's or do not fit it.
    """
    trained_on = record.base.get("fingerprint")
    if trained_on != base.fingerprint:
        raise RecordError(
            f"{str(folder)!r} must be inspected on the base model it was trained on ({trained_on!r}), but "
            f"{base.path!r} has {base.fingerprint!r}. Restore that model, or train the run again."
        )
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
    return Inspection(
        folder=folder,
        record=record,
        layers=layers,
        spectra={name: parts.s.tolist() for name, parts in decompositions.items()},
        directions=top_directions(decompositions),
        sentences=_describe_layers(config.method.name, layers),
    )


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


def as_json(inspections: Mapping[str, Inspection]) -> str:
    """Returns score, sentences and every layer of each inspection, by arm. The arm of a single run is empty."""
    content = {
        arm: {
            "run": str(inspection.folder),
            "metric": inspection.record.metric,
            "score": inspection.record.score,
            "sentences": inspection.sentences,
            "layers": [asdict(row) for row in inspection.layers],
        }
        for arm, inspection in inspections.items()
    }
    return json.dumps(content.get("", content), indent=1) + "\n"


def as_csv(inspections: Mapping[str, Inspection]) -> str:
    """Returns a line for each updated weight. The first column is the arm, unless its name is empty (a single run)."""
    rows: list[dict[str, Any]] = [
        ({"arm": arm} if arm else {}) | asdict(row)
        for arm, inspection in inspections.items()
        for row in inspection.layers
    ]
    return csv_text(list(rows[0]), (row.values() for row in rows))


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


def _describe_overlaps(other: str, overlaps: Sequence[Overlap]) -> str:
    """Returns a sentence on the mean φ over layers of this run's and another run's top directions."""
    means = {row.i: row for row in overlaps if row.layer == MEAN and row.i == row.j}
    shares = [
        f"{means[n].phi:.2f} of the first {f'{n} directions' if n > 1 else 'direction'} (random: {means[n].random:.2f})"
        for n in DESCRIBED_COUNTS
        if n in means
    ]
    return f"This run and {other} share (φ, mean over layers) {', '.join(shares)}."


def _format_median(values: Sequence[float | None], *, digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{median(known):.{digits}f}" if known else UNKNOWN
