"""The LoRA layer: a frozen layer and its low-rank weight update ΔW = scaling · B A."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from lorasweep.lora.functional import Factor, Rows, conv2d_update, embedding_update, linear_update, lora_linear
from lorasweep.lora.initialise import draw_matrices, split_weight
from lorasweep.lora.layer_kinds import has_custom_forward, matrix_shape, matrix_to_weight, weight_to_matrix
from lorasweep.lora.targets import Target


class AdaptedLayer(nn.Module):
    """A frozen layer of any kind, to whose output a weight update's output is added: one update per slot of a pack.

    Attributes:
        base: The frozen layer that was replaced.
        calls_base: Whether the base computes its output itself, because it has hooks or a custom forward (a quantised
            layer). Hooks that other bases get later are not called.
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
    def bias(self) -> Float[Tensor, " d_out"] | None:
        return getattr(self.base, "bias", None)

    def add_update(
        self,
        x: Shaped[Tensor, "rows ..."],
        lora_a: Float[Tensor, "slots rank d_in"],
        lora_b: Float[Tensor, "slots d_out rank"],
        *,
        factor: Factor,
        keep: Bool[Tensor, "rows ..."] | None = None,
    ) -> Float[Tensor, "rows ..."]:
        """Returns the base's output for x plus factor · B A (x · keep), in the output's dtype.

        x has token ids (rows, ...) for an embedding, images (rows, d_in, height, width) for a convolution, else
        (rows, ..., d_in). `keep` is False for each input that A does not see.
        """
        base = self.base
        y: Tensor
        if isinstance(base, nn.Embedding):
            factor = factor * getattr(base, "embed_scale", 1.0)  # the base has scaled its own rows
            y = base(x)
            return y + embedding_update(x, lora_a, lora_b, factor=factor).to(y.dtype)
        if isinstance(base, nn.Conv2d):
            y = base(x)
            return y + conv2d_update(x, base, lora_a, lora_b, factor=factor, keep=keep)
        if self.calls_base:
            y = base(x)
            return y + linear_update(x.to(y.dtype), lora_a, lora_b, factor=factor, keep=keep)
        weight = weight_to_matrix(base, self.weight)
        return lora_linear(x, weight, self.bias, lora_a, lora_b, factor=factor, keep=keep)


