"""Layers with a low-rank change, one class per kind: each keeps the layer it replaces. `inject` puts them in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorasweep.config.method import LoraConfig
from lorasweep.lora.functional import Rows, add_change, draw_keep_mask, lora_linear, scaling_factor
from lorasweep.lora.initialise import draw_matrices, split_weight
from lorasweep.lora.kinds import is_conv1d, matrix_shape, matrix_to_weight, weight_to_matrix


class LoraLayer(nn.Module):
    """A frozen layer plus the change scaling · B A of its matrix; `base(x)` exactly while B A is zero.

    Attributes:
        base: The layer that was replaced, its weights untouched and frozen.
        config: What the layer was made from; what it says about the rest of the model is `inject_lora`'s business.
        lora_a: (rank, d_in) in fp32, whatever the base's dtype.
        lora_b: (d_out, rank) in fp32.
        rows: Parts of a fused projection that have a change; then lora_a is (parts · rank, d_in) and lora_b
            (sum of their lengths, rank), part after part.
        start_a: A at the start, and
        start_b: B at the start, where those count as part of the base (PiSSA); else None.
        magnitude: (d_out,) in fp32, the length of each row of the adapted matrix (DoRA); else None.
        rank: Rank of the change.
        alpha: Strength that the scaling was made from.
        scaling: Factor on the change.
        dropout_generator: Random stream of the dropout masks; torch's own when None.
        unmerged_weight: The base's own weight while the base holds the merged one, else empty (see `merge_lora`).
            In a tuple, because it is neither a parameter nor in the state dict.
    """

    stored_names = ("lora_A.weight", "lora_B.weight")  # PEFT's, for `files`
    holds_change = True

    start_a: Tensor | None
    start_b: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        config: LoraConfig,
        *,
        rank: int,
        alpha: float,
        rows: Rows = (),
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Adapts `base` without changing its values.

        Args:
            base: The layer to adapt.
            config: Start, variant, dropout and scaling rule.
            rank: Rank r of this layer's change.
            alpha: Strength α of this layer's change.
            rows: Parts of a fused projection; empty for the whole layer.
            generator: CPU random stream for A and B; torch's own when None.
            device: Where A and B live; the base's when None.
        """
        super().__init__()
        self.base = base
        self.config = config
        self.rank, self.alpha, self.rows = rank, alpha, rows
        self.scaling = scaling_factor(alpha=alpha, rank=rank, rule=config.scaling)
        self.dropout_generator: torch.Generator | None = None
        self.unmerged_weight: tuple[nn.Parameter, ...] = ()
        place = torch.device(device) if device is not None else self.weight.device
        lora_a, lora_b = self._draw_start(generator, place)
        self.lora_a = nn.Parameter(lora_a.to(place))
        self.lora_b = nn.Parameter(lora_b.to(place))
        has_start = config.init == "pissa"
        self.register_buffer("start_a", self.lora_a.detach().clone() if has_start else None)
        self.register_buffer("start_b", self.lora_b.detach().clone() if has_start else None)
        self.magnitude = nn.Parameter(self._draw_magnitude(place)) if config.variant == "dora" else None

    @property
    def merged(self) -> bool:
        """Whether the base's weight now contains the change."""
        return bool(self.unmerged_weight)

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that asks a layer for its dtype or device."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias (d_out,), if it has one."""
        return getattr(self.base, "bias", None)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A (rank', d_in) and B (d_out, rank') of the whole change, as one LoRA of rank'.

        For a plain layer the parameters themselves. PiSSA's frozen start is subtracted by another `rank` columns; the
        parts of a fused projection stand in the blocks of a larger B.
        """
        lora_a: Tensor = self.lora_a
        lora_b = self._spread_rows(self.lora_b) if self.rows else self.lora_b
        if self.start_a is None or self.start_b is None:
            return lora_a, lora_b
        start_b = self._spread_rows(self.start_b) if self.rows else self.start_b
        return torch.cat([lora_a, self.start_a]), torch.cat([lora_b, -start_b], dim=1)

    def change(self) -> Tensor:
        """The matrix scaling · B A (d_out, d_in), in fp32 or the base's wider dtype."""
        wide = torch.promote_types(self.weight.dtype, self.lora_a.dtype) if self.weight.is_floating_point() else None
        lora_a, lora_b = (matrix.to(wide) if wide else matrix for matrix in self.matrices())
        return self.scaling * (lora_b @ lora_a)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight that makes the base compute what this layer does: summed in fp32 or wider, rounded once."""
        change = self.change()
        matrix = weight_to_matrix(self.base, self.weight).to(change.dtype) + change
        if self.magnitude is not None:
            matrix *= (self.magnitude / torch.linalg.vector_norm(matrix, dim=1))[:, None]
        return matrix_to_weight(self.base, matrix).to(self.weight.dtype).contiguous()

    def load_matrices(self, lora_a: Tensor, lora_b: Tensor) -> None:
        """Sets the parameters so that `matrices` gives these.

        Raises:
            ValueError: B is not zero where this layer has no change, or the frozen start is another one.
        """
        size = self.lora_a.shape[0]
        columns = lora_b[:, :size]
        if self.rows:
            columns = torch.cat([columns[first:past, self._of_part(i)] for i, (first, past) in enumerate(self.rows)])
        with torch.no_grad():
            before = self.lora_a.clone(), self.lora_b.clone()
            self.lora_a.copy_(lora_a[:size])
            self.lora_b.copy_(columns)
            if (self.rows or self.start_a is not None) and not self._has_matrices(lora_a, lora_b):
                self.lora_a.copy_(before[0])
                self.lora_b.copy_(before[1])
                raise ValueError(
                    "A and B must fit the layer's rows and its start, but they change others. Inject anew."
                )

    def _has_matrices(self, lora_a: Tensor, lora_b: Tensor) -> bool:
        return all(torch.allclose(a, b.to(a)) for a, b in zip(self.matrices(), (lora_a, lora_b), strict=True))

    def extra_repr(self) -> str:
        """What `print(model)` shows beside the base."""
        variant = "" if self.config.variant == "lora" else f"variant={self.config.variant}, "
        rows = f"rows={self.rows}, " if self.rows else ""
        return f"{variant}rank={self.rank}, scaling={self.scaling:g}, {rows}merged={self.merged}"

    def _draw_start(self, generator: torch.Generator | None, device: torch.device) -> tuple[Tensor, Tensor]:
        d_out, d_in = matrix_shape(self.base)
        is_embedding = isinstance(self.base, nn.Embedding)
        parts = self.rows or ((0, d_out),)
        if device.type == "meta":
            b_rows = sum(past - first for first, past in parts)
            return torch.empty(len(parts) * self.rank, d_in, device=device), torch.empty(
                b_rows, self.rank, device=device
            )
        drawn = []
        for first, past in parts:
            if self.config.init == "pissa":
                matrix = weight_to_matrix(self.base, self.weight)[first:past]
                drawn.append(split_weight(matrix, rank=self.rank, scaling=self.scaling))
            else:
                shape = {"d_out": past - first, "d_in": d_in, "rank": self.rank}
                start = draw_matrices(**shape, init=self.config.init, is_embedding=is_embedding, generator=generator)
                drawn.append(start)
        return torch.cat([a for a, _ in drawn]), torch.cat([b for _, b in drawn])

    def _draw_magnitude(self, device: torch.device) -> Tensor:
        if device.type == "meta":
            return torch.empty(matrix_shape(self.base)[0], device=device)
        return self._row_lengths().to(self.lora_a.dtype)

    def _of_part(self, index: int) -> slice:
        return slice(index * self.rank, (index + 1) * self.rank)

    def _spread_rows(self, lora_b: Tensor) -> Tensor:
        """B of a fused projection's parts (sum of lengths, rank) as (d_out, parts · rank), zero elsewhere."""
        spread, start = lora_b.new_zeros(matrix_shape(self.base)[0], len(self.rows) * self.rank), 0
        for i, (first, past) in enumerate(self.rows):
            spread[first:past, self._of_part(i)] = lora_b[start : start + past - first]
            start += past - first
        return spread

    def _row_lengths(self) -> Tensor:
        """Length of each row of W0 + scaling · B A (d_out,), a constant to the gradient as in DoRA's section 4.3."""
        with torch.no_grad():
            change = self.change()
            matrix = weight_to_matrix(self.base, self.weight).to(change.dtype) + change
            lengths: Tensor = torch.linalg.vector_norm(matrix, dim=1)
            return lengths

    def _row_factors(self, dtype: torch.dtype) -> Tensor:
        """DoRA's m / ‖W0 + scaling · B A‖ (d_out,): equation 5 of arXiv 2402.09353, rows being its columns."""
        assert self.magnitude is not None
        return (self.magnitude / self._row_lengths()).to(dtype)

    def _draw_keep_mask(self, x: Tensor) -> Tensor | None:
        if not self.training or self.config.dropout == 0:
            return None
        return draw_keep_mask(x, dropout=self.config.dropout, generator=self.dropout_generator)


