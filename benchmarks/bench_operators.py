"""Operators of a training step: what a GPU would have to launch. Exact, so one run on any machine is enough.

    python benchmarks/bench_operators.py [--model tiny|minilm|smollm2 ...]

A pack trains by the code of a sweep (`train_runs`), and the operators of its second step are counted by phase.
`ranks` are equal (8 in each slot) or mixed (1, 1, 4, 4, 16, 16, 64, 64, and so on), on every linear layer. PEFT's step
is forward pass, loss, backward pass, clipping and fused AdamW of one trial on the same model.

Counted is each call that torch dispatches. Views, allocations and marks of the profiler are left out, because they
start no kernel. A call for a list of tensors counts once if CUDA can compute the list at once (equal dtypes, and equal
strides in each pair), else once for each tensor.

`tiny` is the embedded model; `minilm` and `smollm2` have the shapes of MiniLM-L6 (a classifier of sentences of
different lengths) and SmolLM2-135M with random weights. Batches are small: their size does not change the number,
unless the loss is computed in several chunks. The number depends on the versions of torch and transformers.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from peft import LoraConfig, get_peft_model
from side_by_side import print_head, print_row
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from lorasweep.config.compose import compose_run
from lorasweep.config.run import RunConfig
from lorasweep.data.batching import BatchDataset
from lorasweep.data.rows import Batch, select_model_inputs
from lorasweep.models import tiny
from lorasweep.training import module
from lorasweep.training.inputs import load_inputs
from lorasweep.training.module import TrainingModule
from lorasweep.training.open_run import RunFolder, RunRequest
from lorasweep.training.optim import SlotOptimizers
from lorasweep.training.run import train_runs
from lorasweep.training.run_inputs import RunInputs

MODELS = ("tiny", "minilm", "smollm2")
MIXED = (1, 1, 4, 4, 16, 16, 64, 64)
ROWS = 2
NO_KERNEL = {
    *("_unsafe_view", "lift_fresh", "is_same_size", "promote_types"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("_record_function_enter_new", "_record_function_exit"),
}
PHASES: Mapping[str, Sequence[tuple[Any, str]]] = {
    "batch": [(BatchDataset, "__getitem__")],
    "forward": [(module, "compute_losses")],
    "backward": [(Tensor, "backward")],
    "optimizer": [(TrainingModule, "configure_gradient_clipping"), (SlotOptimizers, "step")],
}
"""The functions that compute each phase. The other operators are the `rest`: moving the batch, losses, logs."""
NAMES = ("batch", "forward", "backward", "optimizer", "rest")


class OperatorCount(TorchDispatchMode):
    """Counts the operators inside the block by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "rest"
        self.by_phase: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NO_KERNEL:
            self.by_phase[self.phase] += count_kernels(args) if name.startswith("_foreach_") else 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def count_as(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before


def count_kernels(args: Sequence[Any]) -> int:
    """Returns the number of kernels that CUDA starts for the lists of tensors of an operator `_foreach_*`."""
    lists = [each for each in args if isinstance(each, (list, tuple)) and isinstance(each[0], Tensor)]
    have_one_dtype = all(len({tensor.dtype for tensor in each}) == 1 for each in lists)
    have_equal_strides = all(len({tensor.stride() for tensor in pair}) == 1 for pair in zip(*lists, strict=True))
    return 1 if have_one_dtype and have_equal_strides else len(lists[0])


def count_pack_step(
    ranks: Sequence[int], inputs: RunInputs, settings: Mapping[str, Any], *, rows: int = ROWS
) -> Counter[str]:
    """Returns the operators of a pack's second step by phase."""
    counts: list[OperatorCount] = []
    advance = _TrainingEpochLoop.advance

    def count_step(*args: Any) -> None:
        counts.append(OperatorCount())
        with counts[-1]:
            advance(*args)

    def in_phase(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with counts[-1].count_as(name) if counts else nullcontext():
                return function(*args, **kwargs)

        return call

    with ExitStack() as context:
        folder = Path(context.enter_context(tempfile.TemporaryDirectory()))
        context.enter_context(patch.object(_TrainingEpochLoop, "advance", count_step))
        for name, functions in PHASES.items():
            for owner, function in functions:
                context.enter_context(patch.object(owner, function, in_phase(name, getattr(owner, function))))
        requests = [
            RunRequest(
                config=build_config(settings, rank=rank, rows=rows), run_folder=RunFolder(path=folder / str(slot))
            )
            for slot, rank in enumerate(ranks)
        ]
        train_runs(
            requests,
            inputs=inputs,
            on_evaluation=lambda evaluations: [None] * len(evaluations),
            on_end=lambda request, outcome: None,
            checkpoint_file=folder / "pack.ckpt",
            stop_requested=lambda: len(counts) == 3,  # saves a checkpoint in the third step
        )
    return counts[1].by_phase


def count_peft_step(inputs: RunInputs, batch: Batch, *, dtype: torch.dtype, dropout: float, autocasts: bool) -> int:
    """Returns the operators of PEFT's second step."""
    base = copy.deepcopy(inputs.base.model).to(dtype)
    layers = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in layers if name not in ("lm_head", "classifier")]
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=targets)
    model = get_peft_model(base, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    for _ in range(2):
        with OperatorCount() as count:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
                loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad()
    return count.by_phase.total()


def build_config(settings: Mapping[str, Any], *, rank: int = 8, rows: int = ROWS) -> RunConfig:
    steps = {"trainer.max_steps": 4, "trainer.eval_every_steps": 4, "trainer.batch_size": rows}
    steps |= {"trainer.precision": "bf16"}  # whatever this processor is fast in
    plain = {"method": "lora", "optim.lr": 1e-3, "logger": "none", "trainer.progress": False}
    return compose_run({**plain, **steps, **settings, "method.rank": rank})


def write_model(name: str, folder: Path) -> dict[str, Any]:
    """Writes a model with random weights and a tokenizer of bytes, if needed, and returns the settings of its runs."""
    if name == "tiny":
        return {"model": "tiny", "model.attention": "sdpa", "data": "stdlib_docs", "data.block_length": 32}
    AutoTokenizer.from_pretrained(Path(tiny.__file__).parent).save_pretrained(folder)
    if name == "smollm2":
        sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "tie_word_embeddings": True}
        heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
        LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
        data: dict[str, Any] = {"data": "stdlib_docs", "data.block_length": 32}
        return {"model": "causal_lm", "model.path": str(folder), "model.attention": "sdpa", **data}
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
    BertModel(BertConfig(**sizes)).save_pretrained(folder)
    splits = {f"data.{split}": str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    for number, path in enumerate(splits.values()):
        rows = ({"text": "word " * (1 + n % 9) + f"{number} {n}", "label": "ab"[n % 2]} for n in range(64))
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": "classifier", "model.path": str(folder), "model.attention": "eager", "data": "table", **splits}


def print_model(name: str, sizes: Sequence[int], dropout: float) -> None:
    """Prints the rows of a model for a rate of all dropout."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {**write_model(name, Path(folder)), "method.dropout": dropout, "model.dropout": dropout}
        if name != "minilm":  # the others have no dropout of their own
            del settings["model.dropout"]
        inputs = load_inputs(build_config(settings))
        batch = select_model_inputs(inputs.splits.train.batch(range(ROWS)))
        batch["labels"] = torch.zeros(ROWS, dtype=torch.int64) if name == "minilm" else batch["input_ids"]
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp32 under autocast", torch.float32)):
            found = count_peft_step(inputs, batch, dtype=dtype, dropout=dropout, autocasts="autocast" in kind)
            print_row(name, dropout, f"PEFT, {kind}", 1, *[""] * len(NAMES), found, found)
        for slots in sizes:
            mixed = [MIXED[slot % len(MIXED)] for slot in range(slots)]
            for kind, ranks in (("equal", [8] * slots), ("mixed", mixed)):
                if slots > 1 or kind == "equal":
                    by_phase = count_pack_step(ranks, inputs, settings)
                    cells = (*(by_phase[phase] for phase in NAMES), by_phase.total(), round(by_phase.total() / slots))
                    print_row(name, dropout, f"pack, {kind} ranks", slots, *cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--sizes", nargs="+", type=int, default=(1, 8, 32))
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}\n")
    print_head("model", "dropout", "step", "slots", *NAMES, "operators", "a trial-step")
    for name in arguments.model:
        for dropout in (0.0, 0.1):
            print_model(name, arguments.sizes, dropout)


if __name__ == "__main__":
    main()
