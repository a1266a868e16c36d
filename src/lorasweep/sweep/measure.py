"""Measures what the trainings of a sweep take, for `lorasweep plan` and `--minutes`.

Rates are kept for a day for this machine and these settings, so that `new`, `plan` and `sweep` agree.

Arms whose trials share packs form a group. Each other arm is a group of its own. For each group a pack of runs with the
highest rank, or one run alone, trains a few steps at the sweep's sizes, is evaluated on one batch, and stops. Times are
scaled by tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from pydantic import TypeAdapter, ValidationError

from lorasweep.config.build import as_settings, flatten
from lorasweep.config.run import LR, STEPS_KEY, RunConfig
from lorasweep.data.batching import choose_part, cut_buckets
from lorasweep.data.rows import SplitFacts
from lorasweep.data.tokenise import get_cache_folder
from lorasweep.disk import write_atomically
from lorasweep.errors import OutOfMemory, RunError
from lorasweep.methods import copy_sharing_weights
from lorasweep.record import RunRecord, read_run
from lorasweep.sweep.cost import Rates, count_workers, estimate_cost
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.sweep.definition.packing import group_arms
from lorasweep.sweep.workers.worker import choose_slots
from lorasweep.tasks.splits import DataSplits
from lorasweep.training.generation import score_answers
from lorasweep.training.inputs import InputsCache
from lorasweep.training.open_run import RunFolder, RunRequest
from lorasweep.training.pack_size import PackSize
from lorasweep.training.prepare import prepare_model
from lorasweep.training.run import never_stop, train_runs
from lorasweep.training.run_inputs import RunInputs

NUM_STEPS = 4
"""Steps before the evaluation of a measured training. The first is not counted, because it warms up."""
NUM_MEASURED_TOKENS = 8
"""Tokens of a measured answer."""
BUSY_INTERVAL_S = 0.5
"""Seconds in which the work of other processes is measured."""
MAX_RATES_AGE_S = 24 * 3600
"""Rates that were measured at most as many seconds ago are used again."""
FREE_KEYS = frozenset((STEPS_KEY, "trainer.eval_every_steps", LR, "seed", "trainer.progress"))
"""Settings that do not change rates."""


class MeasuredTooLong(Exception):  # noqa: N818 (named by what happened)
    """A measurement took longer than the time that the sweep may take."""


class PhaseClock:
    """Counts the seconds of each phase of a training. Before the first phase it counts `loading`."""

    def __init__(self) -> None:
        self._phase, self._began_s = "loading", time.perf_counter()
        self._seconds = defaultdict[str, float](float)

    def switch(self, phase: str, *_: int) -> None:
        """Begins a phase, as `OnPhase`, or anything else that is to be counted apart."""
        now = time.perf_counter()
        self._seconds[self._phase] += now - self._began_s
        self._phase, self._began_s = phase, now

    def read(self) -> defaultdict[str, float]:
        """Returns the seconds of each phase so far."""
        self.switch(self._phase)
        return self._seconds.copy()


class BriefTraining(NamedTuple):
    """A measured training, with the seconds of its phases."""

    loading_s: float
    """Seconds before the first step."""
    training_s: float
    """Seconds of the steps 2 to `NUM_STEPS`; 0 without steps."""
    evaluating_s: float
    saving_s: float
    record: RunRecord


def measure_sweep(
    definition: Definition,
    inputs_cache: InputsCache,
    *,
    on_progress: Callable[[str], None],
    is_late: Callable[[], bool] = never_stop,
    anew: bool = False,
) -> list[Rates]:
    """Measures one training of each group of arms of a checked sweep, or returns what was measured within a day.

    `on_progress` is called with a phrase before each training, and `is_late` after each step: it ends the measurement.
    `anew` measures in any case.

    Raises:
        RunError: A training failed, as it would in the sweep.
        MeasuredTooLong: `is_late` returned True.
    """
    rates, busy_share = list[Rates](), None
    for arm in definition.arms:
        if any(arm.name in group.arms for group in rates):
            continue
        kept = _find_rates_file(definition, arm, inputs_cache)
        if not anew and (known := _read_rates(kept)) is not None:
            on_progress(
                f"{', '.join(known.arms)}: rates measured within a day (`lorasweep plan --measure` measures anew)"
            )
            rates.append(known)
            continue
        if busy_share is None:  # of other processes, because this one waits
            busy_share = psutil.cpu_percent(interval=BUSY_INTERVAL_S) / 100
        # arms that could share a pack are measured one by one if trials run alone
        try:
            found = measure(definition, arm, inputs_cache, on_progress=on_progress, is_late=is_late)
        except RunError as error:
            raise RunError(f"the first trial of arm `{arm.name}` must train, but failed: {error}") from error
        rates.append(replace(found, busy_share=busy_share))
        _write_rates(kept, rates[-1])
    return rates


def limit_rates(definition: Definition, rates: Sequence[Rates], inputs_cache: InputsCache) -> list[Rates]:
    """Returns the rates in a sweep that was cut, and keeps them for its settings too."""
    found = list[Rates]()
    for group in (limited for one in rates if (limited := one.limit(definition)).arms):
        runs = {name: definition.find_arm(name).packing.largest for name in group.arms}
        # a rank may have gone, which changes the number for LoRA alone
        smaller = {name: run for name, run in runs.items() if run.module is None and not run.method.trains_all}
        counts = {name: _count_trained(run, inputs_cache.load(run)) for name, run in smaller.items()}
        found.append(replace(group, trained_params=group.trained_params | counts))
        _write_rates(_find_rates_file(definition, definition.find_arm(group.arms[0]), inputs_cache), found[-1])
    return found


def plan_looks(definition: Definition, inputs_cache: InputsCache) -> list[float]:
    """Returns the seconds of a sweep up to each look, by rates of the last day; empty if an arm has none."""
    kept = [_read_rates(_find_rates_file(definition, arm, inputs_cache)) for arm in definition.arms]
    rates = [group for group in kept if group]  # a group's file has the name of its first arm
    num_looks = max(1, len(definition.sweep_config.confirm.list_looks()))
    is_known = sum(len(group.arms) for group in rates) == len(definition.arms)
    return [estimate_cost(definition, rates, look=n).high_s for n in range(num_looks)] if is_known else []


def _find_rates_file(definition: Definition, arm: Arm, inputs_cache: InputsCache) -> Path:
    """Returns the file of an arm's rates. Its name differs for all that they depend on: settings, data, and machine."""
    group = next(arms for arms in group_arms(definition) if arm.name in [one.name for one in arms])
    settings = {one.name: flatten(as_settings(one.packing.largest)) for one in group}
    shown = {name: {key: one[key] for key in one.keys() - FREE_KEYS} for name, one in settings.items()}
    inputs, config = inputs_cache.load(arm.packing.largest), definition.sweep_config
    machine = [platform.node(), platform.processor(), os.cpu_count(), torch.get_num_threads(), torch.__version__]
    parts = [version("lorasweep"), machine, arm.name, shown, as_settings(config)["worker"]]
    parts += [bool(config.confirm.list_looks()), sorted(definition.retained), inputs.fingerprints(arm.packing.largest)]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    return get_cache_folder() / f"rates-{digest[:32]}.json"


