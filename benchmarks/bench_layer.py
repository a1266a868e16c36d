"""One training step of LoRA, written four ways, against the floor: time and saved activations as ratios in one process.

    python benchmarks/bench_layer.py [--quick] [--threads 2] [--repeats 15] [--only bert]

The floor is the frozen model with gradients for activations only (forward and dX): no adapter can cost less. `ours` is
`lorasweep.lora`, `PEFT` is PEFT as it comes, `loralib` the formula of github.com/microsoft/LoRA with A and B in the
base's dtype, `full` is full fine-tuning (in bf16 rows: fp32 weights under autocast). Every way takes one step in turn,
round after round, so that a disturbance hits all; a cell is the median over rounds of the ratio within a round. Every
linear layer is adapted. Saved memory is what the forward pass keeps for the backward pass beside parameters and
buffers, each storage once; with dropout 0 and with dropout 0.1 before A.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import peft
import torch
import transformers
from torch import Tensor, nn

from lorasweep.lora import LoraConfig, inject_lora
from lorasweep.lora.inject import freeze, replace_module
from lorasweep.lora.layer_kinds import is_linear, matrix_shape, weight_to_matrix

WAYS = ("floor", "ours", "peft", "loralib", "full")
RANKS = (4, 8, 64)
TOKENS = ((16, 64), (4, 128))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model with few layers, because all its layers cost the same."""

    name: str
    config: transformers.PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured setting."""

    shape: str
    batch: tuple[int, int]
    dtype: str
    rank: int
    floor_ms: float
    time_ratio: dict[str, float]
    saved_ratio: float
    """Saved bytes of ours over those of PEFT."""
    saved_ratio_dropout: float
    """The same with dropout before A."""


class LoralibLinear(nn.Module):
    """`loralib.Linear.forward`, unmerged: result + (dropout(x) @ Aᵀ @ Bᵀ) * scaling."""

    def __init__(self, base: nn.Module, *, rank: int) -> None:
        super().__init__()
        d_out, d_in = matrix_shape(base)
        self.base, self.scaling = base, 16 / rank
        self.lora_a = nn.Parameter(torch.randn(rank, d_in, dtype=base.weight.dtype) / rank)
        self.lora_b = nn.Parameter(torch.zeros(d_out, rank, dtype=base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the base's output plus the weight update's output."""
        weight = weight_to_matrix(self.base, self.base.weight)
        result = nn.functional.linear(x, weight, self.base.bias)
        result += (x @ self.lora_a.t() @ self.lora_b.t()) * self.scaling
        return result


