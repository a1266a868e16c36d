"""Scores a trained model whose updates ΔW are reduced to their k largest singular directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorasweep.config.method import LoraConfig
from lorasweep.lora import LoraLayer, lora_layers
from lorasweep.lora.fully_trained import is_inside
from lorasweep.lora.inject import replace_module
from lorasweep.lora.layer_kinds import matrix_shape, matrix_to_weight
from lorasweep.lora.targets import Target
from lorasweep.methods.method import copy_sharing_weights, replace_parameters
from lorasweep.runs.inspect.measures import Decomposition
from lorasweep.runs.inspect.weight_updates import WeightUpdate

KEPT_FRACTION = 0.99
"""A rank is enough if it keeps this fraction of the gain. The gain is how much better the run scores than ΔW = 0."""


@dataclass(frozen=True, kw_only=True)
class RankScore:
    """The score with every update truncated to one rank; a line of `truncation.csv`."""

    rank: int
    score: float
    loss: float
    """How much worse this rank scores than the whole update; negative if it scores better."""
    kept_share: float | None
    """Share of the gain that this rank keeps; None if the whole update gains nothing."""
    norm_share: float
    """Share of the squared norm that this rank keeps, over all truncated updates."""


def find_enough_rank(scores: Sequence[RankScore]) -> RankScore | None:
    """Returns the smallest rank that keeps `KEPT_FRACTION` of the gain; None if there is no gain."""
    return next((row for row in scores if (row.kept_share or 0.0) >= KEPT_FRACTION), None)


def select_truncated(updates: Sequence[WeightUpdate], *, head: Sequence[str] = ()) -> list[WeightUpdate]:
    """Returns the updates of LoRA layers. A model without LoRA layers: updates of matrices outside the new head."""
    lora = [update for update in updates if update.lora_layer is not None]
    return lora or [update for update in updates if update.is_matrix and not is_inside(update.name, head)]


def score_ranks(
    model: nn.Module,
    updates: Sequence[WeightUpdate],
    decompositions: Mapping[str, Decomposition],
    *,
    score: Callable[[nn.Module], float],
    minimize: bool,
) -> tuple[RankScore, ...]:
    """Scores the run at ranks 0, 1, 2, 4, ... and at full rank, then bisects to find the smallest rank that is enough.

    The found rank is exact up to 31 and within a sixteenth above. Bisection assumes that a higher rank is never worse.

    Args:
        model: The trained model; it is not changed.
        updates: The updates to truncate, see `select_truncated`.
        decompositions: The decomposition of each update, by name.
        score: Returns a model's score on the run's validation data.
        minimize: Whether lower scores are better.

    Returns:
        A row for each rank in ascending order; the last row is the whole update. Empty if there is nothing to truncate.
    """
    spectra = [decompositions[update.name].s for update in updates]
    full_rank = max(map(len, spectra), default=0)
    total_norm = sum((s**2).sum().item() for s in spectra)
    if not total_norm:
        return ()
    sign = 1 if minimize else -1

    def score_rank(rank: int) -> float:
        return score(truncate_model(model, updates, decompositions, rank=rank))

    # the full rank is scored with the run's own model, so that its score is the recorded one to the bit
    base_score, full_score = score_rank(0), score(model)
    gain = sign * (base_score - full_score)
    rows: dict[int, RankScore] = {}

    def add(rank: int, value: float) -> None:
        kept_norm = sum((s[:rank] ** 2).sum().item() for s in spectra)
        rows[rank] = RankScore(
            rank=rank,
            score=value,
            loss=sign * (value - full_score) + 0.0,  # + 0.0: never -0
            kept_share=(sign * (base_score - value) + 0.0) / gain if gain > 0 else None,
            norm_share=kept_norm / total_norm,
        )

    add(0, base_score)
    for power in range(full_rank.bit_length()):
        if 2**power < full_rank:
            add(2**power, score_rank(2**power))
    add(full_rank, full_score)
    # bisect between the smallest rank that is enough and the next smaller scored rank
    while (enough := find_enough_rank(_by_rank(rows))) is not None:
        below = max((rank for rank in rows if rank < enough.rank), default=enough.rank)
        if enough.rank - below <= max(1, enough.rank // 16):
            break
        middle = (below + enough.rank) // 2
        add(middle, score_rank(middle))
    return _by_rank(rows)


def _by_rank(rows: Mapping[int, RankScore]) -> tuple[RankScore, ...]:
    return tuple(rows[rank] for rank in sorted(rows))


@torch.no_grad()
def truncate_model(
    model: nn.Module, updates: Sequence[WeightUpdate], decompositions: Mapping[str, Decomposition], *, rank: int
) -> nn.Module:
    """Returns a copy of the trained model with each update replaced by the nearest matrix of at most this rank.

    LoRA layers stay unmerged and weights keep their dtype, so that rounding does not change the scores. The copy shares
    all other tensors.
    """
    copy = copy_sharing_weights(model)
    factors = {update.name: decompositions[update.name].truncated(rank) for update in updates}
    for name, layer in lora_layers(copy).items():
        parts = [(update.first_row, *factors[update.name]) for update in updates if update.lora_layer == name]
        replace_module(copy, layer, _truncated_layer(layer, parts))
    for update in updates:
        if update.weight is not None:
            _truncate_weight(copy, update.weight, update.base, *factors[update.name])
    return copy.eval()


def _truncate_weight(model: nn.Module, name: str, base: Tensor, lora_b: Tensor, lora_a: Tensor) -> None:
    """Replaces a trained weight with W0 + B A in every module that uses it, so that tied weights stay tied."""
    owner, trained = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name)
    weight = matrix_to_weight(owner, base.double() + lora_b @ lora_a)
    truncated = nn.Parameter(weight.reshape(trained.shape).to(trained.dtype), requires_grad=False)
    replace_parameters(model, {id(trained): truncated})


def _truncated_layer(layer: LoraLayer, parts: Sequence[tuple[int, Tensor, Tensor]]) -> nn.Module:
    """Returns a plain LoRA layer on the same base. Each part is a first row, B and A."""
    rank = sum(len(lora_a) for _, _, lora_a in parts)
    if not rank:
        return layer.base
    lora_b, column = parts[0][1].new_zeros(matrix_shape(layer.base)[0], rank), 0
    for first_row, part_b, part_a in parts:
        lora_b[first_row : first_row + len(part_b), column : column + len(part_a)] = part_b
        column += len(part_a)
    config = LoraConfig(rank=rank, alpha=float(rank))  # scaling 1
    target = Target(config=config, rank=rank, alpha=float(rank))
    plain = LoraLayer(layer.base, target, generator=torch.Generator())
    plain.load_plain_matrices(torch.cat([part_a for _, _, part_a in parts]), lora_b)
    return plain
