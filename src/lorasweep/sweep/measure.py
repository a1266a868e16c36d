"""Measures what the trainings of a sweep take, for `lorasweep plan` and `--minutes`. Leaves no file behind.

Arms whose trials share packs form a group. Each other arm is a group of its own. One short training is measured for
each group: a pack of runs with the highest rank, or one run alone. Its steps, slots and examples follow from the speed
of the machine, and it is evaluated on few examples. The times of steps and evaluations are scaled by tokens, all others
by slots.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from lorasweep.activity import doing
from lorasweep.config.build import as_settings
from lorasweep.config.data import ConversationSettings
from lorasweep.config.run import RunConfig
from lorasweep.data.batching import StepBatchSampler, choose_part
from lorasweep.data.split import Batch, Split, SplitFacts
from lorasweep.errors import OutOfMemory, RunError
from lorasweep.methods import copy_sharing_weights
from lorasweep.objectives.data_splits import DataSplits
from lorasweep.record import RunRecord, read_run
from lorasweep.sweep.cost import MAX_MEASURED_SHARE, Rates, count_workers
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.sweep.definition.packing import plan_packing
from lorasweep.sweep.machine import Machine, measure_machine
from lorasweep.sweep.workers.worker import choose_slots, list_pack_arms
from lorasweep.training.generation import score_answers
from lorasweep.training.inputs import InputsCache
from lorasweep.training.module import prepare_model
from lorasweep.training.packs.pack import train_pack
from lorasweep.training.packs.size import PackSize, count_slot_bytes
from lorasweep.training.run import train_run
from lorasweep.training.run_inputs import RunInputs
from lorasweep.training.run_log import RunFolder, RunRequest
from lorasweep.training.telemetry import Telemetry

MIN_MEASURED_STEPS = 2
"""Steps of a measured training if they are slow. The first is not counted, because it warms up."""

MAX_MEASURED_STEPS = 16
"""Steps of a measured training if they are fast."""

MAX_MEASURED_S = 30.0
"""Seconds for which a group is measured at most, as far as its speed can be guessed."""

STEPS_SHARE, MAX_STEPS_SHARE, EVALUATION_SHARE = 0.2, 0.33, 0.07
"""Shares of that time for all steps, for `MIN_MEASURED_STEPS` of them if they are slow, and for an evaluation. If a
whole pack takes longer, fewer slots are measured, and if one run takes longer, fewer examples a step."""

PACK_OVER_PRODUCTS, ALONE_OVER_PRODUCTS = 5.0, 6.0
"""Assumed time of a step, divided by the time of its matrix products at the machine's speed: for a pack, and for a run
alone."""

NUM_MEASURED_TOKENS = 8
"""Tokens of a measured answer."""

MAX_DATA_ORDERS = 100
"""Maximum number of data orders among which `choose_data_order` chooses. More would make planning slower."""


class Sample(NamedTuple):
    """A training that is short enough to measure."""

    config: RunConfig
    """A run of few steps and one evaluation, in one process and without loggers."""
    slots: int
    """Number of equal runs that train together, at most the slots of the sweep's packs."""
    inputs: RunInputs
    """The inputs of the sweep, with few validation examples."""


class BriefTraining(NamedTuple):
    """A measured training, with the seconds of its phases."""

    training_s: float
    """Seconds of all steps but the first."""
    evaluating_s: float
    saving_s: float
    loading_s: float
    """Seconds of everything else."""
    record: RunRecord
    kept_bytes: int
    """Size of the folder of one of the runs."""


def measure_sweep(
    definition: Definition,
    inputs_cache: InputsCache,
    *,
    minutes: float | None = None,
    on_progress: Callable[[str], None],
) -> list[Rates]:
    """Measures one training of each group of arms of a checked sweep, for `MAX_MEASURED_SHARE` of the minutes if given.

    `on_progress` is called with a phrase before each training, and once with the speed of the machine.

    Raises:
        RunError: A training failed, as it would in the sweep.
    """
    began = time.monotonic()
    with doing("measuring this machine"):
        rates, machine = list[Rates](), measure_machine()
    on_progress(str(machine))
    num_groups = len({plan.key or name for name, plan in plan_packing(definition).items()})
    for arm in definition.arms:
        if any(arm.name in group.arms for group in rates):
            continue
        left_s = math.inf if minutes is None else MAX_MEASURED_SHARE * 60 * minutes - (time.monotonic() - began)
        # arms that could share a pack are measured one by one if trials run alone
        limit_s = min(MAX_MEASURED_S, max(0.1, left_s / max(1, num_groups - len(rates))))
        try:
            with doing(f"measuring {arm.name}"):
                rates.append(
                    measure(definition, arm, inputs_cache, machine=machine, limit_s=limit_s, on_progress=on_progress)
                )
        except RunError as error:
            raise RunError(f"the first trial of arm `{arm.name}` must train, but failed: {error}") from error
    return rates


