"""An inspection of one run and its files in `RUN/inspect/`, which the report reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from lorasweep.disk import csv_text, write_atomically
from lorasweep.errors import RecordError
from lorasweep.runs.inspect.layers import LayerChange, relative_norm, shares_by
from lorasweep.runs.inspect.restore_weights import FinishedRun
from lorasweep.runs.inspect.subspaces import Overlap
from lorasweep.runs.inspect.truncation import Truncation

FOLDER = "inspect"
VERSION = 1
LAYERS_FILE, SPECTRA_FILE, TRUNCATION_FILE = "layers.csv", "spectra.json", "truncation.csv"
SIMILARITY_FILE, SUMMARY_FILE = "similarity.csv", "summary.json"
LAYER_HEADER = tuple(field.name for field in fields(LayerChange))


@dataclass(frozen=True, kw_only=True, eq=False)
class Inspection:
    """Measurements of the changes that one run made to its base."""

    run: FinishedRun
    layers: tuple[LayerChange, ...]
    spectra: Mapping[str, Sequence[float]]
    """Singular values of every changed matrix by layer, in descending order."""
    directions: Mapping[str, Tensor]
    """Top directions by layer, see `subspaces.top_directions`."""
    truncation: Truncation | None
    """Scores of smaller ranks; None where they were not measured."""
    other: str | None = None
    """Folder of the run that it was compared with, as it was named."""
    overlaps: tuple[Overlap, ...] = ()
    """φ between the two runs."""
    sentences: tuple[str, ...]


def write_inspection(inspection: Inspection) -> None:
    """Writes the files of `RUN/inspect/` and removes those of an earlier inspection that have no content now.

    Raises:
        RecordError: The folder can't be written to.
    """
    truncation, overlaps = inspection.truncation, inspection.overlaps
    contents = {
        LAYERS_FILE: layers_csv(inspection.layers),
        SPECTRA_FILE: json.dumps({"version": VERSION, "singular_values": dict(inspection.spectra)}) + "\n",
        TRUNCATION_FILE: _truncation_csv(truncation) if truncation else None,
        SIMILARITY_FILE: csv_text(Overlap._fields, overlaps) if overlaps else None,
        SUMMARY_FILE: json.dumps(summary_of(inspection), indent=1) + "\n",  # last: the report looks for it first
    }
    write_files(inspection.run.folder / FOLDER, contents)


def write_files(folder: Path, contents: Mapping[str, str | None]) -> None:
    """Writes files, each whole or not at all, and removes those whose content is None.

    Raises:
        RecordError: The folder can't be written to.
    """
    try:
        for name, content in contents.items():
            if content is None:
                (folder / name).unlink(missing_ok=True)
            else:
                write_atomically(folder / name, content)
    except OSError as error:
        raise RecordError(
            f"{str(folder)!r} must be a folder that can be written to, but is not: {error.strerror}. Make room for it."
        ) from error


def summary_of(inspection: Inspection) -> dict[str, Any]:
    """Returns the content of `summary.json`."""
    record, truncation = inspection.run.record, inspection.truncation
    return {
        "format": "lorasweep.inspection",
        "version": VERSION,
        "method": inspection.run.method,
        "metric": record.metric,
        "direction": record.direction,
        "score": record.score,
        "base_fingerprint": record.base.get("fingerprint"),
        "other": inspection.other,
        "relative_norm": relative_norm(inspection.layers),
        "enough_rank": truncation.enough.rank if truncation and truncation.enough else None,
        "shares_by_kind": shares_by(inspection.layers, "kind"),
        "shares_by_block": shares_by(inspection.layers, "block"),
        "sentences": list(inspection.sentences),
    }


def content_of(inspection: Inspection) -> dict[str, Any]:
    """Returns the summary with a row for every rank that was scored and every layer."""
    ranks = rank_rows(inspection.truncation) if inspection.truncation else []
    return {**summary_of(inspection), "ranks": ranks, "by_layer": [asdict(row) for row in inspection.layers]}


def rank_rows(truncation: Truncation) -> list[dict[str, Any]]:
    """Returns a row for each rank that was scored."""
    return [
        {
            "rank": row.rank,
            "score": row.score,
            "loss": truncation.loss(row),
            "kept_share": truncation.kept(row),
            "norm_share": row.norm_share,
        }
        for row in truncation.scores
    ]


def _truncation_csv(truncation: Truncation) -> str:
    rows = rank_rows(truncation)
    return csv_text(tuple(rows[0]), (row.values() for row in rows))


def layers_csv(rows: Sequence[LayerChange]) -> str:
    """Returns a line for each changed weight."""
    return csv_text(LAYER_HEADER, (asdict(row).values() for row in rows))
