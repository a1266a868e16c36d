"""The layer with a low-rank change, which keeps the layer that it replaces. `inject` puts it in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorasweep.lora.functional import Factor, Rows, conv2d_change, embedding_change, linear_change, lora_linear
from lorasweep.lora.initialise import draw_matrices, split_weight
from lorasweep.lora.layer_kinds import has_custom_forward, matrix_shape, matrix_to_weight, weight_to_matrix
from lorasweep.lora.targets import Target


class AdaptedLayer(nn.Module):
    """A frozen layer of any kind and the way a change is added to its output: for one run, or for a pack of runs.

    Attributes:
        base: The layer that was replaced, its weights untouched and frozen.
        calls_base: Whether the base computes its own output, because its forward is its own (a quantised layer) or it
            has hooks. Hooks that are put on other bases later are not called.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.calls_base = has_custom_forward(base)

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that asks a layer for its dtype or device."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias (d_out,), if it has one."""
        return getattr(self.base, "bias", None)

    def add_change(
        self,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        *,
        factor: Factor,
        keep: Tensor | None = None,
        row_factors: Tensor | None = None,
    ) -> Tensor:
        """Returns the base's output for x plus factor · B A (x · keep), in the output's dtype.

        Args:
            x: (slots · rows, ..., d_in); token ids (slots · rows, ...) for an embedding, images for a convolution.
            lora_a: (slots, rank, d_in).
            lora_b: (slots, d_out, rank).
            factor: See `functional.Factor`.
            keep: Mask of x's shape, False where the change does not see an input.
            row_factors: (d_out,), by which DoRA multiplies the output before the bias.
        """
        base, bias = self.base, self.bias
        y: Tensor
        if isinstance(base, nn.Embedding):
            y = base(x)
            factor = factor * getattr(base, "embed_scale", 1.0)  # the base has scaled its own rows
            y = y + embedding_change(x, lora_a, lora_b, factor=factor).to(y.dtype)
        elif isinstance(base, nn.Conv2d):
            y = base(x) if row_factors is None else base._conv_forward(x, base.weight, None)
            y = y + conv2d_change(x, base, lora_a, lora_b, factor=factor, keep=keep)
        elif self.calls_base:
            y = base(x)
            y = y + linear_change(x.to(y.dtype), lora_a, lora_b, factor=factor, keep=keep)
        else:
            weight = weight_to_matrix(base, self.weight)
            own_bias = bias if row_factors is None else None
            y = lora_linear(x, weight, own_bias, lora_a, lora_b, factor=factor, keep=keep)
        if row_factors is None:
            return y
        per_channel = (-1, 1, 1) if isinstance(base, nn.Conv2d) else (-1,)
        y = y * row_factors.to(y.dtype).view(per_channel)
        return y if bias is None else y + bias.view(per_channel)