def measure(
    definition: Definition,
    arm: Arm,
    inputs_cache: InputsCache,
    *,
    machine: Machine,
    limit_s: float,
    on_progress: Callable[[str], None],
) -> Rates:
    """Measures one training of an arm and of those that share its packs, for about `limit_s` seconds at most.

    Errors as in `measure_sweep`.
    """
    size = choose_slots(definition, arm, inputs_cache=inputs_cache, num_workers=count_workers(definition))
    arms = list_pack_arms(definition, arm) if size.slots > 1 else [arm]
    largest = plan_packing(definition)[arm.name].largest
    inputs = inputs_cache.load(largest)
    # forward and backward pass use each weight in three matrix products
    token_s = 6 * inputs.base.num_parameters / (1e12 * machine.tflops[inputs.precision])
    token_s *= PACK_OVER_PRODUCTS if size.slots > 1 else ALONE_OVER_PRODUCTS
    sample = choose_sample(largest, inputs, slots=size.slots, token_s=token_s, limit_s=limit_s)
    while True:
        fewer = f", from {sample.slots}" if sample.slots < size.slots else ""
        phrase = f"{size.slots} trials in a pack{fewer}" if size.slots > 1 else "1 trial"
        phrase = (
            f"measuring {', '.join(each.name for each in arms)}: {phrase}, about {max(1, round(limit_s))} s at most"
        )
        on_progress(phrase)
        try:
            training = train_briefly(sample, is_pack=size.slots > 1)
        except OutOfMemory:
            if sample.slots == 1:
                raise
            sample = sample._replace(slots=sample.slots // 2)
            size = size._replace(slots=sample.slots)  # as in the sweep
        else:
            rates = scale_up(training, sample, size, arms, definition=definition, inputs_cache=inputs_cache)
            prompt_s = token_s / 3 * float(inputs.splits.validation.lengths.double().mean())
            num_rows = int(EVALUATION_SHARE * limit_s / prompt_s)
            return replace(rates, answers_s=measure_answers(largest, inputs, num_rows=num_rows))


def scale_up(
    training: BriefTraining,
    sample: Sample,
    size: PackSize,
    arms: Sequence[Arm],
    *,
    definition: Definition,
    inputs_cache: InputsCache,
) -> Rates:
    """Returns what the trainings of arms take, from a sample with fewer slots, steps and validation examples."""
    largest = {arm.name: plan_packing(definition)[arm.name].largest for arm in arms}
    config = largest[arms[0].name]
    inputs, scale = inputs_cache.load(config), size.slots / sample.slots
    train, validation = inputs.splits.train, inputs.splits.validation
    step_tokens = _mean_step_tokens(config, train)
    num_steps, seed = sample.config.trainer.max_steps, sample.config.seeds.data_order
    counted_tokens = sum(_count_step_tokens(sample.config, train, num_steps=num_steps, seed=seed)[1:])
    # seconds in which one run is evaluated on a token, and all slots on the validation split
    token_s = training.evaluating_s / sample.slots / int(sample.inputs.splits.validation.lengths.sum())
    whole_s = size.slots * token_s * int(validation.lengths.sum())
    num_scored = {"validation": len(validation)}
    evaluated_share = len(choose_part(len(validation), config.eval_fraction)) / len(validation)
    peak_bytes, test_tokens = training.record.peak_memory_bytes, 0
    reference_tokens = int(train.lengths.sum()) + int(validation.lengths.sum())
    if sample.slots < size.slots:
        peak_bytes += (size.slots - sample.slots) * count_slot_bytes(sample.config, inputs=inputs)
    if definition.sweep_config.confirm.list_looks():
        retained = [inputs_cache.load_splits(data, sample.config) for data in definition.retained.values()]
        test_tokens = sum(int(splits.test().lengths.sum()) for splits in (inputs.splits, *retained))
        num_scored["test"] = len(inputs.splits.test())
        reference_tokens += int(inputs.splits.test().lengths.sum())
    needs_reference = isinstance(inputs.splits, DataSplits) and inputs.data.objective.needs_reference
    return Rates(
        arms=tuple(largest),
        slots=size.slots,
        reason=size.reason,
        reference_s=token_s * reference_tokens if needs_reference else 0.0,
        loading_s=scale * training.loading_s,
        step_s=scale * training.training_s * step_tokens / counted_tokens,
        step_tokens=step_tokens,
        evaluation_s=evaluated_share * whole_s,
        saving_s=scale * training.saving_s,
        final_s=whole_s if evaluated_share < 1 else 0.0,
        test_s=token_s * test_tokens,
        answers_s={},
        num_scored=num_scored,
        num_train=len(train),
        is_rough=scale > 1 or sample.config.trainer.batch_size < config.trainer.batch_size,
        peak_memory_bytes=peak_bytes,
        record=training.record,
        kept_bytes=training.kept_bytes,
        trained_params={name: _count_trained(run, training.record, inputs=inputs) for name, run in largest.items()},
    )


def choose_sample(config: RunConfig, inputs: RunInputs, *, slots: int, token_s: float, limit_s: float) -> Sample:
    """Returns a training of about `limit_s` seconds, from the assumed time of a token in the step of a run."""
    slot_s = token_s * _mean_step_tokens(config, inputs.splits.train)
    step_s = MAX_STEPS_SHARE * limit_s / MIN_MEASURED_STEPS
    measured_slots, batch_size = min(slots, max(1, int(step_s / slot_s))), config.trainer.batch_size
    if slot_s > step_s and config.module is None:  # the user's data module makes the batches
        batch_size = max(1, int(batch_size * step_s / slot_s))
        slot_s *= batch_size / config.trainer.batch_size
    num_steps = max(MIN_MEASURED_STEPS, int(STEPS_SHARE * limit_s / measured_slots / slot_s))
    num_steps = min(num_steps, MAX_MEASURED_STEPS)
    trainer = replace(config.trainer, max_steps=num_steps, eval_every_steps=num_steps, strategy="auto")
    trainer = replace(trainer, batch_size=batch_size, accumulate=min(batch_size, trainer.accumulate))
    trainer = replace(trainer, eval_fraction=1.0, devices=1, num_nodes=1)  # the same examples for every run
    data_order = choose_data_order(config, split=inputs.splits.train, num_steps=num_steps)
    short = replace(config, trainer=trainer, seeds=replace(config.seeds, data_order=data_order), logger={})
    if isinstance(inputs.splits, DataSplits):  # the loaders of a data module make whole epochs
        validation = inputs.splits.validation
        row_s = token_s / 3 * float(validation.lengths.double().mean())  # a step has two backward products
        num_rows = int(min(EVALUATION_SHARE * limit_s / row_s, config.trainer.eval_batch_size)) // measured_slots or 1
        indices = choose_evaluated(validation.padded_lengths, batch_size=num_rows)
        filled = validation.fill_reference()
        part = SplitPart(name="validation", fingerprint="", split=filled, indices=indices)
        splits = replace(inputs.splits, train=inputs.splits.train.fill_reference(), validation=part)
        inputs = replace(inputs, splits=splits)
    # telemetry of its own, because a sweep that begins after the measurement records the telemetry of `inputs`
    return Sample(config=short, slots=measured_slots, inputs=replace(inputs, telemetry=Telemetry()))


def measure_answers(config: RunConfig, inputs: RunInputs, *, num_rows: int) -> dict[str, float]:
    """Returns the seconds in which a run answers the examples of each split that it has to answer.

    The base model answers a batch of validation examples, with one token and with a few more.
    """
    if (answers := config.data.generated) is None:
        return {}
    assert isinstance(config.data, ConversationSettings)
    num_rows, seconds = max(1, min(num_rows, config.trainer.eval_batch_size)), list[float]()
    for num_tokens in (1, 1, NUM_MEASURED_TOKENS):  # the first warms up
        few = replace(config.data, answers=replace(answers, max_examples=num_rows, max_new_tokens=num_tokens))
        model, began = copy_sharing_weights(inputs.base.model), time.perf_counter()
        score_answers(model, inputs.splits.validation, config=replace(config, data=few), inputs=inputs)
        seconds.append(time.perf_counter() - began)
        model.cpu()
    next_s = max(0.0, seconds[2] - seconds[1]) / (NUM_MEASURED_TOKENS - 1)
    example_s = (seconds[1] + next_s * (answers.max_new_tokens - 1)) / num_rows
    sizes = {"test": len(inputs.splits.test())}
    sizes |= {"validation": len(inputs.splits.validation)} if answers.on_validation else {}
    return {name: example_s * min(size, answers.max_examples or size) for name, size in sizes.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitPart(Split):
    """Some examples of a split. A run record describes the whole split."""

    split: Split
    indices: Tensor

    @property
    def lengths(self) -> Tensor:
        return self.split.lengths[self.indices]

    @property
    def padded_lengths(self) -> Tensor:
        return self.split.padded_lengths[self.indices]

    @property
    def weights(self) -> Tensor:
        return self.split.weights[self.indices]

    def batch(self, indices: Sequence[int]) -> Batch:
        return self.split.batch(self.indices[torch.tensor(indices)].tolist())

    def describe(self) -> dict[str, Any]:
        return self.split.describe()


def choose_evaluated(lengths: Int[Tensor, " examples"], *, batch_size: int) -> Int[Tensor, " part"]:
    """Returns the indices of about one full evaluation batch, with lengths as in the whole split."""
    budget = batch_size * int(lengths.max())
    every = max(1, int(lengths.sum()) // budget)
    return lengths.argsort(descending=True, stable=True)[::every]  # begins with the longest


def choose_data_order(config: RunConfig, *, split: SplitFacts, num_steps: int) -> int:
    """Returns a seed of the data order with which a few steps need about as much memory as a whole run.

    It is the seed whose first `num_steps` steps contain the largest step, in tokens. Enough seeds are tried to draw as
    many steps as a whole run has, but at most `MAX_DATA_ORDERS`.
    """
    seeds = range(min(MAX_DATA_ORDERS, math.ceil(config.trainer.max_steps / num_steps)))
    return max(seeds, key=lambda seed: max(_count_step_tokens(config, split, num_steps=num_steps, seed=seed)))


def train_briefly(sample: Sample, *, is_pack: bool) -> BriefTraining:
    """Trains a pack of equal runs, or a run alone, in a temporary folder. Raises RunError if it fails."""
    config, inputs = sample.config, sample.inputs
    training_s: list[float] = []  # before the first step, and after each step but the last

    def note_step() -> bool:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # otherwise a step would only count the time to start its kernels
        training_s.append(inputs.telemetry.sample()["training_s"])
        return False

    with tempfile.TemporaryDirectory(prefix="lorasweep-plan-") as name:
        runs = [RunFolder(path=Path(name) / f"sample-{number}") for number in range(sample.slots)]
        before, began = inputs.telemetry.sample(), time.perf_counter()
        if is_pack:
            train_pack(
                [RunRequest(config=config, run_folder=run) for run in runs],
                inputs=inputs,
                slots=sample.slots,
                next_run=lambda: None,
                on_evaluation=lambda evaluations: [None] * len(evaluations),
                on_end=lambda run, outcome: None,
                state_file=Path(name) / "pack.json",
                stop_requested=note_step,
            )
        else:
            train_run(config, runs[0], inputs=inputs, stop_requested=note_step)
        total_s = time.perf_counter() - began
        after, record = inputs.telemetry.sample(), read_run(runs[0].path)
        kept_bytes = sum(path.stat().st_size for path in runs[0].path.rglob("*") if path.is_file())
    if record.status != "complete":
        raise RunError(record.reason or record.status)
    phases = {phase: after[phase] - before[phase] for phase in ("training_s", "evaluating_s", "saving_s")}
    loading_s = total_s - sum(phases.values())
    # `frozen` has no steps
    phases["training_s"] = after["training_s"] - training_s[1] if len(training_s) > 1 else 0.0
    return BriefTraining(**phases, loading_s=loading_s, record=record, kept_bytes=kept_bytes)


def _mean_step_tokens(config: RunConfig, split: SplitFacts) -> float:
    return float(split.lengths.double().mean()) * config.trainer.batch_size


def _count_step_tokens(config: RunConfig, split: SplitFacts, *, num_steps: int, seed: int) -> list[int]:
    """Returns the number of tokens of each of the first steps of a run."""
    steps = StepBatchSampler(split, batch_size=config.trainer.batch_size, num_steps=num_steps, seed=seed)
    return [int(split.lengths[torch.tensor(steps.get_step_indices(n))].sum()) for n in range(num_steps)]


def _count_trained(config: RunConfig, measured: RunRecord, *, inputs: RunInputs) -> int:
    """Returns the trained parameters of a run, from the shapes of a prepared model."""
    if as_settings(config)["method"] == measured.config["method"]:  # does not copy a large model again under `full`
        return measured.trainable_params
    parameters = prepare_model(config, inputs.base).parameters()
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
