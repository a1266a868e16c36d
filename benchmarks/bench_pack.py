"""Packs against one run after another: tokens per second per trial as ratios, measured in turn in one process.

    python benchmarks/bench_pack.py [--model tiny|minilm|smollm2 ...] [--quick] [--threads 2] [--rounds 7]
        [--parts step real] [--all-variants] [--data movie_snippets|...]

A row is a number of slots K. `pack` is one step of K slots (forward, backward, clipping, AdamW), `solo` this project's
run alone, `PEFT` PEFT's layers under torch's AdamW, both K times one after another, `ceiling` a run alone with a K
times larger batch, which no pack can beat. Every way takes its turn in each round, so that a disturbance hits all; a
cell is the median over rounds of the ratio within a round. Ratios above 1 are in the pack's favour (for `ceiling` below
1: the share of it that the pack reaches). Rank 8, every linear layer but the head, dropout 0.

The second table (`--parts real`) trains a pack of 8 slots of MiniLM by the code that a sweep runs (`train_runs`): real
sentences of different lengths, the model's dropout, ranks 1 to 64, clipping, the run's log and TensorBoard. `real /
bare` is its time per token over that of `pack` above: rank 8, no dropout, no padding. Both train in turn, and a cell is
the median over blocks of 10 steps, without evaluation. `saving` is the time for logs, weights and checkpoints between
two blocks, per trial-step. With `--all-variants`, the rows below the first switch off one thing each.

`tiny` is the embedded model; `minilm` the real MiniLM-L6 that classifies 16 sentences of 15 tokens; `smollm2` the real
SmolLM2-135M-Instruct with 2 conversations of 256 tokens, of which the last third is scored: ours computes the logits of
these tokens, PEFT's model those of all tokens, as its loss does.
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
from machine import measure_machine
from real_weights import minilm_folder, smollm_folder
from saved_bytes import count_saved_bytes
from sentences import add_data_argument, load_sentences, write_sentences
from side_by_side import print_head, print_row, time_in_turn
from torch import Tensor, nn

from lorasweep.config.compose import compose_run
from lorasweep.data.batching import StepBatchSampler
from lorasweep.data.rows import IGNORED, Batch
from lorasweep.lora import LoraConfig, inject_lora, inject_packed_lora
from lorasweep.models.load import load_base
from lorasweep.objectives.next_tokens import NextTokens
from lorasweep.objectives.objective import Objective
from lorasweep.record import RunRecord
from lorasweep.sweep.measure import PhaseClock
from lorasweep.tasks.table.objective import Classification
from lorasweep.training.environment import DTYPES
from lorasweep.training.inputs import load_inputs
from lorasweep.training.open_run import RunEvaluation, RunFolder, RunRequest
from lorasweep.training.optim import SlotOptimizers
from lorasweep.training.run import train_runs

MODELS = ("tiny", "minilm", "smollm2")
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


def load_task(name: str, dtype: torch.dtype, device: torch.device) -> Task:
    """Returns the model in `dtype` with a typical batch."""
    if name == "tiny":
        model: nn.Module = load_base(compose_run({}).model, dtype=dtype).model
        task = Task(name="tiny", model=model, rows=4, length=128, labels=0)
    elif name == "minilm":
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            minilm_folder(), dtype=dtype, attn_implementation="eager"
        )
        task = Task(name="MiniLM-L6", model=model, rows=16, length=15, labels=2)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(smollm_folder(), dtype=dtype)
        model.config.use_cache = False
        task = Task(name="SmolLM2-135M", model=model, rows=2, length=256, labels=0, scored=1 / 3)
    for module in task.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    task.model.to(device).requires_grad_(requires_grad=False)
    return task


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
    objective: Objective = NextTokens(by_chunk=True)
    if task.labels:
        objective = Classification(num_classes=task.labels)
    num_scored = (batch["targets"] != IGNORED).sum() / slots
    return objective.losses(model, batch).view(slots, -1).sum(1) / num_scored


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
    packed_slots = inject_packed_lora(packed, [config] * slots)
    batch = token_batch(task, slots, next(packed.parameters()).device)
    optimizer = SlotOptimizers([compose_run({"optim.lr": LR})] * slots, packed_slots)

    def pack_step() -> None:
        own_losses(task, packed, batch, slots=slots).sum().backward()
        packed_slots.weights.clip_gradients([1.0] * slots)
        optimizer.step()
        optimizer.zero_grad()

    def solo(model: nn.Module, *, times: int, repeats: int) -> Step:
        loss = functools.partial(own_losses, task, model.train(), slots=1)
        return solo_step(model, task, loss, times=times, repeats=repeats)

    return {
        "pack": pack_step,
        "solo": solo(own, times=1, repeats=slots),
        "PEFT": solo_step(theirs, task, functools.partial(their_loss, task, theirs), times=1, repeats=slots),
        "ceiling": solo(large, times=slots, repeats=1),
    }


def print_steps(models: Sequence[str], dtype: str, device: torch.device, *, sizes: Sequence[int], rounds: int) -> None:
    """Prints the table of single steps."""
    print(f"\n{dtype}\n")
    print_head("model", "K", "ms a trial-step", "tokens/s", "× solo", "× PEFT", "of ceiling", "saved MiB", "× PEFT")
    for name in models:
        task = load_task(name, DTYPES[dtype], device)
        for slots in sizes:
            times = time_in_turn(make_ways(task, slots), rounds=rounds)
            pack_s = statistics.median(times["pack"])
            ratios = [
                statistics.median(other / pack for other, pack in zip(times[way], times["pack"], strict=True))
                for way in ("solo", "PEFT", "ceiling")
            ]
            saved, saved_peft = count_saved_mib(task, slots)
            speed = round(task.rows * task.length * slots / pack_s)
            print_row(task.name, slots, 1000 * pack_s / slots, speed, *ratios, saved, saved / (slots * saved_peft))


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


NO_DROPOUT, NO_LOGGER = {"model.dropout": 0.0}, {"logger": "none"}
VARIANTS = (
    Variant(name="as in a sweep"),
    Variant(name="rank 8 in all slots", has_mixed_ranks=False),
    Variant(name="no dropout", settings=NO_DROPOUT),
    Variant(name="one length", has_one_length=True),
    Variant(name="no TensorBoard", settings=NO_LOGGER),
    Variant(
        name="all of these",
        settings={**NO_DROPOUT, **NO_LOGGER},
        has_mixed_ranks=False,
        has_one_length=True,
    ),
)


@dataclass(frozen=True, kw_only=True)
class RealTask:
    """MiniLM with real sentences for the real path."""

    task: Task
    settings: Mapping[str, Any]
    one_length: Mapping[str, Any]
    """Settings of the data in which all sentences have the mean length."""


def prepare_real_task(task: Task, data: str, folder: Path) -> RealTask:
    """Writes the tables of sentences into a folder, and returns the settings that name them."""
    sentences = load_sentences(data)
    sizes = {"train": 10**9, "validation": 16, "test": 16}
    paths = write_sentences(sentences, folder / "sentences", sizes=sizes)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    texts = [text for text, _ in sentences["train"]]
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=128)["input_ids"]]
    mean = round(statistics.mean(lengths))
    # longer sentences are cut to the mean length, and shorter ones are left out
    long = [pair for pair, length in zip(sentences["train"], lengths, strict=True) if length >= mean]
    cut = write_sentences({**sentences, "train": long}, folder / "one_length", sizes=sizes)
    return RealTask(
        task=replace(task, length=mean),
        settings={
            "model": "classifier",
            "model.path": str(minilm_folder()),
            "data": "table",
            "data.max_length": 128,
            **{f"data.{split}": str(path) for split, path in paths.items()},
            "trainer.batch_size": task.rows,
        },
        one_length={"data.max_length": mean, "data.train": str(cut["train"])},
    )


@dataclass(kw_only=True)
class BlockTimer:
    """Times the real path's steps, and after each block of steps the same number of bare steps.

    `stop_requested` and `on_evaluation` are the arguments of `train_runs`. The first block warms up.
    """

    step_tokens: Sequence[int]
    """Tokens of each step of the pack, of all slots."""
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
        self._num_steps = -1
        self._is_warm = False
        self.clock = PhaseClock()

    def stop_requested(self) -> bool:
        """Called after each step. The first step of a block is not timed, because its start is not seen."""
        self._num_done += 1
        self._num_steps += 1
        if self._num_done == 1:
            self._first = self._read_clock()
        if self._num_done == self.num_steps:
            self._last = self._read_clock()
        return False

    def on_evaluation(self, evaluations: Sequence[RunEvaluation]) -> list[None]:
        self.clock.switch("bare")  # so that it does not count as saving
        with torch.enable_grad():  # a pack evaluates and saves without gradients
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
        self.clock.switch("saving")
        return [None] * len(evaluations)

    def _read_clock(self) -> tuple[float, float]:
        """Returns the time, when the device has done its work, and the number of tokens trained so far."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), sum(self.step_tokens[: self._num_steps])


