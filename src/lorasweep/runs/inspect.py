"""Measures the weight updates ΔW of a finished run: norms, singular values and rank (`lorasweep inspect RUN`)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from jaxtyping import Float
from rich.box import SIMPLE
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from lorasweep.config.method import LoraConfig
from lorasweep.config.run import refuse_code
from lorasweep.disk import csv_text, require_no_links, write_atomically
from lorasweep.errors import RecordError
from lorasweep.lora.layer_kinds import count_parameters, weight_to_matrix
from lorasweep.lora.targets import find_targets
from lorasweep.methods import METHODS, copy_sharing_weights, draw_head
from lorasweep.record import SWEEP_FILE, get_run_folder, read_run, restore_config
from lorasweep.training.restore import check_kept_files, restore_model, restore_unquantised_base
from lorasweep.wording import UNKNOWN, format_share

INSPECT_FOLDER = "inspect"
"""Folder in a run's folder for the measurements."""
ENERGY_FRACTION = 0.9
"""`energy_rank` is the smallest number of directions that hold this fraction of ‖ΔW‖²_F."""


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """Norms and rank of the update of one weight; a line of `layers.csv`. Biases and normalisation have no rank."""

    layer: str
    d_out: int
    d_in: int | None
    trained_rank: int | None
    """Rank at which LoRA trained the weight; for a fused projection the sum over its parts."""
    update_norm: float
    """‖ΔW‖_F."""
    base_norm: float
    """‖W0‖_F."""
    norm_share: float = 0.0
    """‖ΔW‖²_F divided by its sum over all weights of the run."""
    energy_rank: int | None = None
    amplification: float | None = None
    """‖ΔW‖_F / ‖Uᵀ W0 V‖_F within the first directions of ΔW (LoRA, section 7.3). Their number is the trained rank, or
    `energy_rank` if LoRA did not train the weight. None if W0 is zero there."""

    @property
    def kind(self) -> str:
        """The last component of the name, which is the same in every block: `q_proj` or `q_proj.bias`."""
        names = self.layer.split(".")
        return ".".join(names[-2:] if names[-1] == "bias" else names[-1:])


@dataclass(frozen=True, kw_only=True, eq=False)
class Inspection:
    """Measurements of the weight updates of one run."""

    layers: tuple[LayerRow, ...]
    spectra: Mapping[str, list[float]]
    """Singular values of every updated matrix by layer, in descending order."""
    updated_fraction: float
    """Fraction of the model's parameters that are in updated weights."""


def inspect_run(folder: Path, *, trust: bool = False) -> Inspection:
    """Inspects a run's best weights, writes the measurements into the run's folder `inspect/` and returns them.

    `trust` says whether to run code that the run's settings name.

    Raises:
        RecordError: The folder has no run, its weights or its base are missing or changed, or nothing was trained.
        ConfigError: The base model can't be loaded, or PEFT can't merge the adapter.
    """
    sweep = folder.absolute().parents[1]
    if (sweep / SWEEP_FILE).is_file():
        get_run_folder(sweep, f"runs/{folder.name}")
    require_no_links(folder)
    record = read_run(folder)
    config = restore_config(record)
    refuse_code(config, trust=trust)
    check_kept_files(record, folder, part="best")
    config, base = restore_unquantised_base(record, config)
    method = config.method
    base.model.float()  # merging into bf16 would round the updates
    ranks = {}
    if isinstance(method, LoraConfig):
        try:
            targets = find_targets(base.model, method, allow_full_rank=True).targets
        except ValueError as error:
            raise RecordError(str(error)) from error
        ranks = {name: target.rank for name, target in targets.items()}
    model = restore_model(config, base, folder=folder / "best")
    METHODS[method.name].merge(model)
    # the head as the run drew it before training
    start = copy_sharing_weights(base.model)
    draw_head(start, base.new_head_names, generator=torch.Generator().manual_seed(config.seeds.init))
    layers, spectra = measure_updates(model, start, ranks=ranks)
    if not layers:
        raise RecordError(
            f"a run must have changed its base to be inspected, but the best weights of {str(folder)!r} equal the "
            "base's. Name a run that trained for longer, and not with `method=frozen`."
        )
    rows = [asdict(row) for row in layers]
    write_atomically(folder / INSPECT_FOLDER / "layers.csv", csv_text(list(rows[0]), (row.values() for row in rows)))
    write_atomically(folder / INSPECT_FOLDER / "spectra.json", json.dumps(spectra) + "\n")
    updated = sum(row.d_out * (row.d_in or 1) for row in layers)
    return Inspection(layers=layers, spectra=spectra, updated_fraction=updated / count_parameters(model))