def _read_rates(path: Path) -> Rates | None:
    """Returns the rates in a file; None if it is missing, damaged or older than a day."""
    try:
        is_old = time.time() - path.stat().st_mtime > MAX_RATES_AGE_S
        return None if is_old else TypeAdapter(Rates).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _write_rates(path: Path, rates: Rates) -> None:
    with suppress(OSError):  # without a writable cache, each command measures
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(vars(rates)))


def measure(
    definition: Definition,
    arm: Arm,
    inputs_cache: InputsCache,
    *,
    on_progress: Callable[[str], None],
    is_late: Callable[[], bool] = never_stop,
) -> Rates:
    """Measures one training of an arm and of those that share its packs. Errors as in `measure_sweep`."""
    group = next(arms for arms in group_arms(definition) if arm.name in [one.name for one in arms])
    size = choose_slots(definition, group, inputs_cache=inputs_cache, num_workers=count_workers(definition))
    arms = group if size.slots > 1 else [arm]
    largest = arm.packing.largest
    inputs = inputs_cache.load(largest)
    while True:
        phrase = f"{size.slots} trials in a pack" if size.slots > 1 else "1 trial"
        on_progress(f"measuring {', '.join(each.name for each in arms)}: {phrase}")
        try:
            training = train_briefly(largest, inputs, slots=size.slots, is_late=is_late)
        except (OutOfMemory, ValueError):  # some settings can't train in slots, such as tied modules that train in full
            if size.slots == 1:
                raise
            size = size._replace(slots=size.slots // 2)  # as in the sweep
        else:
            rates = scale_up(training, size, arms, definition=definition, inputs_cache=inputs_cache)
            return replace(rates, answers_s=measure_answers(largest, inputs))


def scale_up(
    training: BriefTraining, size: PackSize, arms: Sequence[Arm], *, definition: Definition, inputs_cache: InputsCache
) -> Rates:
    """Returns what the whole trainings of arms take."""
    largest = {arm.name: arm.packing.largest for arm in arms}
    config = largest[arms[0].name]
    inputs = inputs_cache.load(config)
    train, validation = inputs.splits.train, inputs.splits.validation
    # seconds in which one run is evaluated on a token, and all slots on the validation split
    measured = choose_part(len(validation), _choose_eval_fraction(config, inputs))
    token_s = training.evaluating_s / size.slots / int(validation.lengths[torch.tensor(measured)].sum())
    whole_s = size.slots * token_s * int(validation.lengths.sum())
    num_scored = {"validation": len(validation)}
    evaluated_share = len(choose_part(len(validation), config.eval_fraction)) / len(validation)
    test_tokens, reference_tokens = 0, int(train.lengths.sum()) + int(validation.lengths.sum())
    if definition.sweep_config.confirm.list_looks():
        retained = [inputs_cache.load_splits(data, config) for data in definition.retained.values()]
        test_tokens = sum(int(splits.test().lengths.sum()) for splits in (inputs.splits, *retained))
        num_scored["test"] = len(inputs.splits.test())
        reference_tokens += int(inputs.splits.test().lengths.sum())
    needs_reference = isinstance(inputs.splits, DataSplits) and inputs.data.objective.needs_reference
    return Rates(
        arms=tuple(largest),
        slots=size.slots,
        reason=size.reason,
        reference_s=token_s * reference_tokens if needs_reference else 0.0,
        loading_s=training.loading_s,
        step_s=training.training_s / (NUM_STEPS - 1) * _compare_steps(config, train, num_steps=NUM_STEPS),
        step_tokens=float(train.lengths.double().mean()) * config.trainer.batch_size,
        evaluation_s=evaluated_share * whole_s,
        saving_s=training.saving_s,
        final_s=whole_s if evaluated_share < 1 else 0.0,
        test_s=token_s * test_tokens,
        answers_s={},
        num_scored=num_scored,
        num_train=len(train),
        peak_memory_bytes=training.record.peak_memory_bytes,
        metric=training.record.metric,
        trained_params={name: _count_trained(run, inputs, training.record) for name, run in largest.items()},
    )


def _compare_steps(config: RunConfig, split: SplitFacts, *, num_steps: int) -> float:
    """Returns the mean length of a step's rows in a whole run, divided by that in the steps after the first."""
    group, batch_size = config.data.groups_by_length, config.trainer.batch_size
    buckets = cut_buckets(split.row_lengths, batch_size=batch_size, group_by_length=group)
    mean = sum(len(part) * length for part, length in zip(buckets.members, buckets.lengths, strict=True)) / len(split)
    measured = [buckets.lengths[buckets.choose(step)[0]] for step in range(1, num_steps)]
    return mean / statistics.fmean(measured)


def _count_trained(config: RunConfig, inputs: RunInputs, measured: RunRecord | None = None) -> int:
    """Returns the trained parameters of a run, from a run that was measured, or the shapes of a prepared model."""
    # a run that was measured needs no copy, which is large under `full`
    if measured and as_settings(config)["method"] == measured.config["method"]:
        return measured.trainable_params
    parameters = prepare_model(config, inputs.base).parameters()
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


def _choose_eval_fraction(config: RunConfig, inputs: RunInputs) -> float:
    """Returns the fraction of the validation split that is one batch; all if the loaders are the user's own."""
    if config.module is not None or not config.num_steps:  # without steps, a run is evaluated on all
        return 1.0
    return min(config.eval_fraction, config.trainer.eval_batch_size / len(inputs.splits.validation))


def train_briefly(
    config: RunConfig, inputs: RunInputs, *, slots: int, is_late: Callable[[], bool] = never_stop
) -> BriefTraining:
    """Trains a pack of equal runs up to the step after its first evaluation, in a temporary folder.

    Raises RunError if it fails, and MeasuredTooLong if `is_late` is True after a step.
    """
    trainer = replace(config.trainer, eval_fraction=_choose_eval_fraction(config, inputs), strategy="auto")
    trainer = replace(trainer, max_steps=NUM_STEPS + 2, eval_every_steps=NUM_STEPS, devices=1, num_nodes=1)
    config = replace(config, trainer=trainer, logger={})
    splits = inputs.splits
    if isinstance(splits, DataSplits) and splits.objective.needs_reference:  # not the real ones, which take time
        train, validation = splits.train.fill_reference(), splits.validation.fill_reference()
        splits = replace(splits, train=train, validation=validation)
    inputs, clock = replace(inputs, splits=splits), PhaseClock()
    samples: list[Mapping[str, float]] = []  # before the first step, and after each step

    def note_step() -> bool:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # otherwise a step would only count the time to start its kernels
        samples.append(clock.read())
        return len(samples) > NUM_STEPS + 1 or is_late()

    with tempfile.TemporaryDirectory(prefix="lorasweep-plan-") as name:
        runs = [RunFolder(path=Path(name) / f"sample-{number}") for number in range(slots)]
        train_runs(
            [RunRequest(config=config, run_folder=run) for run in runs],
            inputs=inputs,
            checkpoint_file=Path(name) / "pack.ckpt",
            on_evaluation=lambda evaluations: [None] * len(evaluations),
            on_end=lambda run, outcome: None,
            stop_requested=note_step,
            on_phase=clock.switch,
        )
        record = read_run(runs[0].path)
    if is_late():
        raise MeasuredTooLong
    if record.status not in ("complete", "interrupted"):
        raise RunError(record.reason or record.status)
    has_steps = len(samples) > NUM_STEPS
    last = samples[-1] if has_steps else clock.read()  # `frozen` has no steps
    return BriefTraining(
        loading_s=last["loading"],
        training_s=samples[NUM_STEPS]["training"] - samples[1]["training"] if has_steps else 0.0,
        evaluating_s=last["evaluating"],
        saving_s=last["saving"],
        record=record,
    )


def measure_answers(config: RunConfig, inputs: RunInputs) -> dict[str, float]:
    """Returns the seconds in which a run answers the examples of each split that it has to answer.

    The base model answers a batch of validation examples, with one token and with a few more.
    """
    if (answers := config.data.generated) is None:
        return {}
    num_rows, seconds = min(len(inputs.splits.validation), config.trainer.eval_batch_size), list[float]()
    for num_tokens in (1, 1, NUM_MEASURED_TOKENS):  # the first warms up
        few = replace(answers, max_examples=num_rows, max_new_tokens=num_tokens)
        data = replace(config.data, answers=few)  # type: ignore[call-arg]  # a field of all data with `generated`
        model, began = copy_sharing_weights(inputs.base.model), time.perf_counter()
        score_answers(model, inputs.splits.validation, config=replace(config, data=data), inputs=inputs)
        seconds.append(time.perf_counter() - began)
        model.cpu()
    next_s = max(0.0, seconds[2] - seconds[1]) / (NUM_MEASURED_TOKENS - 1)
    example_s = (seconds[1] + next_s * (answers.max_new_tokens - 1)) / num_rows
    sizes = {"test": len(inputs.splits.test())}
    sizes |= {"validation": len(inputs.splits.validation)} if answers.on_validation else {}
    return {name: example_s * min(size, answers.max_examples or size) for name, size in sizes.items()}