class LoraLayer(AdaptedLayer):
    """A frozen layer plus the change scaling · B A of its matrix; `base(x)` exactly while B A is zero.

    With dropout, DoRA scales the base's output for the whole input, where PEFT drops inputs of both.

    Attributes:
        base: The layer that was replaced, its weights untouched and frozen.
        target: How the layer is adapted; `config`, `rank`, `rows` and `scaling` are its parts.
        lora_a: (rank, d_in) in fp32, whatever the base's dtype; with `rows` (parts · rank, d_in).
        lora_b: (d_out, rank) in fp32; with `rows` (sum of their lengths, rank), part after part.
        start_a: A at the start, and
        start_b: B at the start, where those count as part of the base (PiSSA); else None.
        magnitude: (d_out,) in fp32, the length of each row of the adapted matrix (DoRA); else None.
        dropout_generator: Random stream of the dropout masks; torch's own when None.
        unmerged_weight: The base's own weight while the base holds the merged one, else empty (see `merge_lora`).
            In a tuple, because it is neither a parameter nor in the state dict.
    """

    start_a: Tensor | None
    start_b: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        target: Target,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Adapts `base` without changing its values.

        Args:
            base: The layer to adapt.
            target: How to adapt it.
            generator: CPU random stream for A and B; torch's own when None.
            device: Where A and B live, the base's when None. On the meta device nothing is drawn.
        """
        super().__init__(base)
        self.target, self.config = target, target.config
        self.rank, self.rows, self.scaling = target.rank, target.rows, target.scaling
        self.dropout_generator: torch.Generator | None = None
        self.unmerged_weight: tuple[nn.Parameter, ...] = ()
        place = torch.device(device) if device is not None else self.weight.device
        is_drawn = place.type != "meta"
        (d_out, d_in), parts = matrix_shape(base), self._parts()
        self.lora_a = nn.Parameter(torch.empty(len(parts) * self.rank, d_in, device=place))
        self.lora_b = nn.Parameter(torch.empty(sum(past - first for first, past in parts), self.rank, device=place))
        if is_drawn:
            self._draw_start(generator)
        has_start = self.config.init == "pissa"
        self.register_buffer("start_a", self.lora_a.detach().clone() if has_start else None)
        self.register_buffer("start_b", self.lora_b.detach().clone() if has_start else None)
        self.magnitude = None
        if self.config.variant == "dora":
            is_known = is_drawn and not self.weight.is_meta
            lengths = self._row_lengths().float() if is_known else torch.empty(d_out, device=place)
            self.magnitude = nn.Parameter(lengths.to(place))

    @property
    def merged(self) -> bool:
        """Whether the base's weight now contains the change."""
        return bool(self.unmerged_weight)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Returns A (rank', d_in) and B (d_out, rank') of the whole change, as one LoRA of rank'.

        For a plain layer these are the parameters. PiSSA's frozen start is subtracted by another `rank` columns; the
        parts of a fused projection stand in the blocks of a larger B.
        """
        lora_a: Tensor = self.lora_a
        lora_b = self._spread_rows(self.lora_b)
        if self.start_a is None or self.start_b is None:
            return lora_a, lora_b
        return torch.cat([lora_a, self.start_a]), torch.cat([lora_b, -self._spread_rows(self.start_b)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the base's output plus the change's: (..., d_in) to (..., d_out); token ids for an embedding."""
        if self.merged:
            merged: Tensor = self.base(x)
            return merged
        lora_a, lora_b = self.matrices()
        keep = self._draw_keep_mask(x)
        factor = self.scaling if keep is None else self.scaling / (1 - self.config.dropout)
        # DoRA's m / ‖W0 + scaling · B A‖: equation 5 of arXiv 2402.09353, whose columns are rows here
        row_factors = None if self.magnitude is None else self.magnitude / self._row_lengths()
        return self.add_change(x, lora_a[None], lora_b[None], factor=factor, keep=keep, row_factors=row_factors)

    def change(self) -> Tensor:
        """Returns the matrix scaling · B A (d_out, d_in), in fp32 or the base's wider dtype."""
        wide = torch.promote_types(self.weight.dtype, self.lora_a.dtype) if self.weight.is_floating_point() else None
        lora_a, lora_b = (matrix.to(wide) if wide else matrix for matrix in self.matrices())
        return self.scaling * (lora_b @ lora_a)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Returns the weight with which the base computes like this layer: summed in fp32 or wider, rounded once."""
        matrix = self._changed_matrix()
        if self.magnitude is not None:
            matrix *= (self.magnitude / torch.linalg.vector_norm(matrix, dim=1))[:, None]
        return matrix_to_weight(self.base, matrix).to(self.weight.dtype).contiguous()

    @torch.no_grad()
    def load_matrices(self, lora_a: Tensor, lora_b: Tensor) -> None:
        """Sets the parameters so that `matrices` gives these.

        Raises:
            ValueError: B is not zero where this layer has no change, or the frozen start is another one.
        """
        before = self.lora_a.clone(), self.lora_b.clone()
        size = len(self.lora_a)
        self.lora_a.copy_(lora_a[:size])
        self.lora_b.copy_(self.gather_rows(lora_b[:, :size]))
        given = zip(self.matrices(), (lora_a, lora_b), strict=True)
        if not all(torch.allclose(own, value.to(own), equal_nan=True) for own, value in given):
            self.lora_a.copy_(before[0])
            self.lora_b.copy_(before[1])
            raise ValueError("A and B must fit the layer's rows and its start, but they change others. Inject anew.")

    def extra_repr(self) -> str:
        """Returns what `print(model)` shows beside the base."""
        variant = "" if self.config.variant == "lora" else f"variant={self.config.variant}, "
        rows = f"rows={self.rows}, " if self.rows else ""
        return f"{variant}rank={self.rank}, scaling={self.scaling:g}, {rows}merged={self.merged}"

    @torch.no_grad()
    def _draw_start(self, generator: torch.Generator | None) -> None:
        config, drawn = self.config, []
        for first, past in self._parts():
            if config.init == "pissa":
                matrix = weight_to_matrix(self.base, self.weight)[first:past]
                drawn.append(split_weight(matrix, rank=self.rank, scaling=self.scaling))
            else:
                shape = {"d_out": past - first, "d_in": self.lora_a.shape[1], "rank": self.rank}
                is_embedding = isinstance(self.base, nn.Embedding)
                drawn.append(draw_matrices(**shape, init=config.init, is_embedding=is_embedding, generator=generator))
        self.lora_a.copy_(torch.cat([a for a, _ in drawn]))
        self.lora_b.copy_(torch.cat([b for _, b in drawn]))

    def _parts(self) -> Rows:
        return self.rows or ((0, matrix_shape(self.base)[0]),)

    def _spread_rows(self, lora_b: Tensor) -> Tensor:
        """Returns B of a fused projection's parts (sum of lengths, rank) as (d_out, parts · rank), zero elsewhere."""
        if not self.rows:
            return lora_b
        spread, start = lora_b.new_zeros(matrix_shape(self.base)[0], len(self.rows) * self.rank), 0
        for (first, past), columns in self.target.blocks():
            spread[first:past, columns] = lora_b[start : start + past - first]
            start += past - first
        return spread

    def gather_rows(self, lora_b: Tensor) -> Tensor:
        """Returns the parts of a spread B: the inverse of `_spread_rows`."""
        if not self.rows:
            return lora_b
        return torch.cat([lora_b[first:past, columns] for (first, past), columns in self.target.blocks()])

    def _changed_matrix(self) -> Tensor:
        """Returns W0 + scaling · B A (d_out, d_in)."""
        change = self.change()
        return weight_to_matrix(self.base, self.weight).to(change.dtype) + change

    @torch.no_grad()
    def _row_lengths(self) -> Tensor:
        """Returns the length of each changed row (d_out,): a constant to the gradient, as in DoRA's section 4.3."""
        lengths: Tensor = torch.linalg.vector_norm(self._changed_matrix(), dim=1)
        return lengths

    def _draw_keep_mask(self, x: Tensor) -> Tensor | None:
        """Returns a mask that is False with probability `dropout`; None where all is kept, as for token ids."""
        dropout = self.config.dropout
        if not self.training or dropout == 0 or isinstance(self.base, nn.Embedding):
            return None
        mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        return mask.bernoulli_(1 - dropout, generator=self.dropout_generator)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Returns the layers of `model` that have a low-rank change, by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def split_lora_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Returns the A matrices, the B matrices and all else that trains (heads, row lengths, biases), in model order.

    Those of a pack are stacked: their first dimension is the slot. LoRA+ (arXiv 2402.12354, section 4) gives B a
    learning rate `optim.lr_ratio_b` times that of A. In an embedding A starts at zero; it counts as A all the same.
    """
    layers = [module for module in model.modules() if isinstance(module, AdaptedLayer)]
    a: list[nn.Parameter] = [layer.lora_a for layer in layers]  # type: ignore[misc]
    b: list[nn.Parameter] = [layer.lora_b for layer in layers]  # type: ignore[misc]
    taken = {id(parameter) for parameter in (*a, *b)}
    return a, b, [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
