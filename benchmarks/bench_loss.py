"""The memory that a step of a pack adds, with all logits, with those of scored tokens in chunks, and without a head.

    python benchmarks/bench_loss.py [--shapes smollm2 qwen3] [--ways "in chunks" ...] [--slots 4 ...]
        [--activations kept recomputed] [--dtype bf16] [--scored 0.33] [--steps 3]

Each row is a new process: a model of random weights, one slot for each run, rank 8 in all linear layers but the head,
2 × 256 tokens a slot without padding. `added` is the highest resident memory in the steps (forward, loss, backward)
over that before the first, and `counted` what is counted for it (the gradients, and `count_saved_bytes`). `no head`
sums the hidden states instead of a loss, so it is the floor. `recomputed` is activation checkpointing. `qwen3` has 4 of
the 28 layers of Qwen3-0.6B. Seconds are valid only if nothing else runs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import transformers
from saved_bytes import count_saved_bytes
from torch import Tensor, nn

from lorasweep.data.rows import IGNORED, Batch
from lorasweep.lora import LoraConfig, Slots, inject_packed_lora
from lorasweep.objectives.next_tokens import NextTokens
from lorasweep.objectives.scored_tokens import can_score_by_chunk
from lorasweep.training.environment import DTYPES
from lorasweep.training.prepare import checkpoint_activations, save_block_contexts

ROWS, LENGTH = 2, 256
SHAPES = {
    "smollm2": transformers.LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "qwen3": transformers.Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
}
WAYS = ("all logits", "in chunks", "no head")
MIB = 2**20


def build_pack(shape: str, dtype: torch.dtype, *, slots: int, is_checkpointed: bool) -> tuple[nn.Module, Slots]:
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(SHAPES[shape], dtype=dtype)
    model.config.use_cache = False  # type: ignore[union-attr]
    if not can_score_by_chunk(model):
        raise SystemExit(f"the shape {shape!r} can't score in chunks")
    packed = inject_packed_lora(model, [LoraConfig(rank=8)] * slots)
    if is_checkpointed:
        checkpoint_activations(model, save_block_contexts(packed.masks))
    return model.train(), packed


def build_batch(vocabulary: int, slots: int, scored: float) -> Batch:
    """Returns random tokens. The last part of each row is scored, as an answer after its prompt."""
    ids = torch.randint(vocabulary, (slots * ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1)
    targets[:, : round((1 - scored) * LENGTH)] = IGNORED
    return {"input_ids": ids, "targets": targets}


def measure(arguments: argparse.Namespace) -> str:
    """Returns a row of the table, measured in this process."""
    lists = arguments.shapes, arguments.ways, arguments.slots, arguments.activations
    shape, way, slots, activations = (values[0] for values in lists)
    is_checkpointed = activations == "recomputed"
    model, packed = build_pack(shape, DTYPES[arguments.dtype], slots=slots, is_checkpointed=is_checkpointed)
    batch = build_batch(SHAPES[shape].vocab_size, slots, arguments.scored)
    objective = NextTokens(by_chunk=way == "in chunks")

    def sum_states() -> Tensor:
        states: Tensor = model.get_decoder()(batch["input_ids"]).last_hidden_state  # type: ignore[operator]
        return states.float()

    compute: Callable[[], Tensor] = sum_states
    if way != "no head":
        compute = lambda: objective.losses(model, batch).view(slots, -1).sum(1)  # noqa: E731
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # sets the highest resident memory back to the present (proc(5))
    seconds = []
    for _ in range(arguments.steps):
        started = time.perf_counter()
        compute().sum().backward()
        seconds.append(time.perf_counter() - started)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    added = int(status["VmHWM"].split()[0]) * 1024 - before
    gradients = sum(parameter.nbytes for parameter in packed.weights.parameters())
    counted = gradients + count_saved_bytes(compute, model=model, is_checkpointed=is_checkpointed)
    return (
        f"| {shape} | {way} | {slots} | {activations} | {added / MIB:,.0f} | {counted / MIB:,.0f} | "
        f"{statistics.median(seconds):.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--scored", type=float, default=0.33, help="share of the tokens that are scored")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--slots", nargs="+", type=int, default=[4])
    parser.add_argument("--activations", nargs="+", default=["kept"], choices=["kept", "recomputed"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--here", action="store_true", help="measure one row in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.here:
        print(measure(arguments), flush=True)
        return
    print("| shape | loss | slots | activations | added MiB | counted MiB | s a step |")
    print("|---|---|--:|---|--:|--:|--:|", flush=True)
    rows = itertools.product(arguments.shapes, arguments.ways, arguments.slots, arguments.activations)
    for shape, way, slots, activations in rows:
        own = ["--shapes", shape, "--ways", way, "--slots", str(slots), "--activations", activations, "--here"]
        subprocess.run([sys.executable, __file__, *sys.argv[1:], *own], check=True)


if __name__ == "__main__":
    main()