def make_shapes() -> list[Shape]:
    """BERT-base, MiniLM, GPT-2 and a small Llama's blocks, two of each."""
    bert = {"num_hidden_layers": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    llama = {"num_hidden_layers": 2, "num_attention_heads": 12, "num_key_value_heads": 4}
    gpt2 = transformers.GPT2Config(n_layer=2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    minilm = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
    return [
        Shape(name="BERT-base", config=transformers.BertConfig(**bert)),
        Shape(name="MiniLM", config=transformers.BertConfig(**bert, **minilm)),
        Shape(name="GPT-2", config=gpt2),
        Shape(name="Llama", config=transformers.LlamaConfig(**llama, hidden_size=768, intermediate_size=2048)),
    ]


def prepare(base: nn.Module, way: str, rank: int, *, dropout: float = 0.0) -> nn.Module:
    """A copy of the base model, adapted in one of `WAYS`."""
    model = copy.deepcopy(base)
    if way == "full":
        return model.float()
    freeze(model)
    if way == "ours":
        inject_lora(model, LoraConfig(rank=rank, dropout=dropout))
    elif way == "peft":
        names = [name for name, module in model.named_modules() if is_linear(module)]
        is_gpt2 = model.config.model_type == "gpt2"
        sizes = {"r": rank, "lora_alpha": 16, "lora_dropout": dropout, "fan_in_fan_out": is_gpt2}
        model = peft.get_peft_model(model, peft.LoraConfig(**sizes, target_modules=names)).base_model.model
    elif way == "loralib":
        for layer in [module for module in model.modules() if is_linear(module)]:
            replace_module(model, layer, LoralibLinear(layer, rank=rank))
    return model


def make_step(model: nn.Module, x: Tensor, *, autocast: bool) -> Callable[[], None]:
    """One forward, backward and optimizer step on inputs that need a gradient, as after an earlier layer."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6) if trained else None

    def step() -> None:
        x.grad = None
        forward(model, x, autocast=autocast).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def forward(model: nn.Module, x: Tensor, *, autocast: bool) -> Tensor:
    """A loss over all outputs."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = model(inputs_embeds=x.float() if autocast else x).last_hidden_state
    return output.float().pow(2).mean()


def count_saved_bytes(model: nn.Module, x: Tensor, *, autocast: bool) -> int:
    """Returns the bytes that one forward pass keeps for the backward pass, without parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), x)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(model, x, autocast=autocast)
    del loss
    return sum(saved.values())


def measure(shape: Shape, batch: tuple[int, int], dtype: torch.dtype, rank: int, *, num_rounds: int) -> Row:
    """Times every way in turn, `num_rounds` times."""
    torch.manual_seed(0)
    base = transformers.AutoModel.from_config(shape.config, attn_implementation="eager").to(dtype)
    x = torch.randn(*batch, shape.config.hidden_size, dtype=dtype, requires_grad=True)
    pair = ("ours", "peft")
    saved = {way: count_saved_bytes(prepare(base, way, rank), x, autocast=False) for way in pair}
    dropped = {way: count_saved_bytes(prepare(base, way, rank, dropout=0.1), x, autocast=False) for way in pair}
    steps = {}
    for way in WAYS:
        model, autocast = prepare(base, way, rank).train(), way == "full" and dtype is torch.bfloat16
        steps[way] = make_step(model, x, autocast=autocast)
        steps[way]()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for i in range(num_rounds):
        for way in (
            WAYS[i % len(WAYS) :] + WAYS[: i % len(WAYS)]
        ):  # so that each variant is measured first equally often
            start = time.perf_counter()
            steps[way]()
            times[way].append(time.perf_counter() - start)
    ratios = {
        way: statistics.median(t / floor for t, floor in zip(times[way], times["floor"], strict=True)) for way in WAYS
    }
    return Row(
        shape=shape.name,
        batch=batch,
        dtype={torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype],
        rank=rank,
        floor_ms=1000 * statistics.median(times["floor"]),
        time_ratio=ratios,
        saved_ratio=saved["ours"] / saved["peft"],
        saved_ratio_dropout=dropped["ours"] / dropped["peft"],
    )


def settings(*, quick: bool, only: str) -> Iterator[tuple[Shape, tuple[int, int], torch.dtype, int]]:
    """What to measure."""
    for shape in make_shapes():
        if only.lower() in shape.name.lower() and not (quick and shape.name != "MiniLM"):
            for batch in TOKENS[1:] if quick else TOKENS:
                for dtype in (torch.float32, torch.bfloat16):
                    for rank in (8,) if quick else RANKS:
                        yield shape, batch, dtype, rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="one shape, one rank, few rounds: only checks that it runs"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", default="", help="part of a shape's name")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("Time over the floor, and saved activations of ours over PEFT's without and with dropout.\n")
    print("| shape | tokens | dtype | r | floor ms | ours | PEFT | loralib | full | saved | saved, dropout |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    num_rounds = 3 if arguments.quick else arguments.repeats
    for shape, batch, dtype, rank in settings(quick=arguments.quick, only=arguments.only):
        row = measure(shape, batch, dtype, rank, num_rounds=num_rounds)
        cells = [f"{row.time_ratio[way]:.2f}" for way in WAYS[1:]]
        where = f"{row.shape} | {batch[0]} × {batch[1]} | {row.dtype} | {row.rank} | {row.floor_ms:.1f}"
        print(f"| {where} | {' | '.join(cells)} | {row.saved_ratio:.2f} | {row.saved_ratio_dropout:.2f} |", flush=True)


if __name__ == "__main__":
    main()
