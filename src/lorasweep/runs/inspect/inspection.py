"""What an inspection found, in numbers, in sentences and as the files of `RUN/inspect/`.

Comes after `measure` and `truncation`; `run` and `sweep` make it, `terminal` shows it, the report reads its files.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lorasweep.disk import write_atomically
from lorasweep.errors import RecordError
from lorasweep.runs.inspect.measure import LayerRow, Side, mean_similarity
from lorasweep.runs.inspect.restore_weights import FinishedRun
from lorasweep.runs.inspect.subspaces import Similarity, random_similarity
from lorasweep.runs.inspect.truncation import Truncation

FOLDER = "inspect"
VERSION = 1
LAYERS_FILE, SPECTRA_FILE, TRUNCATION_FILE = "layers.csv", "spectra.json", "truncation.csv"
SIMILARITY_FILE, SUMMARY_FILE = "similarity.csv", "summary.json"
DEFINITIONS = {
    "effective_rank": "exp of the entropy of the singular values over their sum (Roy and Vetterli 2007)",
    "stable_rank": "squared Frobenius norm over squared spectral norm",
    "energy_rank": "smallest number of directions that hold 90 % of the squared Frobenius norm",
    "amplification": "norm of the change over that of U^T W0 V in its first amplification_rank directions "
    "(arXiv 2106.09685, Table 7)",
    "phi": "||U_i^T U_j||_F^2 / min(i, j), of right singular vectors of A (a) or the change (input), "
    "or left ones of the change (output) (arXiv 2106.09685, equation 4)",
    "enough_rank": "smallest rank tried that keeps 99 % of what the whole change gains over none of it",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """The subspaces of a run beside those of another."""

    other: str
    """The other run's folder as it was named."""
    values: Mapping[tuple[str, Side], Similarity]
    """By layer and side."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Inspection:
    """What one run's weights say."""

    run: FinishedRun
    layers: tuple[LayerRow, ...]
    spectra: Mapping[str, Sequence[float]]
    """Singular values of every changed matrix, falling, by layer."""
    truncation: Truncation | None
    comparison: Comparison | None
    sentences: tuple[str, ...]

    @property
    def shares_by_kind(self) -> dict[str, float]:
        """Share of the squared norm by kind of layer, the largest first."""
        return _shares((row.kind, row.norm_share) for row in self.layers)

    @property
    def shares_by_block(self) -> dict[str, float]:
        """Share of the squared norm by index of the block, in order; what is outside the blocks comes last."""
        rows = sorted(self.layers, key=lambda row: math.inf if row.block is None else row.block)
        shares: dict[str, float] = {}
        for row in rows:
            name = "outside" if row.block is None else str(row.block)
            shares[name] = shares.get(name, 0.0) + row.norm_share
        return shares


def write_inspection(inspection: Inspection) -> Path:
    """Writes the files of `RUN/inspect/`, each whole or not at all, the summary last, and returns the folder.

    Files of an earlier inspection that this one has no content for are removed.

    Raises:
        RecordError: The folder can't be written to.
    """
    folder = inspection.run.folder / FOLDER
    contents = {
        LAYERS_FILE: layers_csv(inspection.layers),
        SPECTRA_FILE: json.dumps({"version": VERSION, "singular_values": dict(inspection.spectra)}) + "\n",
        TRUNCATION_FILE: truncation_csv(inspection.truncation),
        SIMILARITY_FILE: similarity_csv(inspection.comparison.values if inspection.comparison else {}),
        SUMMARY_FILE: json.dumps(summary_of(inspection), indent=1) + "\n",
    }
    write_files(folder, contents)
    return folder


def write_files(folder: Path, contents: Mapping[str, str | None]) -> None:
    """Writes files, each whole or not at all, and removes those of which the content is None.

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
    enough = truncation.enough if truncation else None
    return {
        "format": "lorasweep.inspection",
        "version": VERSION,
        "method": inspection.run.method,
        "metric": record.metric,
        "direction": record.direction,
        "score": record.score,
        "base_fingerprint": record.base.get("fingerprint"),
        "other": inspection.comparison.other if inspection.comparison else None,
        "layers": len(inspection.layers),
        "change_norm": math.sqrt(sum(row.change_norm**2 for row in inspection.layers)),
        "relative_norm": relative_norm(inspection.layers),
        "enough_rank": enough.rank if enough else None,
        "shares_by_kind": inspection.shares_by_kind,
        "shares_by_block": inspection.shares_by_block,
        "sentences": list(inspection.sentences),
        "definitions": DEFINITIONS,
    }


def relative_norm(rows: Sequence[LayerRow]) -> float | None:
    """Returns ‖ΔW‖ / ‖W0‖ over all changed weights together."""
    base = math.sqrt(sum(row.base_norm**2 for row in rows))
    return math.sqrt(sum(row.change_norm**2 for row in rows)) / base if base else None


def content_of(inspection: Inspection) -> dict[str, Any]:
    """Returns the summary with every layer and every rank that was scored."""
    truncation = inspection.truncation
    ranks = [] if truncation is None else [asdict(row) for row in truncation.scores]
    return {**summary_of(inspection), "ranks": ranks, "by_layer": [asdict(row) for row in inspection.layers]}


LAYER_HEADER = tuple(field.name for field in fields(LayerRow))


def layers_csv(rows: Sequence[LayerRow]) -> str:
    """Returns one line per changed weight."""
    return write_csv(LAYER_HEADER, (asdict(row).values() for row in rows))


def truncation_csv(truncation: Truncation | None) -> str | None:
    """Returns one line per rank that was scored, or None where none was."""
    if truncation is None:
        return None
    header = ["rank", "score", "loss", "kept_share", "norm_share"]
    rows = ([r.rank, r.score, truncation.loss(r), truncation.kept(r), r.norm_share] for r in truncation.scores)
    return write_csv(header, rows)


SIMILARITY_HEADER = ("layer", "side", "i", "j", "phi", "random")


def similarity_csv(values: Mapping[tuple[str, Side], Similarity]) -> str | None:
    """Returns one line per layer, side, i and j, and lines of layer `mean`; None where there is nothing to compare."""
    return write_csv(SIMILARITY_HEADER, (*mean_rows(values), *layer_rows(values))) if values else None


def mean_rows(values: Mapping[tuple[str, Side], Similarity]) -> Iterator[list[Any]]:
    """Yields the means over layers as lines of `similarity.csv`."""
    for side in dict.fromkeys(side for _, side in values):
        for (i, j), (value, expected) in mean_similarity(values, side).items():
            yield ["mean", side, i, j, value, expected]


def layer_rows(values: Mapping[tuple[str, Side], Similarity]) -> Iterator[list[Any]]:
    """Yields each layer's own similarity as lines of `similarity.csv`."""
    for (layer, side), found in values.items():
        for i, j, value in found.cells():
            yield [layer, side, i, j, value, random_similarity(i, j, found.dimension)]


def write_csv(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """Returns a table as CSV; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _shares(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for name, share in pairs:
        shares[name] = shares.get(name, 0.0) + share
    return dict(sorted(shares.items(), key=lambda item: -item[1]))
