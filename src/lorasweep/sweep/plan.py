"""Plans a sweep: counts runs, tokens and trained parameters; estimates time and memory from a short training.

Arms whose trials share packs form a group. Each other arm is a group of its own. One short training is measured for
each group: a pack of runs with the highest rank, or one run alone. Its steps and slots follow from the speed of the
machine, and it is evaluated on few examples. All is scaled by the number of tokens.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lorasweep.config.build import as_settings
from lorasweep.config.compose import choose_evaluation_interval
from lorasweep.config.run import STEPS_KEY, RunConfig
from lorasweep.config.sweep import RayWorkers
from lorasweep.data.batching import StepBatchSampler, choose_part
from lorasweep.data.split import Batch, Split, SplitFacts
from lorasweep.errors import ConfigError, OutOfMemory, RunError
from lorasweep.objectives.data_splits import DataSplits
from lorasweep.record import RunRecord, describe_confirmation, read_run
from lorasweep.sweep.controller.proposals import find_batch_start
from lorasweep.sweep.controller.stopping import MIN_STEPS
from lorasweep.sweep.definition.arms import Arm, Definition, restore_definition
from lorasweep.sweep.definition.confirm import count_confirm_runs, find_warnings
from lorasweep.sweep.definition.packing import explain_bases, explain_solo_arms, plan_packing
from lorasweep.sweep.machine import Machine, measure_machine
from lorasweep.sweep.workers.worker import choose_slots, list_pack_arms
from lorasweep.training.inputs import InputsCache
from lorasweep.training.module import prepare_model
from lorasweep.training.packs.pack import train_pack
from lorasweep.training.packs.size import count_slot_bytes
from lorasweep.training.run import train_run
from lorasweep.training.run_inputs import RunInputs
from lorasweep.training.run_log import RunFolder, RunRequest
from lorasweep.wording import format_bytes, format_count, format_seconds_range

MIN_MEASURED_STEPS = 2
"""Steps of a measured training if they are slow. The first is not counted, because it warms up."""

MAX_MEASURED_STEPS = 16
"""Steps of a measured training if they are fast."""

MEASURED_TRAINING_S = 6.0
"""Seconds that the steps of a measured training should take. They decide on its number of steps."""

MAX_MEASURED_TRAINING_S = 10.0
"""Maximum seconds of `MIN_MEASURED_STEPS` steps. If a whole pack takes longer, fewer slots are measured."""

PACK_OVER_PRODUCTS, ALONE_OVER_PRODUCTS = 5.0, 6.0
"""Assumed time of a step over that of its products at the machine's speed, for a pack and for a run alone."""

MEASURED_EVALUATION_S = 2.0
"""Seconds that the measured evaluation should take. Fewer examples than a batch take longer each."""

MAX_NAME_WIDTH = 16
"""Longest name of an arm that never wraps in 80 columns."""

MIN_TRIALS = 6
"""Minimum number of trials of an arm under `--minutes`. Fewer are too few to search two decades of learning rates."""

MINUTES_TOLERANCE = 0.15
"""The smallest budget may exceed `--minutes` by this fraction, because two measurements differ by as much."""

MAX_DATA_ORDERS = 100
"""Maximum number of data orders among which `choose_data_order` chooses. More would make planning slower."""


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """The measured training of a group of arms. Times are those of a whole pack if `slots` is more than 1."""

    arms: tuple[Arm, ...]
    slots: int
    """Maximum number of trials that train together."""
    reason: str
    """Why packs have this number of slots; empty if `worker.pack_size` says it."""
    loading_s: float
    step_s: float
    step_tokens: float
    """Mean number of tokens of a run's step, without padding."""
    evaluation_s: float
    """Seconds of an evaluation of a run, and of writing weights and checkpoints after it."""
    final_s: float
    """Seconds of the evaluation on all validation examples at the end of a run; 0 if every evaluation is on all."""
    test_s: float
    """Seconds in which a confirm run is scored on test data; 0 without a confirm stage."""
    peak_memory_bytes: int
    record: RunRecord
    """Record of one of the measured runs."""
    kept_bytes: int
    """Size of the folder of that run."""
    trained_params: dict[str, int]
    """Trained parameters of the largest run of each arm, by name of the arm."""

    def estimate_search(self) -> tuple[float, float]:
        """Returns the seconds of the search if empty slots make a step shorter, and if they do not."""
        run_s, low, high = self.run_s, 0.0, 0.0
        for arm in self.arms:
            batches = Counter(find_batch_start(arm, number) for number in range(arm.trials))
            low += arm.trials / self.slots * run_s
            high += sum(math.ceil(size / self.slots) for size in batches.values()) * run_s
        return low, high

    def estimate_confirm(self, num_runs: int) -> float:
        """Returns the seconds of confirm runs, each of which is scored on test data."""
        return math.ceil(num_runs / self.slots) * self.run_s + num_runs * self.test_s

    @property
    def run_s(self) -> float:
        """Seconds of a whole training."""
        config = self.arms[0].base
        num_evaluations = math.ceil(config.num_steps / config.trainer.eval_every_steps) or 1
        return self.loading_s + config.num_steps * self.step_s + num_evaluations * self.evaluation_s + self.final_s