def measure_real_path(
    real: RealTask, variant: Variant, *, precision: str, ranks: Sequence[int], blocks: int, block_steps: int
) -> None:
    """Trains a pack by the real code, in turn with the bare step, and prints a row of the table."""
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
    inputs = load_inputs(configs[0])
    train = inputs.data.train
    samplers = [
        StepBatchSampler(
            train,
            batch_size=config.trainer.batch_size,
            num_steps=config.trainer.max_steps,
            seed=config.seeds.data_order,
            group_by_length=config.data.groups_by_length,
        )
        for config in configs
    ]
    timer = BlockTimer(
        step_tokens=[
            sum(int(train.lengths[micro.indices].sum()) for sampler in samplers for micro in sampler.get_step(step))
            for step in range(configs[0].trainer.max_steps)
        ],
        bare_step=make_ways(real.task, len(ranks))["pack"],
        bare_tokens=real.task.rows * real.task.length * len(ranks),
        num_steps=block_steps,
    )
    records: list[RunRecord] = []
    with tempfile.TemporaryDirectory() as folder:
        requests = [
            RunRequest(config=config, run_folder=RunFolder(path=Path(folder) / str(slot)))
            for slot, config in enumerate(configs)
        ]
        train_runs(
            requests,
            inputs=inputs,
            on_evaluation=timer.on_evaluation,
            on_end=lambda request, record: records.append(record),
            checkpoint_file=Path(folder) / "pack.ckpt",
            stop_requested=timer.stop_requested,
            on_phase=timer.clock.switch,
        )
    ratio, trial_step_ms = statistics.median(timer.ratios), 1000 * statistics.median(timer.step_s) / len(ranks)
    saving_ms = 1000 * timer.clock.read()["saving"] / ((blocks + 1) * block_steps) / len(ranks)
    tokens = round(statistics.mean(timer.tokens) / len(ranks))
    print_row(variant.name, tokens, trial_step_ms, trial_step_ms / ratio, ratio, saving_ms)