class LoraLinear(LoraLayer):
    """An adapted `nn.Linear` or transformers' `Conv1D`.

    A base whose forward is its own (a quantised layer) or that has hooks computes its output itself and the change is
    added; hooks put on the base later are not called. DoRA scales the base's output for the whole input, also with
    dropout, where PEFT drops inputs of both.
    """

    def __init__(self, base: nn.Module, config: LoraConfig, **kwargs: Any) -> None:
        """See `LoraLayer`."""
        super().__init__(base, config, **kwargs)
        own_forward = type(base).forward is not nn.Linear.forward and not is_conv1d(base)
        hooked = "forward" in vars(base) or base._forward_hooks or base._forward_pre_hooks
        self.calls_base = bool(own_forward or hooked)

    def forward(self, x: Tensor) -> Tensor:
        """The base's output plus the change's: (..., d_in) to (..., d_out)."""
        if self.merged:
            merged: Tensor = self.base(x)
            return merged
        lora_a, lora_b = (self.lora_a, self.lora_b) if self.start_a is None else self.matrices()
        rows = self.rows if self.start_a is None else ()
        keep, dropout = self._draw_keep_mask(x), self.config.dropout
        if self.calls_base:
            y = self.base(x)
            return add_change(y, x, lora_a, lora_b, scaling=self.scaling, keep=keep, dropout=dropout, rows=rows)
        bias = self.bias if self.magnitude is None else None
        weight = weight_to_matrix(self.base, self.weight)
        y = lora_linear(x, weight, bias, lora_a, lora_b, scaling=self.scaling, keep=keep, dropout=dropout, rows=rows)
        return y if self.magnitude is None else self._scale_rows(y)

    def _scale_rows(self, y: Tensor) -> Tensor:
        y = y * self._row_factors(y.dtype)
        return y if self.bias is None else y + self.bias


