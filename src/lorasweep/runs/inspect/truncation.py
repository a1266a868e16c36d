"""What a run would score had its change a smaller rank: each layer's ΔW cut to its k largest directions, and scored.

Comes after `spectrum`; how a model is scored is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorasweep.config.method import LoraConfig
from lorasweep.lora import LoraLayer, lora_layers
from lorasweep.lora.inject import replace_module
from lorasweep.lora.kinds import matrix_shape, matrix_to_weight
from lorasweep.lora.layers import layer_class
from lorasweep.lora.trained import is_inside
from lorasweep.methods import copy_sharing_weights
from lorasweep.runs.inspect.changes import Change
from lorasweep.runs.inspect.spectrum import Decomposition

KEPT_SHARE = 0.99
"""A rank is enough when this share of the gain is kept."""

Score = Callable[[nn.Module], float]


@dataclass(frozen=True, kw_only=True)
class TruncatedScore:
    """The score with every change cut to one rank."""

    rank: int
    """0: nothing is left of the changes that are cut."""
    score: float
    norm_share: float
    """Share of the squared norm that is left."""


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """Scores by rank, the whole change last."""

    scores: tuple[TruncatedScore, ...]
    sign: int
    """1 where lower scores are better, else -1."""

    @property
    def gain(self) -> float:
        """How much better the whole change is than none of it; negative where it is worse."""
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
        """The smallest rank tried that keeps `KEPT_SHARE` of the gain; None where there is no gain."""
        return next((row for row in self.scores if (self.kept(row) or 0.0) >= KEPT_SHARE), None)


def cut_changes(changes: Sequence[Change], *, head: Sequence[str] = ()) -> list[Change]:
    """Returns the changes that a smaller rank cuts: those of LoRA layers, or without any those of all matrices.

    What trained beside them (norms, biases, a new head) is left as it is.

    Args:
        changes: What a run changed.
        head: Modules that the base did not have, which the run drew.
    """
    lora = [change for change in changes if change.place.layer is not None]
    return lora or [change for change in changes if change.is_matrix and not is_inside(change.name, head)]


def score_truncated(
    model: nn.Module,
    changes: Sequence[Change],
    decompositions: Mapping[str, Decomposition],
    *,
    score: Score,
    sign: int,
) -> Truncation | None:
    """Scores the run at rank 0, 1, 2, 4, ... and at the whole, and between two of these to find what is enough.

    What is enough is found exactly up to a rank of 31, to within a sixteenth above.

    The search between them takes it that more rank is not worse, which is so but for noise.

    Args:
        model: The trained model; it is not changed.
        changes: What is to be cut, see `cut_changes`.
        decompositions: By the name of each of them.
        score: Gives a model's score on the data that the run was scored on.
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

    def look(rank: int) -> TruncatedScore:
        if rank not in rows:
            is_cut = rank < whole  # the whole is the run's own model, not one put together again
            value = score(truncated_model(model, changes, decompositions, rank=rank) if is_cut else model)
            left = sum((s[:rank] ** 2).sum().item() for s in spectra)
            rows[rank] = TruncatedScore(rank=rank, score=value, norm_share=left / total)
        return rows[rank]

    for rank in (0, *powers_of_two(whole), whole):
        look(rank)
    _search_enough(look, rows, sign=sign)
    return _truncation(rows, sign=sign)


def powers_of_two(end: int) -> list[int]:
    """Returns 1, 2, 4, ... below `end`."""
    return [2**power for power in range(end.bit_length()) if 2**power < end]


@torch.no_grad()
def truncated_model(
    model: nn.Module, changes: Sequence[Change], decompositions: Mapping[str, Decomposition], *, rank: int
) -> nn.Module:
    """Returns a copy of the trained model in which each of these changes is the nearest of at most this rank.

    LoRA layers stay LoRA layers beside their unrounded base and weights keep the dtype that they ran in, so that the
    score differs from the run's by what was cut and not by how it is stored. The copy shares all other tensors.
    """
    copy = copy_sharing_weights(model)
    cut = {change.name: decompositions[change.name].truncated(rank) for change in changes}
    for name, layer in lora_layers(copy).items():
        own = [change for change in changes if change.place.layer == name]
        replace_module(copy, layer, _truncated_layer(layer, [(c.place.first_row, *cut[c.name]) for c in own]))
    for change in changes:
        if change.place.weight is not None:
            _truncate_weight(copy, change.place.weight, change.base, *cut[change.name])
    return copy.eval()


def _truncate_weight(model: nn.Module, name: str, base: Tensor, lora_b: Tensor, lora_a: Tensor) -> None:
    """Puts W0 + B A in place of a trained weight, wherever it is used, so that tied ones stay tied."""
    owner, trained = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name)
    weight = matrix_to_weight(owner, base.double() + lora_b @ lora_a)
    cut = nn.Parameter(weight.reshape(trained.shape).to(trained.dtype), requires_grad=False)
    for module in model.modules():
        for own, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter is trained:
                setattr(module, own, cut)


def _truncated_layer(layer: LoraLayer, parts: Sequence[tuple[int, Tensor, Tensor]]) -> nn.Module:
    """A plain LoRA layer on the same base; each part is its first row, B and A."""
    rank = sum(len(lora_a) for _, _, lora_a in parts)
    if not rank:
        return layer.base
    lora_b, column = parts[0][1].new_zeros(matrix_shape(layer.base)[0], rank), 0
    for first_row, part_b, part_a in parts:
        lora_b[first_row : first_row + len(part_b), column : column + len(part_a)] = part_b
        column += len(part_a)
    config = LoraConfig(rank=rank, alpha=float(rank))  # scaling 1
    plain = layer_class(layer.base)(layer.base, config, rank=rank, alpha=float(rank), generator=torch.Generator())
    plain.load_matrices(torch.cat([part_a for _, _, part_a in parts]), lora_b)
    return plain


def _search_enough(look: Callable[[int], TruncatedScore], rows: Mapping[int, TruncatedScore], *, sign: int) -> None:
    """Halves the gap between the smallest rank that is enough and the one below it, to a sixteenth of the rank."""
    while (enough := _truncation(rows, sign=sign).enough) is not None:
        below = max((rank for rank in rows if rank < enough.rank), default=enough.rank)
        if enough.rank - below <= max(1, enough.rank // 16):
            return
        look((below + enough.rank) // 2)


def _truncation(rows: Mapping[int, TruncatedScore], *, sign: int) -> Truncation:
    return Truncation(scores=tuple(rows[rank] for rank in sorted(rows)), sign=sign)
