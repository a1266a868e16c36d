"""Scores of a trained model with the change of each layer cut to its k largest singular directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorasweep.config.method import LoraConfig
from lorasweep.lora import LoraLayer, lora_layers
from lorasweep.lora.inject import replace_module
from lorasweep.lora.layer_kinds import matrix_shape, matrix_to_weight
from lorasweep.lora.targets import Target
from lorasweep.lora.trained import is_inside
from lorasweep.methods import copy_sharing_weights
from lorasweep.runs.inspect.changes import Change
from lorasweep.runs.inspect.spectrum import Decomposition

KEPT_FRACTION = 0.99
"""A rank is enough if it keeps this fraction of the whole change's gain."""


@dataclass(frozen=True, kw_only=True)
class TruncatedScore:
    """The score with every change cut to one rank."""

    rank: int
    score: float
    norm_share: float
    """Share of the changes' squared norm that is left."""


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """Scores by rank."""

    scores: tuple[TruncatedScore, ...]
    """In ascending order of rank; the first is rank 0, the last the whole change."""
    sign: int
    """1 where lower scores are better, else -1."""

    @property
    def gain(self) -> float:
        """How much better the whole change scores than none of it; negative where it scores worse."""
        return self.sign * (self.scores[0].score - self.scores[-1].score)

    def kept(self, row: TruncatedScore) -> float | None:
        """Returns the share of the gain that a rank keeps; None where there is no gain."""
        gained = self.sign * (self.scores[0].score - row.score) + 0.0  # never -0
        return gained / self.gain if self.gain > 0 else None

    def loss(self, row: TruncatedScore) -> float:
        """Returns how much worse a rank scores than the whole change."""
        return self.sign * (row.score - self.scores[-1].score) + 0.0

    @property
    def enough(self) -> TruncatedScore | None:
        """The smallest rank tried that keeps `KEPT_FRACTION` of the gain; None where there is no gain."""
        return next((row for row in self.scores if (self.kept(row) or 0.0) >= KEPT_FRACTION), None)


def changes_to_cut(changes: Sequence[Change], *, head: Sequence[str] = ()) -> list[Change]:
    """Returns the changes of LoRA layers, or if there are none those of all matrices outside the new head.

    Args:
        changes: The changes of a run.
        head: Names of the modules of the new head, if the run has one.
    """
    lora = [change for change in changes if change.lora_layer is not None]
    return lora or [change for change in changes if change.is_matrix and not is_inside(change.name, head)]


def score_truncated(
    model: nn.Module,
    changes: Sequence[Change],
    decompositions: Mapping[str, Decomposition],
    *,
    score: Callable[[nn.Module], float],
    sign: int,
) -> Truncation | None:
    """Scores the run at rank 0, 1, 2, 4, ..., at the whole, and between two of these to find the rank that is enough.

    That rank is exact up to 31 and within a sixteenth above. Bisection assumes that a higher rank never scores worse.

    Args:
        model: The trained model; it is not changed.
        changes: The changes to cut, see `changes_to_cut`.
        decompositions: The decomposition of each change, by name.
        score: Returns a model's score on the run's validation data.
        sign: 1 where lower scores are better, else -1.

    Returns:
        The scores, or None where there is nothing to cut.
    """
    spectra = [decompositions[change.name].s for change in changes]
    whole = max(map(len, spectra), default=0)
    total = sum((s**2).sum().item() for s in spectra)
    if not total:
        return None
    rows: dict[int, TruncatedScore] = {}

    def add(rank: int) -> Truncation:
        # the whole change is scored with the run's own model, so that the score is the recorded one
        cut = truncated_model(model, changes, decompositions, rank=rank) if rank < whole else model
        left = sum((s[:rank] ** 2).sum().item() for s in spectra)
        rows[rank] = TruncatedScore(rank=rank, score=score(cut), norm_share=left / total)
        return Truncation(scores=tuple(rows[rank] for rank in sorted(rows)), sign=sign)

    powers = [2**power for power in range(whole.bit_length()) if 2**power < whole]
    for rank in (0, *powers, whole):
        truncation = add(rank)
    # bisect between the smallest rank that is enough and the one tried below it, to a sixteenth of that rank
    while (enough := truncation.enough) is not None:
        below = max((rank for rank in rows if rank < enough.rank), default=enough.rank)
        if enough.rank - below <= max(1, enough.rank // 16):
            break
        truncation = add((below + enough.rank) // 2)
    return truncation


@torch.no_grad()
def truncated_model(
    model: nn.Module, changes: Sequence[Change], decompositions: Mapping[str, Decomposition], *, rank: int
) -> nn.Module:
    """Returns a copy of the trained model in which each change is replaced by the nearest one of at most this rank.

    LoRA layers stay LoRA layers beside their unrounded base, and weights keep their dtype, so that scores differ by the
    cut alone and not by rounding. The copy shares all other tensors.
    """
    copy = copy_sharing_weights(model)
    cut = {change.name: decompositions[change.name].truncated(rank) for change in changes}
    for name, layer in lora_layers(copy).items():
        own = [change for change in changes if change.lora_layer == name]
        replace_module(copy, layer, _truncated_layer(layer, [(c.first_row, *cut[c.name]) for c in own]))
    for change in changes:
        if change.weight is not None:
            _truncate_weight(copy, change.weight, change.base, *cut[change.name])
    return copy.eval()


def _truncate_weight(model: nn.Module, name: str, base: Tensor, lora_b: Tensor, lora_a: Tensor) -> None:
    """Replaces a trained weight by W0 + B A in every module that uses it, so that tied weights stay tied."""
    owner, trained = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name)
    weight = matrix_to_weight(owner, base.double() + lora_b @ lora_a)
    cut = nn.Parameter(weight.reshape(trained.shape).to(trained.dtype), requires_grad=False)
    for module in model.modules():
        for own, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter is trained:
                setattr(module, own, cut)


def _truncated_layer(layer: LoraLayer, parts: Sequence[tuple[int, Tensor, Tensor]]) -> nn.Module:
    """Returns a plain LoRA layer on the same base; each part is its first row, B and A."""
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
    plain.load_matrices(torch.cat([part_a for _, _, part_a in parts]), lora_b)
    return plain