class LoraEmbedding(LoraLayer):
    """An adapted `nn.Embedding`: a column of A, looked up, times B is added to the row. Dropout has no effect."""

    stored_names = ("lora_embedding_A", "lora_embedding_B")

    def forward(self, tokens: Tensor) -> Tensor:
        """The base's rows plus the change's: (...) of token ids to (..., d_out)."""
        output: Tensor = self.base(tokens)
        if self.merged:
            return output
        lora_a, lora_b = self.matrices()
        looked_up = nn.functional.embedding(tokens, lora_a.t())  # (..., rank)
        scale = self.scaling * getattr(self.base, "embed_scale", 1.0)
        change = (looked_up @ lora_b.t() * scale).to(output.dtype)
        output = output + change
        return output if self.magnitude is None else output * self._row_factors(output.dtype)


class LoraConv2d(LoraLayer):
    """An adapted `nn.Conv2d`: A is a convolution with the base's kernel to `rank` channels, B one of 1 × 1."""

    def forward(self, x: Tensor) -> Tensor:
        """The base's output plus the change's: (batch, channels, height, width)."""
        base = self.base
        assert isinstance(base, nn.Conv2d)
        if self.merged:
            merged: Tensor = base(x)
            return merged
        keep = self._draw_keep_mask(x)
        seen = x if keep is None else x * keep / (1 - self.config.dropout)
        lora_a, lora_b = (matrix.to(x.dtype) for matrix in self.matrices())
        u = base._conv_forward(seen, lora_a.view(-1, *base.weight.shape[1:]), None) * self.scaling
        change = nn.functional.conv2d(u, lora_b[:, :, None, None])
        if self.magnitude is None:
            output: Tensor = base(x) + change
            return output
        y = base._conv_forward(x, base.weight, None) + change
        y = y * self._row_factors(y.dtype)[:, None, None]
        biased: Tensor = y if base.bias is None else y + base.bias[:, None, None]
        return biased


def layer_class(base: nn.Module) -> type[LoraLayer]:
    """Which of the classes above adapts this kind of layer."""
    if isinstance(base, nn.Embedding):
        return LoraEmbedding
    return LoraConv2d if isinstance(base, nn.Conv2d) else LoraLinear


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers of `model` that have a low-rank change, by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