@torch.no_grad()
def measure_updates(
    model: nn.Module, base: nn.Module, *, ranks: Mapping[str, int]
) -> tuple[tuple[LayerRow, ...], dict[str, list[float]]]:
    """Returns a row for each weight that changed, in the model's order, and the singular values of matrices by layer.

    `base` has the new head as the run drew it. `ranks` are those of the layers that LoRA trained.
    """
    originals = dict(base.named_parameters(remove_duplicate=False))
    rows, spectra = [], {}
    for name, weight in model.named_parameters():
        original = originals.get(name)
        if original is None or weight is original or torch.equal(weight, original):
            continue
        layer, change, before = name.removesuffix(".weight"), weight.double() - original.double(), original.double()
        if not math.isfinite(change.norm()):
            raise RecordError(f"the weights of a run must be finite, but {name!r} is not. Train the run again.")
        if change.dim() > 1:
            owner = base.get_submodule(name.rpartition(".")[0])
            change, before = weight_to_matrix(owner, change), weight_to_matrix(owner, before)
        row = LayerRow(
            layer=layer,
            d_out=len(change),
            d_in=change.shape[1] if change.dim() > 1 else None,
            trained_rank=ranks.get(layer),
            update_norm=change.norm().item(),
            base_norm=before.norm().item(),
        )
        if change.dim() > 1:
            u, s, vh = decompose(change, rank=ranks.get(layer))
            held = (s / s[0]).square().cumsum(0)  # divided by the largest value, so that squares do not underflow
            spectra[layer] = s.tolist()
            directions = int((held < ENERGY_FRACTION * held[-1]).sum().item()) + 1
            count = row.trained_rank or directions
            inside = (u[:, :count].t() @ before @ vh[:count].t()).norm().item()
            amplification = s[:count].norm().item() / inside if inside else None
            row = replace(row, energy_rank=directions, amplification=amplification)
        rows.append(row)
    total = sum(row.update_norm**2 for row in rows)
    return tuple(replace(row, norm_share=row.update_norm**2 / total) for row in rows), spectra


def decompose(matrix: Float[Tensor, "d_out d_in"], *, rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns U, the descending singular values and Vᵀ; only the first `rank` of each if the rank is known."""
    if rank is None or 2 * rank >= min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # `svd_lowrank` draws directions; it costs d_out · d_in · rank
        u, s, v = torch.svd_lowrank(matrix, q=rank)
    return u, s, v.t()


def relative_norm(rows: Sequence[LayerRow]) -> float | None:
    """Returns ‖ΔW‖_F / ‖W0‖_F of all these weights together; None if W0 is zero."""
    base = sum(row.base_norm**2 for row in rows) ** 0.5
    return sum(row.update_norm**2 for row in rows) ** 0.5 / base if base else None


def render_inspection(inspection: Inspection) -> RenderableType:
    """Returns a table with a row for each kind of layer."""
    table = Table(title="updates by kind of layer (medians)", title_justify="left", caption_justify="left", box=SIMPLE)
    table.caption = f"These weights hold {format_share(inspection.updated_fraction)} of the model's parameters."
    table.add_column("layers", no_wrap=True)
    for name in ("share of ‖ΔW‖²", "‖ΔW‖ / ‖W0‖", "directions of 90 %", "amplification"):
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
    return table


def _format_median(values: Sequence[float | None], *, digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{median(known):.{digits}f}" if known else UNKNOWN
