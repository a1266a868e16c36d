"""Measures each weight update ΔW of a finished run: its share of the norm, and how much of its rank it uses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorasweep.config.run import refuse_code
from lorasweep.errors import RecordError
from lorasweep.lora.layer_kinds import weight_to_matrix
from lorasweep.methods import bind, copy_sharing_weights, draw_head
from lorasweep.record import read_run, restore_config
from lorasweep.training.finished_run import check_kept_files, restore_model, restore_unquantised_base

if TYPE_CHECKING:
    import pandas

ENERGY_FRACTION = 0.9
"""`directions` is the smallest number of singular values whose squares sum to this fraction of ‖ΔW‖²_F."""


def inspect_run(folder: str | Path, *, trust: bool = False) -> pandas.DataFrame:
    """Returns a row for each weight that a run changed, measured on the best weights of its folder.

    The columns are `layer`, `rank` (at which LoRA trained it; for a fused projection the sum over its parts),
    `norm_share` (‖ΔW‖²_F over its sum over all weights) and `directions` (the number of singular values that hold 90 %
    of ‖ΔW‖²_F). Biases and normalisation have no `rank` and no `directions`. ΔW is the merged weight minus the base's.

    >>> lorasweep.inspect_run("outputs/tiny/runs/lora-0000").columns.tolist()
    ['layer', 'rank', 'norm_share', 'directions']

    Args:
        folder: The run's folder.
        trust: Whether to run code that the run's settings name.

    Raises:
        RecordError: The folder has no run, its weights or its base are missing or changed, or nothing was trained.
        ConfigError: The base can't be loaded, PEFT can't merge the adapter, or settings name code without `trust`.
    """
    folder = Path(folder)
    record = read_run(folder)
    config = restore_config(record)
    refuse_code(config, trust=trust)
    check_kept_files(record, folder, part="best")
    config, base = restore_unquantised_base(record, config)
    method = bind(config.method)
    base.model.float()  # merging into bf16 would round the updates
    coverage = method.find_coverage(base.model, new_head_names=base.new_head_names)
    ranks = {name: target.rank for name, target in coverage.targets.items()} if coverage else {}
    model = restore_model(config, base, folder=folder / "best")
    method.merge(model)
    # the head as the run drew it before training
    start = copy_sharing_weights(base.model)
    draw_head(start, base.new_head_names, generator=torch.Generator().manual_seed(config.seeds.init))
    found = measure_updates(model, start, ranks=ranks)
    if found.empty:
        raise RecordError(
            f"a run must have changed its base to be inspected, but the best weights of {str(folder)!r} equal the "
            "base's. Name a run that trained for longer, and not with `method=frozen`."
        )
    return found


@torch.no_grad()
def measure_updates(model: nn.Module, base: nn.Module, *, ranks: Mapping[str, int]) -> pandas.DataFrame:
    """Returns a row for each weight that changed, in the model's order.

    `base` has the new head as the run drew it. `ranks` are those of the layers that LoRA trained.
    """
    import pandas  # noqa: PLC0415 (slow to import)

    originals = dict(base.named_parameters(remove_duplicate=False))
    rows = []
    for name, weight in model.named_parameters():
        original = originals.get(name)
        if original is None or weight is original or torch.equal(weight, original):
            continue
        layer, change = name.removesuffix(".weight"), weight.double() - original.double()
        if not math.isfinite(change.norm()):
            raise RecordError(f"the weights of a run must be finite, but {name!r} is not. Train the run again.")
        directions = None
        if change.dim() > 1:
            matrix = weight_to_matrix(base.get_submodule(name.rpartition(".")[0]), change)
            s = compute_singular_values(matrix, rank=ranks.get(layer))
            held = (s / s[0]).square().cumsum(0)  # divided by the largest value, so that squares do not underflow
            directions = int((held < ENERGY_FRACTION * held[-1]).sum().item()) + 1
        rows.append((layer, ranks.get(layer), change.norm().item() ** 2, directions))
    frame = pandas.DataFrame(rows, columns=["layer", "rank", "norm_share", "directions"])
    frame["norm_share"] /= frame["norm_share"].sum()
    return frame.astype({"rank": "Int64", "directions": "Int64"})


def compute_singular_values(matrix: Float[Tensor, "d_out d_in"], *, rank: int | None) -> Tensor:
    """Returns the singular values in descending order; only the first `rank` if the rank is known."""
    if rank is None or 2 * rank >= min(matrix.shape):
        s: Tensor = torch.linalg.svdvals(matrix)
        return s[:rank]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # `svd_lowrank` draws directions; it costs d_out · d_in · rank
        _, s, _ = torch.svd_lowrank(matrix, q=rank)
    return s