def plan_sweep(
    definition: Definition, inputs_cache: InputsCache, *, on_progress: Callable[[str], None]
) -> list[GroupPlan]:
    """Measures one training of each group of arms of a checked sweep. Leaves no file behind.

    `on_progress` is called with a phrase before each training, and once with the speed of the machine.

    Raises:
        RunError: A training failed, as it would in the sweep.
    """
    groups, machine = list[GroupPlan](), measure_machine()
    on_progress(str(machine))
    for arm in definition.arms:
        if any(arm in group.arms for group in groups):
            continue
        try:
            groups.append(_measure_group(definition, arm, inputs_cache, machine=machine, on_progress=on_progress))
        except RunError as error:
            raise RunError(f"the first trial of arm `{arm.name}` must train, but failed: {error}") from error
    return groups


def _measure_group(
    definition: Definition,
    arm: Arm,
    inputs_cache: InputsCache,
    *,
    machine: Machine,
    on_progress: Callable[[str], None],
) -> GroupPlan:
    slots, reason = choose_slots(definition, arm, inputs_cache=inputs_cache, num_workers=count_workers(definition))
    arms = list_pack_arms(definition, arm) if slots > 1 else [arm]
    largest = plan_packing(definition)[arm.name].largest
    inputs = inputs_cache.load(largest)
    splits = inputs.splits
    # forward and backward pass have three products of each weight
    token_flops = 6 * sum(parameter.numel() for parameter in inputs.base.model.parameters())
    assumed_token_s = token_flops / (1e12 * machine.tflops[inputs.precision])
    assumed_token_s *= PACK_OVER_PRODUCTS if slots > 1 else ALONE_OVER_PRODUCTS
    slot_s = assumed_token_s * _mean_step_tokens(largest, splits.train)
    measured_slots = min(slots, max(1, int(MAX_MEASURED_TRAINING_S / MIN_MEASURED_STEPS / slot_s)))
    num_steps = min(max(MIN_MEASURED_STEPS, int(MEASURED_TRAINING_S / measured_slots / slot_s)), MAX_MEASURED_STEPS)
    config = _shorten(largest, split=splits.train, num_steps=num_steps)
    measured = inputs
    if isinstance(splits, DataSplits):  # the loaders of a data module make whole epochs
        row_s = (
            assumed_token_s / 3 * float(splits.validation.lengths.double().mean())
        )  # a step has two backward products
        num_rows = min(int(MEASURED_EVALUATION_S / row_s), config.trainer.eval_batch_size) // measured_slots or 1
        indices = choose_evaluated(splits.validation.lengths, batch_size=num_rows)
        part = SplitPart(name="validation", fingerprint="", split=splits.validation, indices=indices)
        measured = replace(inputs, splits=replace(splits, validation=part))
    while True:
        pack_phrase = f"{slots} trials in a pack" + (f", from {measured_slots}" if measured_slots < slots else "")
        on_progress(f"measuring {', '.join(each.name for each in arms)}: {pack_phrase if slots > 1 else '1 trial'}")
        try:
            training = _train_briefly(config, measured_slots, is_pack=slots > 1, inputs=measured)
            break
        except OutOfMemory:
            if measured_slots == 1:
                raise
            slots = measured_slots = measured_slots // 2  # as in the sweep
    # scales the measured steps and evaluation to the tokens and slots of the sweep
    scale, unmeasured_bytes, test_s = slots / measured_slots, 0, 0.0
    step_tokens = _mean_step_tokens(config, splits.train)
    counted_tokens = sum(_count_step_tokens(config, split=splits.train)[1:])
    token_s = training.seconds["evaluating"] / measured_slots / int(measured.splits.validation.lengths.sum())
    whole_s = slots * token_s * int(splits.validation.lengths.sum())
    evaluated_share = len(choose_part(len(splits.validation), largest.eval_fraction)) / len(splits.validation)
    if definition.sweep_config.confirm.list_looks():
        retained = [inputs_cache.load_splits(data, config) for data in definition.retained.values()]
        test_s = token_s * sum(int(one.test().lengths.sum()) for one in (splits, *retained))
    if measured_slots < slots:
        unmeasured_bytes = (slots - measured_slots) * count_slot_bytes(config, inputs=inputs)
    return GroupPlan(
        arms=tuple(arms),
        slots=slots,
        reason=reason,
        loading_s=scale * training.seconds["loading"],
        step_s=scale * training.seconds["training"] * step_tokens / counted_tokens,
        step_tokens=step_tokens,
        evaluation_s=evaluated_share * whole_s + scale * training.seconds["saving"],
        final_s=whole_s if evaluated_share < 1 else 0.0,
        test_s=test_s,
        peak_memory_bytes=training.record.peak_memory_bytes + unmeasured_bytes,
        record=training.record,
        kept_bytes=training.kept_bytes,
        trained_params={each.name: _count_trained(definition, each, training.record, inputs=inputs) for each in arms},
    )