def print_real_path(arguments: argparse.Namespace, dtype: str, device: torch.device) -> None:
    """Prints the table of the real path."""
    ranks, blocks, block_steps = REAL_RANKS, arguments.rounds, BLOCK_STEPS
    if arguments.quick:
        ranks, blocks, block_steps = (1, 64), 1, 2
    print(f"\nThe real path, {len(ranks)} slots, {dtype}\n")
    print_head("real path", "tokens/slot", "ms a trial-step", "bare ms", "real / bare", "saving ms")
    with tempfile.TemporaryDirectory() as folder:
        real = prepare_real_task(load_task("minilm", DTYPES[dtype], device), arguments.data, Path(folder))
        for variant in VARIANTS if arguments.all_variants else VARIANTS[:1]:
            measure_real_path(real, variant, precision=dtype, ranks=ranks, blocks=blocks, block_steps=block_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tiny"], choices=MODELS)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", nargs="+", default=["step", "real"], choices=["step", "real"])
    parser.add_argument("--all-variants", action="store_true", help="the real path also with one thing switched off")
    add_data_argument(parser)
    parser.add_argument("--quick", action="store_true", help="two sizes, two rounds: only checks that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, rounds = ((1, 2), 2) if arguments.quick else (arguments.sizes, arguments.rounds)
    print(f"\n{measure_machine()}")
    for dtype_name in arguments.dtype:
        if "step" in arguments.parts:
            print_steps(arguments.model, dtype_name, device, sizes=sizes, rounds=rounds)
        if "real" in arguments.parts:
            print_real_path(arguments, dtype_name, device)


if __name__ == "__main__":
    main()
