"""Measures the weight updates of a run, alone or beside another run: `lorasweep inspect RUN [OTHER_RUN]`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lorasweep.config.method import LoraConfig
from lorasweep.config.run import RunConfig
from lorasweep.disk import csv_text, write_atomically
from lorasweep.errors import RecordError
from lorasweep.methods import METHODS, copy_sharing_weights, draw_head
from lorasweep.models.load import BaseModel
from lorasweep.record import RunRecord, read_run
from lorasweep.runs.inspect.measures import (
    LayerRow,
    Overlap,
    compare_subspaces,
    decompose,
    measure_layers,
    top_directions,
)
from lorasweep.runs.inspect.sentences import describe_overlaps, describe_run
from lorasweep.runs.inspect.weight_updates import read_weight_updates
from lorasweep.training.restore import check_kept_files, restore_base, restore_config, restore_model

FOLDER = "inspect"
VERSION = 1
SIMILARITY_FILE, SUMMARY_FILE = "similarity.csv", "summary.json"
WEIGHTS_FOLDER = "best"


@dataclass(frozen=True, kw_only=True, eq=False)
class FinishedRun:
    """A finished run, whose weight files have the recorded checksums. No model is loaded yet."""

    folder: Path
    record: RunRecord
    config: RunConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Inspection:
    """Measurements of the weight updates of one run."""

    run: FinishedRun
    layers: tuple[LayerRow, ...]
    spectra: Mapping[str, list[float]]
    """Singular values of every updated matrix by layer, in descending order."""
    directions: Mapping[str, Tensor]
    """Top directions by layer, see `measures.top_directions`."""
    overlaps: tuple[Overlap, ...] = ()
    """φ between this run and another run."""
    sentences: tuple[str, ...]


def inspect_run(folder: Path, *, other: Path | None = None) -> Inspection:
    """Inspects a run's best weights, writes the measurements into the run's folder `inspect/` and returns them.

    Args:
        folder: A run's folder.
        other: Folder of another run of the same base, whose directions are compared with this run's directions.

    Raises:
        RecordError: A folder has no run, weights are missing or damaged, nothing was trained, or the bases differ.
        ConfigError: The base model can't be loaded.
    """
    run, other_run = read_finished_run(folder), read_finished_run(other) if other else None
    base = restore_base(run.record, run.config)
    inspection = measure_run(run, base)
    if other_run is not None:
        overlaps = compare_subspaces(inspection.directions, measure_run(other_run, base).directions)
        if not overlaps:
            raise RecordError(
                f"two runs must train a common layer to be compared, but {str(folder)!r} and {str(other)!r} do not. "
                "Name two runs with common `method.targets`."
            )
        sentence = describe_overlaps("This run", f"`{other}`", overlaps)
        inspection = replace(inspection, overlaps=overlaps, sentences=(*inspection.sentences, sentence))
    write_inspection(inspection)
    return inspection


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
    return FinishedRun(folder=folder, record=record, config=config)


def restore_trained(run: FinishedRun, base: BaseModel) -> nn.Module:
    """Returns the run's model with its best weights, in evaluation mode. It shares the base's frozen tensors.

    Raises:
        RecordError: The run was trained on another base, or its weights do not fit.
    """
    trained_on = run.record.base.get("fingerprint")
    if trained_on != base.fingerprint:
        raise RecordError(
            f"{str(run.folder)!r} must be inspected on the base model it was trained on ({trained_on!r}), but "
            f"{base.path!r} has {base.fingerprint!r}. Restore that model, or train the run again."
        )
    folder, config = run.folder / WEIGHTS_FOLDER, run.config.method
    if not isinstance(config, LoraConfig) or config.init == "pissa":
        # PiSSA's initial matrices depend on the machine, so its adapter is loaded as stored, twice the rank
        return restore_model(run.config, base, folder=folder)
    # `prepare` as in the run keeps the updates of a fused projection's parts apart
    model, method = copy_sharing_weights(base.model), METHODS[config.name]
    method.prepare(model, config, generator=_init_stream(run), new_head_names=base.new_head_names)
    method.load(model, folder)
    return model.eval()


def build_initial_model(run: FinishedRun, base: BaseModel) -> nn.Module:
    """Returns the base before training, with the new head as the run initialised it, if it has one."""
    model = copy_sharing_weights(base.model)
    draw_head(model, base.new_head_names, generator=_init_stream(run))
    return model.eval()


def _init_stream(run: FinishedRun) -> torch.Generator:
    return torch.Generator().manual_seed(run.config.seeds.init)


def measure_run(run: FinishedRun, base: BaseModel) -> Inspection:
    """Returns the inspection of a run and writes nothing.

    Raises:
        RecordError: The weights equal the base's, do not fit the base, or are damaged.
    """
    model, config = restore_trained(run, base), run.config.method
    if config.name == "peft":
        METHODS["peft"].merge(model)  # the updates are read from plain weights
    updates = read_weight_updates(model, build_initial_model(run, base))
    if getattr(config, "init", None) == "pissa":
        # A stored adapter of PiSSA is [A, A0] and [B, -B0], so it has twice the trained rank.
        updates = [replace(update, rank=update.rank and update.rank // 2) for update in updates]
    decompositions = {update.name: decompose(update.left, update.right) for update in updates if update.is_matrix}
    layers = measure_layers(updates, decompositions)
    if not any(row.update_norm for row in layers):
        raise RecordError(
            f"a run must have changed its base to be inspected, but the best weights of {str(run.folder)!r} equal the "
            "base's. Name a run that trained for longer."
        )

    return Inspection(
        run=run,
        layers=layers,
        spectra={name: parts.s.tolist() for name, parts in decompositions.items()},
        directions=top_directions(decompositions),
        sentences=describe_run(config.name, layers),
    )


def write_inspection(inspection: Inspection) -> None:
    """Writes the files of `RUN/inspect/`. Deletes an earlier `similarity.csv` if this inspection has no overlaps."""
    folder, overlaps = inspection.run.folder / FOLDER, inspection.overlaps
    spectra = {"version": VERSION, "singular_values": dict(inspection.spectra)}
    write_atomically(folder / "layers.csv", table_csv(inspection.layers))
    write_atomically(folder / "spectra.json", json.dumps(spectra) + "\n")
    if overlaps:
        write_atomically(folder / SIMILARITY_FILE, csv_text(Overlap._fields, overlaps))
    else:
        (folder / SIMILARITY_FILE).unlink(missing_ok=True)
    # last: a folder that has it has the other files too
    write_atomically(folder / SUMMARY_FILE, json.dumps(summarize(inspection), indent=1) + "\n")


def table_csv(rows: Sequence[LayerRow]) -> str:
    return csv_text(list(asdict(rows[0])), map(astuple, rows))


def summarize(inspection: Inspection) -> dict[str, object]:
    """Returns the content of `summary.json`."""
    record = inspection.run.record
    return {
        "format": "lorasweep.inspection",
        "version": VERSION,
        "method": inspection.run.config.method.name,
        "metric": record.metric,
        "direction": record.direction,
        "score": record.score,
        "base_fingerprint": record.base.get("fingerprint"),
        "sentences": list(inspection.sentences),
    }