def _mean_step_tokens(config: RunConfig, split: SplitFacts) -> float:
    return float(split.lengths.double().mean()) * config.trainer.batch_size


def _shorten(config: RunConfig, *, split: SplitFacts, num_steps: int) -> RunConfig:
    """Returns a run of `num_steps` steps and one evaluation, in one process and without loggers."""
    data_order = choose_data_order(config, split=split, num_steps=num_steps)
    trainer = replace(config.trainer, max_steps=num_steps, eval_every_steps=num_steps, strategy="auto")
    trainer = replace(trainer, eval_fraction=1.0, devices=1, num_nodes=1)  # the same examples for every run
    return replace(config, trainer=trainer, seeds=replace(config.seeds, data_order=data_order), logger={})


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitPart(Split):
    """Some examples of a split. A run record describes the whole split."""

    split: Split
    indices: Tensor

    @property
    def lengths(self) -> Tensor:
        return self.split.lengths[self.indices]

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
    return lengths.argsort(descending=True, stable=True)[::every]  # with the longest


def _count_trained(definition: Definition, arm: Arm, measured: RunRecord, *, inputs: RunInputs) -> int:
    """Returns the trained parameters of an arm's largest run, from the shapes of a prepared model."""
    config = plan_packing(definition)[arm.name].largest
    if as_settings(config)["method"] == measured.config["method"]:  # does not copy a large model again under `full`
        return measured.trainable_params
    parameters = prepare_model(config, inputs.base).parameters()
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


class BriefTraining(NamedTuple):
    """A measured training."""

    seconds: dict[str, float]
    """Seconds of `training` (all steps but the first), `evaluating`, `saving` and `loading` (the rest)."""
    record: RunRecord
    kept_bytes: int


