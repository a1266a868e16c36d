"""One training step of LoRA beside PEFT's, over the floor: time and saved activations as ratios in one process.

    python benchmarks/bench_layer.py [--quick] [--threads 2] [--repeats 15] [--only bert]

The floor is the frozen model with gradients for activations only (forward and dX): no adapter can cost less. `ours` is
`lorasweep.lora`, `PEFT` is PEFT as it comes. Every way takes one step in turn, round after round, so that a disturbance
hits all; a cell is the median over rounds of the ratio within a round. Every linear layer is adapted. Saved memory is
what the forward pass keeps for the backward pass beside parameters and buffers, with dropout 0 and with dropout 0.1
before A.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import peft
import torch
import transformers
from machine import measure_machine
from saved_bytes import count_saved_bytes
from side_by_side import compute_ratios, print_head, print_row, time_in_turn
from torch import Tensor, nn

from lorasweep.lora import LoraConfig, inject_lora
from lorasweep.lora.inject import freeze
from lorasweep.lora.layer_kinds import is_linear
from lorasweep.training.environment import DTYPES

WAYS = ("floor", "ours", "PEFT")
RANKS = (4, 8, 64)
TOKENS = ((16, 64), (4, 128))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model with few layers, because all its layers cost the same."""

    name: str
    config: transformers.PretrainedConfig


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
    freeze(model)
    if way == "ours":
        inject_lora(model, LoraConfig(rank=rank, dropout=dropout))
    elif way == "PEFT":
        names = [name for name, module in model.named_modules() if is_linear(module)]
        is_gpt2 = model.config.model_type == "gpt2"
        sizes = {"r": rank, "lora_alpha": 16, "lora_dropout": dropout, "fan_in_fan_out": is_gpt2}
        model = peft.get_peft_model(model, peft.LoraConfig(**sizes, target_modules=names)).base_model.model
    return model.train()


def make_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """One forward, backward and optimizer step on inputs that need a gradient, as after an earlier layer."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6) if trained else None

    def step() -> None:
        x.grad = None
        compute_loss(model, x).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def compute_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(inputs_embeds=x).last_hidden_state.float().pow(2).mean()


def measure(shape: Shape, batch: tuple[int, int], dtype: str, rank: int, *, rounds: int) -> None:
    """Times every way in turn and prints a row."""
    torch.manual_seed(0)
    base = transformers.AutoModel.from_config(shape.config, attn_implementation="eager").to(DTYPES[dtype])
    x = torch.randn(*batch, shape.config.hidden_size, dtype=DTYPES[dtype], requires_grad=True)
    saved = []
    for dropout in (0.0, 0.1):
        ours, theirs = (prepare(base, way, rank, dropout=dropout) for way in ("ours", "PEFT"))
        own, their = (
            count_saved_bytes(functools.partial(compute_loss, model, x), model=model) for model in (ours, theirs)
        )
        saved.append(own / their)
    times = time_in_turn({way: make_step(prepare(base, way, rank), x) for way in WAYS}, rounds=rounds)
    ratios = compute_ratios(times, over="floor")
    floor_ms = 1000 * statistics.median(times["floor"])
    print_row(shape.name, f"{batch[0]} × {batch[1]}", dtype, rank, floor_ms, ratios["ours"], ratios["PEFT"], *saved)


def list_settings(*, quick: bool, only: str) -> Iterator[tuple[Shape, tuple[int, int], str, int]]:
    """Yields what to measure."""
    shapes = [shape for shape in make_shapes() if shape.name == "MiniLM" or not quick]
    shapes = [shape for shape in shapes if only.lower() in shape.name.lower()]
    batches, ranks = (TOKENS[1:], (8,)) if quick else (TOKENS, RANKS)
    return itertools.product(shapes, batches, ("fp32", "bf16"), ranks)


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
    print(f"{measure_machine()}\n")
    print("Time over the floor, and saved activations of ours over PEFT's without and with dropout.\n")
    print_head("shape", "tokens", "dtype", "r", "floor ms", "ours", "PEFT", "saved", "saved, dropout")
    for setting in list_settings(quick=arguments.quick, only=arguments.only):
        measure(*setting, rounds=3 if arguments.quick else arguments.repeats)


if __name__ == "__main__":
    main()