class LoraLayer(AdaptedLayer):
    """A frozen layer and its weight update scaling · B A. It equals the frozen layer exactly while B A is zero.

    With dropout, DoRA scales the base's output for the whole input, where PEFT drops inputs of both.

    Attributes:
        base: The frozen layer that was replaced.
        target: How the layer is adapted; `config`, `rank`, `rows` and `scaling` are parts of it.
        lora_a: (rank, d_in) in fp32, whatever the base's dtype; with `rows` (parts · rank, d_in).
        lora_b: (d_out, rank) in fp32; with `rows` (sum of the lengths of the parts, rank), part after part.
        start_a: Copy of the first A if the first update counts as part of the base (PiSSA), else None.
        start_b: Copy of the first B, like `start_a`.
        magnitude: (d_out,) in fp32, the length of each row of the adapted matrix (DoRA); else None.
        dropout_generator: Random stream of the dropout masks; torch's own if None.
        unmerged_weight: The original weight while the base holds the merged one, else empty (see `merge_lora`). In a
            tuple, so that it is neither a parameter nor in the state dict.
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
        """Draws A and B from the CPU stream `generator` on `device` (the base's if None); draws nothing on `meta`."""
        super().__init__(base)
        self.target, self.config = target, target.config
        self.rank, self.rows, self.scaling = target.rank, target.rows, target.scaling
        self.dropout_generator: torch.Generator | None = None
        self.unmerged_weight: tuple[nn.Parameter, ...] = ()
        device = self.weight.device if device is None else torch.device(device)
        is_drawn = device.type != "meta"
        (d_out, d_in), parts = matrix_shape(base), self._parts()
        self.lora_a = nn.Parameter(torch.empty(len(parts) * self.rank, d_in, device=device))
        self.lora_b = nn.Parameter(torch.empty(sum(past - first for first, past in parts), self.rank, device=device))
        if is_drawn:
            self._draw(generator)
        has_start = self.config.init == "pissa"
        self.register_buffer("start_a", self.lora_a.detach().clone() if has_start else None)
        self.register_buffer("start_b", self.lora_b.detach().clone() if has_start else None)
        self.magnitude = None
        if self.config.variant == "dora":
            # lengths of the rows of a base on the meta device are not known yet
            is_known = is_drawn and not self.weight.is_meta
            lengths = self._row_lengths().float() if is_known else torch.empty(d_out, device=device)
            self.magnitude = nn.Parameter(lengths.to(device))

    @property
    def merged(self) -> bool:
        """Whether the base's weight now contains the update."""
        return bool(self.unmerged_weight)

    def matrices(self) -> tuple[Float[Tensor, "width d_in"], Float[Tensor, "d_out width"]]:
        """Returns A and B of one plain LoRA with the same update.

        For a plain layer these are the parameters, and the width is the rank. PiSSA needs `rank` more columns, which
        subtract its first update; the parts of a fused projection become blocks of a larger B.
        """
        return self._to_plain(self.lora_a, self.lora_b)

    def forward(self, x: Shaped[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
        if self.merged:
            merged: Tensor = self.base(x)
            return merged
        lora_a, lora_b = self.matrices()
        keep = self._draw_keep_mask(x)
        factor = self.scaling if keep is None else self.scaling / (1 - self.config.dropout)
        y = self.add_update(x, lora_a[None], lora_b[None], factor=factor, keep=keep)
        if self.magnitude is None:
            return y
        # DoRA's m / ‖W0 + scaling · B A‖: equation 5 of arXiv 2402.09353, whose columns are rows here
        shape = (-1, 1, 1) if isinstance(self.base, nn.Conv2d) else (-1,)
        row_factors = (self.magnitude / self._row_lengths()).to(y.dtype).view(shape)
        # y contains the bias, which DoRA does not scale
        return y * row_factors if self.bias is None else y * row_factors + self.bias.view(shape) * (1 - row_factors)

    def weight_update(self) -> Float[Tensor, "d_out d_in"]:
        """Returns ΔW = scaling · B A, in fp32 or the base's wider dtype."""
        lora_a, lora_b = self.matrices()
        if self.weight.is_floating_point():
            dtype = torch.promote_types(self.weight.dtype, self.lora_a.dtype)
            lora_a, lora_b = lora_a.to(dtype), lora_b.to(dtype)
        return self.scaling * (lora_b @ lora_a)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Returns the weight with which the base computes like this layer: summed in fp32 or wider, rounded once."""
        matrix = self._updated_matrix()
        if self.magnitude is not None:
            matrix *= (self.magnitude / torch.linalg.vector_norm(matrix, dim=1))[:, None]
        return matrix_to_weight(self.base, matrix).to(self.weight.dtype).contiguous()

    @torch.no_grad()
    def load_matrices(self, lora_a: Float[Tensor, "width d_in"], lora_b: Float[Tensor, "d_out width"]) -> None:
        """Sets the parameters so that `matrices` returns these.

        Raises:
            ValueError: This layer has no update in a row where B is not zero, or starts from another PiSSA update. The
                layer is then unchanged.
        """
        new_a = lora_a[: len(self.lora_a)].to(self.lora_a)
        new_b = self.gather_rows(lora_b[:, : len(self.lora_a)]).to(self.lora_b)
        pairs = zip(self._to_plain(new_a, new_b), (lora_a, lora_b), strict=True)
        if not all(torch.allclose(plain, value.to(plain), equal_nan=True) for plain, value in pairs):
            raise ValueError("A and B must fit the layer's rows and its first update, but they do not. Inject anew.")
        self.lora_a.copy_(new_a)
        self.lora_b.copy_(new_b)

    def extra_repr(self) -> str:
        variant = "" if self.config.variant == "lora" else f"variant={self.config.variant}, "
        rows = f"rows={self.rows}, " if self.rows else ""
        return f"{variant}rank={self.rank}, scaling={self.scaling:g}, {rows}merged={self.merged}"

    @torch.no_grad()
    def _draw(self, generator: torch.Generator | None) -> None:
        shape: dict[str, Any] = {"rank": self.rank, "d_in": self.lora_a.shape[1], "init": self.config.init}
        drawn = []
        for first, past in self._parts():
            if self.config.init == "pissa":
                matrix = weight_to_matrix(self.base, self.weight)[first:past]
                drawn.append(split_weight(matrix, rank=self.rank, scaling=self.scaling))
            else:
                is_embedding = isinstance(self.base, nn.Embedding)
                drawn.append(draw_matrices(**shape, d_out=past - first, is_embedding=is_embedding, generator=generator))
        self.lora_a.copy_(torch.cat([a for a, _ in drawn]))
        self.lora_b.copy_(torch.cat([b for _, b in drawn]))

    def _parts(self) -> Rows:
        return self.rows or ((0, matrix_shape(self.base)[0]),)

    def _to_plain(self, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        """Returns A and B of one plain LoRA whose update equals that of the parameters `lora_a` and `lora_b`."""
        if self.start_a is None or self.start_b is None:
            return lora_a, self._spread_rows(lora_b)
        plain_b = torch.cat([self._spread_rows(lora_b), -self._spread_rows(self.start_b)], dim=1)
        return torch.cat([lora_a, self.start_a]), plain_b

    def _spread_rows(self, lora_b: Float[Tensor, "lengths rank"]) -> Float[Tensor, "d_out width"]:
        """Returns B of a fused projection with each part in its own rows and columns, and zeros elsewhere."""
        if not self.rows:
            return lora_b
        spread, start = lora_b.new_zeros(matrix_shape(self.base)[0], self.target.width), 0
        for (first, past), columns in self.target.blocks():
            spread[first:past, columns] = lora_b[start : start + past - first]
            start += past - first
        return spread

    def gather_rows(self, lora_b: Float[Tensor, "d_out width"]) -> Float[Tensor, "lengths rank"]:
        """Returns the parts of a spread B: the inverse of `_spread_rows`."""
        if not self.rows:
            return lora_b
        return torch.cat([lora_b[first:past, columns] for (first, past), columns in self.target.blocks()])

    def _updated_matrix(self) -> Float[Tensor, "d_out d_in"]:
        """Returns W0 + scaling · B A."""
        update = self.weight_update()
        return weight_to_matrix(self.base, self.weight).to(update.dtype) + update

    @torch.no_grad()  # a constant to the gradient, as in DoRA's section 4.3
    def _row_lengths(self) -> Float[Tensor, " d_out"]:
        lengths: Tensor = torch.linalg.vector_norm(self._updated_matrix(), dim=1)
        return lengths

    def _draw_keep_mask(self, x: Tensor) -> Bool[Tensor, "*shape"] | None:
        """Returns a mask that is False with probability `dropout`; None if all is kept, as for token ids."""
        dropout = self.config.dropout
        if not self.training or dropout == 0 or isinstance(self.base, nn.Embedding):
            return None
        mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        return mask.bernoulli_(1 - dropout, generator=self.dropout_generator)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Returns the LoRA layers of `model`, by name, in the model's order."""
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