def _train_briefly(config: RunConfig, slots: int, *, is_pack: bool, inputs: RunInputs) -> BriefTraining:
    """Trains a pack of equal runs, or a run alone, in a temporary folder. Raises RunError if it fails."""
    training_s: list[float] = []  # before the first step, and after each step but the last

    def note_step() -> bool:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # otherwise a step would only count the time to start its kernels
        training_s.append(inputs.telemetry.sample()["training_s"])
        return False

    with tempfile.TemporaryDirectory(prefix="lorasweep-plan-") as name:
        runs = [RunFolder(path=Path(name) / str(number)) for number in range(slots)]
        before, began = inputs.telemetry.sample(), time.perf_counter()
        if is_pack:
            train_pack(
                [RunRequest(config=config, run_folder=run) for run in runs],
                inputs=inputs,
                slots=slots,
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
    seconds = {phase: after[f"{phase}_s"] - before[f"{phase}_s"] for phase in ("training", "evaluating", "saving")}
    seconds["loading"] = total_s - sum(seconds.values())
    # `frozen` has no steps
    seconds["training"] = after["training_s"] - training_s[1] if len(training_s) > 1 else 0.0
    return BriefTraining(seconds, record, kept_bytes)


def choose_data_order(config: RunConfig, *, split: SplitFacts, num_steps: int) -> int:
    """Returns a seed of the data order with which a few steps need about as much memory as a whole run.

    It is the seed whose first `num_steps` steps contain the largest step, in tokens. Enough seeds are tried to draw as
    many steps as a whole run has, but at most `MAX_DATA_ORDERS`.
    """
    num_seeds = min(MAX_DATA_ORDERS, math.ceil(config.trainer.max_steps / num_steps))
    trainer = replace(config.trainer, max_steps=num_steps)
    orders = (
        replace(config, trainer=trainer, seeds=replace(config.seeds, data_order=seed)) for seed in range(num_seeds)
    )
    return max(orders, key=lambda order: max(_count_step_tokens(order, split=split))).seeds.data_order


def _count_step_tokens(config: RunConfig, *, split: SplitFacts) -> list[int]:
    """Returns the number of tokens of each step of a run."""
    settings = config.trainer
    steps = StepBatchSampler(
        split, batch_size=settings.batch_size, num_steps=settings.max_steps, seed=config.seeds.data_order
    )
    return [int(split.lengths[torch.tensor(steps.get_step_indices(n))].sum()) for n in range(settings.max_steps)]


def count_workers(definition: Definition) -> int:
    """Returns the number of workers that the sweep has from its start, as far as it is known."""
    config = definition.sweep_config.worker
    return config.num if isinstance(config, RayWorkers) and config.num != "auto" else 1


def fit_minutes(
    definition: Definition, minutes: float, inputs_cache: InputsCache, *, on_progress: Callable[[str], None]
) -> tuple[Definition, list[GroupPlan], str]:
    """Returns a checked sweep that ends within the minutes, its measured trainings, and a sentence on what is given up.

    Seeds go first, then trials, then steps. The estimate assumes that no run stops early and all seeds are needed.

    Raises ConfigError if the smallest budget takes longer, and the errors of `plan_sweep`.
    """
    groups, seconds = plan_sweep(definition, inputs_cache, on_progress=on_progress), 0.0
    most_trials = max(arm.trials for arm in definition.arms)
    most_steps = max(arm.base.num_steps for arm in definition.arms)
    all_looks = definition.sweep_config.confirm.list_looks()
    for steps, trials, looks in _list_budgets(most_steps, most_trials, all_looks):
        overrides, given_up = dict(definition.raw["overrides"]), []
        if looks != all_looks:
            overrides["confirm.looks"] = list(looks)
            given_up.append(f"at most {looks[-1]} of {all_looks[-1]} seeds (small differences stay open)")
        if trials != most_trials:
            overrides["sweep.trials"] = trials
            given_up.append(f"{trials} of {most_trials} trials an arm (a better learning rate may be missed)")
        if steps != most_steps:
            overrides |= {STEPS_KEY: steps, "trainer.eval_every_steps": choose_evaluation_interval(steps)}
            given_up.append(f"{steps:,} of {most_steps:,} steps a run (the answers hold for shorter training)")
        fitted = restore_definition({**definition.raw, "overrides": overrides}, source=definition.source)
        measured = [replace(one, arms=tuple(fitted.find_arm(arm.name) for arm in one.arms)) for one in groups]
        runs = count_confirm_runs(fitted, look=-1)
        confirm_s = (one.estimate_confirm(sum(runs[arm.name] for arm in one.arms)) for one in measured)
        seconds = sum(one.estimate_search()[1] for one in measured) + sum(confirm_s)
        if seconds <= 60 * minutes:
            return fitted, measured, f"within {minutes:g} min: {'; '.join(given_up) or 'nothing is given up'}."
    if seconds <= (1 + MINUTES_TOLERANCE) * 60 * minutes:  # the least that an earlier measurement named
        return fitted, measured, f"within about {minutes:g} min: {'; '.join(given_up) or 'nothing is given up'}."
    seeds = "" if all_looks in ((), (3,)) else " or seeds (`confirm.seeds=3`)"
    raise ConfigError(
        f"`--minutes` must be at least {math.ceil(seconds / 60)} for this sweep on this machine, but got {minutes:g}. "
        f"What helps: fewer steps (`trainer.max_steps`), arms (`arms.full=null`), values of `confirm_each`{seeds}, "
        "shorter or fewer examples (`data.max_length`, `data.max_validation_examples`), and a smaller model."
    )


def _list_budgets(steps: int, trials: int, looks: tuple[int, ...]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Yields numbers of steps, trials and looks, from the given ones to the smallest."""
    while True:
        for part in (4, 3, 2):
            for last in range(len(looks), 0, -1) if looks else (0,):
                yield steps, max(min(MIN_TRIALS, trials), trials * part // 4), looks[:last]
        if steps <= MIN_STEPS:
            return
        steps = 2 * (max(MIN_STEPS, steps // 2) // 2)


def render_plan(definition: Definition, groups: Sequence[GroupPlan]) -> RenderableType:
    """Returns a table with a row for each arm, followed by sentences on packs, stages, time, memory and warnings."""
    metric = groups[0].record.metric
    title = f"{definition.name}: scored by {metric} (`data.metric`), nothing is trained yet"
    # an arm's name may wrap if it is very long, but numbers never do
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE, padding=(0, 0))
    longest = max(len(arm.name) for arm in definition.arms)
    table.add_column("arm", overflow="fold", min_width=min(MAX_NAME_WIDTH, longest))
    for name in ("runs", "tokens", "trained", "pack", "memory", "disk", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    confirm_runs = count_confirm_runs(definition)
    group_of = {arm.name: group for group in groups for arm in group.arms}
    for arm in definition.arms:
        group, runs, config = group_of[arm.name], arm.trials + confirm_runs[arm.name], arm.base
        low, high = group.estimate_search()
        confirm = group.estimate_confirm(sum(confirm_runs[each.name] for each in group.arms))
        # a run keeps its best and its last trained weights, both in fp32
        trained = group.trained_params[arm.name]
        kept_bytes = group.kept_bytes + 8 * (trained - group.record.trainable_params)
        share = runs / sum(each.trials + confirm_runs[each.name] for each in group.arms)
        at_most = "≤ " if len({getattr(one.method, "rank", 0) for one in arm.corner_configs}) > 1 else ""
        table.add_row(
            arm.name,
            " + ".join(map(str, filter(None, (arm.trials, confirm_runs[arm.name])))),
            format_count(runs * config.num_steps * group.step_tokens),
            at_most + format_count(trained),
            str(group.slots),
            format_bytes(group.peak_memory_bytes),
            at_most + format_bytes(runs * kept_bytes),
            format_seconds_range(share * (low + confirm), share * (high + confirm)),
        )
    return Group(table, *(Text(f"• {note}") for note in _list_notes(definition, groups)))


def _list_notes(definition: Definition, groups: Sequence[GroupPlan]) -> Iterator[str]:
    yield from explain_bases(definition)
    yield from explain_solo_arms(definition)
    for group in groups:
        if group.reason:
            yield f"{', '.join(f'`{arm.name}`' for arm in group.arms)}: {group.reason}"
    looks = definition.sweep_config.confirm.list_looks()
    confirm_stage = f"then confirm: {describe_confirmation(looks)}" if looks else "no confirm stage"
    yield f"Stages (the numbers of runs): search on validation data; {confirm_stage}."
    yield from find_warnings(definition)
    low, high = (sum(ends) for ends in zip(*(group.estimate_search() for group in groups), strict=True))
    confirm, longest = (
        sum(group.estimate_confirm(sum(runs[arm.name] for arm in group.arms)) for group in groups)
        for runs in (count_confirm_runs(definition), count_confirm_runs(definition, look=-1))
    )
    total = format_seconds_range(low + confirm, high + confirm)
    parts = f"search {format_seconds_range(low, high)}"
    parts += f", confirm {format_seconds_range(confirm, confirm)}" if confirm else ""
    range_note = " The upper end is for packs whose steps take as long with empty slots." if " to " in total else ""
    shared = f" {workers} workers share this time." if (workers := count_workers(definition)) > 1 else ""
    yield f"Time on this machine, if it does nothing else: {total} ({parts}).{range_note}{shared}"
    if longest > confirm:
        yield f"If every question stays open to the last look: {format_seconds_range(low + longest, high + longest)}."
