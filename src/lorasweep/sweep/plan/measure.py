"""Measures the parts of a sweep by running them in small, in a temporary folder.

The code is the sweep's own: the controller hands out the first trials of every arm, `train_pack` and `train_run` train
them for a few steps with two evaluations, and `write_report` writes the report of these trials.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import torch
from torch import Tensor

from lorasweep.config.build import as_settings
from lorasweep.config.data import ChatConfig, ScoreMetric
from lorasweep.config.run import RunConfig
from lorasweep.config.sweep import RayWorkers
from lorasweep.data.batching import EvaluationSampler, StepBatchSampler
from lorasweep.data.examples import TextSplit
from lorasweep.data.split import Batch, Split
from lorasweep.errors import OutOfMemory, RunError
from lorasweep.record import read_run
from lorasweep.report import write_report
from lorasweep.sweep.controller.controller import Assignment, Controller
from lorasweep.sweep.controller.lifecycle import create_sweep
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.sweep.definition.seeds import count_confirm_runs
from lorasweep.sweep.definition.warnings import count_tokens
from lorasweep.sweep.workers.worker import Worker
from lorasweep.training.environment import peak_memory_bytes, process_peak_bytes, reset_peak_memory
from lorasweep.training.inputs import InputsCache, RunInputs
from lorasweep.training.packs.pack import train_pack
from lorasweep.training.packs.slot_run import RunRequest
from lorasweep.training.restore import restore_model
from lorasweep.training.run import never_stop, train_run
from lorasweep.training.run_log import RunFolder
from lorasweep.training.score import gather_references, score_answers
from lorasweep.training.telemetry import Telemetry

STEPS_PER_EVALUATION = 3
"""Steps before each of the two evaluations of a measured training. The first step is not counted: it warms up."""
NUM_EVALUATIONS = 2
MAX_EVALUATION_BATCHES = 4
"""Maximum number of batches of validation data in a measured evaluation. The batch with the longest examples is always
there, because it needs the most memory."""
LOCAL_LOGGERS = ("EventLogger", "TensorBoardLogger", "CSVLogger")
"""Loggers that write into the run's folder only. A measured training has no other loggers."""
NUM_DATA_ORDERS = 32
"""Number of data orders of which a measured training has the one with the longest examples in its few steps. A run of
the sweep meets such examples later, and they need the most memory."""
SETTINGS_WITHOUT_COST = ("optim.lr", "optim.weight_decay", "method.alpha", "schedule", "seed", "seeds", "logger")
"""Settings, and groups of settings, that change neither the time nor the memory of a run."""


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """Time and memory of one training: of a whole pack, or of a run alone."""

    config: RunConfig
    """Settings of the run, or of the first run of the pack, as the sweep would train it."""
    run: Path
    """Folder of a complete run."""
    slots: int
    """Number of runs that trained together; 1 for a run alone."""
    loading_s: float
    """Seconds to build model, optimizer and Trainer."""
    steps_s: tuple[float, ...]
    """Seconds of each measured step, scaled to the mean number of tokens; empty if nothing trains."""
    evaluations_s: tuple[float, ...]
    """Seconds of each measured evaluation, scaled from the measured batches to the whole validation split."""
    saving_s: float
    """Seconds of saving and logging per evaluation."""
    memory_bytes: int
    """Peak of allocated GPU memory, or without a GPU of the process's resident memory."""
    host_bytes: int
    """Peak of the process's resident memory."""
    trainable_params: int
    """Maximum over the runs."""
    kept_bytes: int
    """Size of the folder of a complete run, the mean over the runs."""


@dataclass(frozen=True, kw_only=True)
class GroupCost:
    """Measured cost of the arms whose trials share packs, or of one arm whose trials run alone."""

    arms: tuple[Arm, ...]
    slots: int
    """Maximum number of trials that train together; 1 if each trial runs alone."""
    first_slots: int
    """Number of trials in the first pack; 1 if each trial runs alone."""
    small: TrainingCost
    """A pack of one slot; or the run with the least work of an arm whose trials run alone."""
    large: TrainingCost
    """The largest pack of the sweep; or the run with the most work of an arm whose trials run alone."""
    test_ratio: float
    """Tokens of the test split divided by tokens of the validation split; 0 without a confirm stage."""
    answers_s: float
    """Seconds to generate the answers to all prompts of the test split; 0 without `data.generate`."""
    pack_note: str = ""
    """Why packs have `slots` slots, as the sweep's record would say it; empty if `worker.pack_size` says it."""


@dataclass(frozen=True, kw_only=True)
class SweepCost:
    """Measured cost of all parts of a sweep."""

    groups: tuple[GroupCost, ...]
    start_s: float
    """Seconds from the start of the process until models and data were loaded and checked."""
    start_bytes: int
    """Peak of the process's resident memory until then."""
    report_s: float
    report_bytes: int
    """Peak of the process's resident memory while the report was written."""
    omitted_loggers: tuple[str, ...]
    """Names of loggers that the measured trainings did not have."""


def measure_sweep(
    definition: Definition, inputs_cache: InputsCache, *, metric: ScoreMetric, on_progress: Callable[[str], None]
) -> SweepCost:
    """Measures the parts of a checked sweep. Leaves no file behind.

    Args:
        definition: The sweep.
        inputs_cache: Models and data, which the check of the definition has loaded.
        metric: The metric by which every arm is scored.
        on_progress: Called with a phrase before each training.

    Raises:
        RunError: A training failed, as it would in the sweep.
    """
    start_s, start_bytes = time.time() - psutil.Process().create_time(), process_peak_bytes()
    with tempfile.TemporaryDirectory(prefix="lorasweep-plan-") as name:
        path = Path(name) / "sweep"
        sweep = create_sweep(definition, path, metric=metric)
        try:
            worker = MeasuringWorker(
                path=path,
                definition=sweep.definition,
                controller=Controller(sweep),
                metric=metric.name,
                inputs_cache=inputs_cache,
                stop_requested=never_stop,
                num_workers=count_workers(definition),
            )
            groups = worker.measure_groups(on_progress)
            worker.controller.save()
        finally:
            sweep.close()
        on_progress("the report")
        reset_peak_memory()
        began = time.perf_counter()
        write_report(path)
        return SweepCost(
            groups=tuple(groups),
            start_s=start_s,
            start_bytes=start_bytes,
            report_s=time.perf_counter() - began,
            report_bytes=process_peak_bytes(),
            omitted_loggers=tuple(sorted(worker.omitted_loggers)),
        )


def count_workers(definition: Definition) -> int:
    """Returns the number of workers that the sweep has from its start, as far as it is known."""
    config = definition.sweep_config.worker
    return config.num if isinstance(config, RayWorkers) and config.num != "auto" else 1


class MeasuringWorker(Worker):
    """A worker that trains only the first trials of every arm, and only for a few steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.omitted_loggers: set[str] = set()
        self._runs_alone: dict[str, TrainingCost] = {}  # by `describe_work`
        self._data_orders: dict[tuple[Split, int], int] = {}  # by training split and batch size

    def measure_groups(self, on_progress: Callable[[str], None]) -> list[GroupCost]:
        groups: list[GroupCost] = []
        for arm in self.definition.arms:
            if any(arm in group.arms for group in groups):
                continue
            try:
                num_notes = len(self.controller.sweep.record.notes)
                slots = self._choose_slots(arm)
                note = " ".join(self.controller.sweep.record.notes[num_notes:])
                if slots is None:
                    group = self._measure_arm(arm, on_progress)
                else:
                    group = self._measure_packs(arm, slots, on_progress)
                groups.append(replace(group, pack_note=note))
            except RunError as error:
                raise RunError(f"the first trial of arm `{arm.name}` must train, but failed: {error}") from error
        return groups

    def _measure_packs(self, arm: Arm, slots: int, on_progress: Callable[[str], None]) -> GroupCost:
        """Measures the largest pack that the sweep trains, and a pack of one slot."""
        arms = self._find_pack_arms(arm)
        names = ", ".join(each.name for each in arms)
        first: list[Assignment] = []
        while len(first) < slots and (assignment := self.take(arms)) is not None:
            first.append(assignment)
        # The first pack may be smaller, because a sampler that learns waits for results. Then trials repeat here.
        confirm_runs = count_confirm_runs(self.definition)
        copies = [
            replace(first[number % len(first)], run_folder=self._make_folder(f"{arm.name}-{number}"))
            for number in range(len(first), min(slots, sum(confirm_runs[each.name] for each in arms)))
        ]
        large: TrainingCost | None = None
        while large is None:
            trained = [*first, *copies][:slots]
            on_progress(f"{names}: {len(trained)} trials in a pack")
            try:
                large = self._train_pack_briefly(trained, slots=slots)
            except OutOfMemory:
                if len(trained) == 1:
                    raise
                slots = len(trained) // 2  # as in the sweep
        for assignment in first[:slots]:
            self._tell_if_complete(assignment)
        small = large
        if large.slots > 1:
            on_progress(f"{names}: 1 trial in a pack")
            alone = replace(first[0], run_folder=self._make_folder(f"{arm.name}-small"))
            small = self._train_pack_briefly([alone], slots=slots)
        group = self._describe_group(tuple(arms), slots=slots, small=small, large=large)
        return replace(group, first_slots=min(len(first), slots))

    def _measure_arm(self, arm: Arm, on_progress: Callable[[str], None]) -> GroupCost:
        """Measures the runs with the least and with the most work of an arm whose trials run alone."""
        assignment = self.take([arm])
        assert assignment is not None  # no trial of the arm has begun
        by_work = sorted(arm.corners, key=estimate_work)
        large = self._measure_alone(arm, by_work[-1], assignment.run_folder, on_progress)
        small = self._measure_alone(arm, by_work[0], self._make_folder(f"{arm.name}-small"), on_progress)
        self._tell_if_complete(assignment)
        return self._describe_group((arm,), slots=1, small=small, large=large)

    def _measure_alone(
        self, arm: Arm, config: RunConfig, run_folder: RunFolder, on_progress: Callable[[str], None]
    ) -> TrainingCost:
        """Measures a run alone, unless a run of the same cost was measured."""
        work = describe_work(self._shorten(config))
        if work not in self._runs_alone:
            on_progress(f"{arm.name}: 1 trial")
            self._runs_alone[work] = self._train_run_briefly(config, run_folder)
        return replace(self._runs_alone[work], config=config)

    def _describe_group(
        self, arms: tuple[Arm, ...], *, slots: int, small: TrainingCost, large: TrainingCost
    ) -> GroupCost:
        test_ratio = answers_s = 0.0
        if self.definition.sweep_config.confirm.seeds:
            splits, data = self.inputs_cache.load(large.config).splits, large.config.data
            test_ratio = int(splits.test().lengths.sum()) / int(splits.validation.lengths.sum())
            answers_s = self._measure_answers(large) if isinstance(data, ChatConfig) and data.generate else 0.0
        return GroupCost(
            arms=arms, slots=slots, small=small, large=large, first_slots=1, test_ratio=test_ratio, answers_s=answers_s
        )

    def _measure_answers(self, training: TrainingCost) -> float:
        """Generates one batch of answers with the weights of a measured run. Returns the seconds for all prompts."""
        config = training.config
        inputs = self.inputs_cache.load(config)
        split = inputs.splits.test()
        assert isinstance(split, TextSplit)
        size = config.trainer.eval_batch_size
        model = restore_model(config, inputs.whole_base(config), folder=training.run / "best")
        began = time.perf_counter()
        score_answers(model, split.select(torch.arange(len(split)) < size), config=config, inputs=inputs)
        seconds = time.perf_counter() - began
        num_prompts = len(gather_references(split))  # type: ignore[arg-type]  # `score_answers` has checked it
        return seconds * max(1.0, num_prompts / size)

    def _train_pack_briefly(self, assignments: Sequence[Assignment], *, slots: int) -> TrainingCost:
        for assignment in assignments:  # the runs of a pack that did not fit
            shutil.rmtree(assignment.run_folder.path, ignore_errors=True)
        requests = [
            RunRequest(config=self._shorten(each.config), run_folder=each.run_folder, on_end=lambda outcome: None)
            for each in assignments
        ]

        def train(inputs: RunInputs, clock: TrainingClock) -> None:
            train_pack(
                requests,
                inputs=inputs,
                slots=slots,
                next_run=lambda: None,
                on_evaluation=lambda evaluations: [clock.note_evaluation()] * len(evaluations),
                state_file=self.path.parent / "pack.json",
                stop_requested=clock.note_step,
            )

        configs = [each.config for each in assignments]
        return self._measure_training(configs, [each.run_folder.path for each in assignments], train)

    def _train_run_briefly(self, config: RunConfig, run_folder: RunFolder) -> TrainingCost:
        def train(inputs: RunInputs, clock: TrainingClock) -> None:
            train_run(
                self._shorten(config),
                run_folder,
                inputs=inputs,
                on_evaluation=lambda step, metrics: clock.note_evaluation(),
                stop_requested=clock.note_step,
            )

        return self._measure_training([config], [run_folder.path], train)

    def _measure_training(
        self,
        configs: Sequence[RunConfig],
        folders: Sequence[Path],
        train: Callable[[RunInputs, TrainingClock], None],
    ) -> TrainingCost:
        """Measures a training of runs with these settings into these folders.

        Raises:
            RunError: No run is complete afterwards.
        """
        config = configs[0]
        inputs = self.inputs_cache.load(self._shorten(config))  # with all weights, also if the sweep shards them
        validation = inputs.splits.validation
        part = take_part(validation, batch_size=config.trainer.eval_batch_size)
        clock = TrainingClock(self.telemetry)
        train(replace(inputs, splits=replace(inputs.splits, validation=part)), clock)
        clock.note_end()
        memory_bytes, host_bytes = peak_memory_bytes(), process_peak_bytes()
        records = {folder: read_run(folder) for folder in folders}
        complete = [folder for folder, record in records.items() if record.status == "complete"]
        if not complete:
            raise RunError(records[folders[0]].reason or records[folders[0]].status)
        steps_s = clock.list_steps(records[complete[0]].steps_done)
        train_split, size = inputs.splits.train, config.trainer.batch_size
        seed = self._choose_data_order(config)
        tokens = count_step_tokens(train_split, size, len(steps_s), seed=seed)
        mean_tokens = size * float(train_split.lengths.double().mean())
        whole = int(validation.lengths.sum()) / int(part.lengths.sum())
        return TrainingCost(
            config=config,
            run=complete[0],
            slots=len(configs),
            loading_s=clock.spent("loading"),
            steps_s=tuple(s * mean_tokens / n for s, n in zip(steps_s, tokens, strict=True))[1:],
            evaluations_s=tuple(whole * seconds for seconds in clock.list_evaluations()),
            saving_s=clock.spent("saving") / len(clock.list_evaluations()),
            memory_bytes=memory_bytes,
            host_bytes=host_bytes,
            trainable_params=max(records[folder].trainable_params for folder in complete),
            kept_bytes=round(fmean(map(_count_bytes, complete))),
        )

    def _make_folder(self, name: str) -> RunFolder:
        """Returns a run folder outside of the sweep, which the report does not see."""
        return RunFolder(path=self.path.parent / name)

    def _tell_if_complete(self, assignment: Assignment) -> None:
        """Tells the controller of a complete run, so that the report shows it."""
        record = read_run(assignment.run_folder.path) if assignment.run_folder.path.is_dir() else None
        if record is not None and record.status == "complete":
            self.controller.tell(assignment, record)

    def _shorten(self, config: RunConfig) -> RunConfig:
        """Returns the settings with few steps, one process and local loggers only."""
        trainer = replace(
            config.trainer,
            max_steps=NUM_EVALUATIONS * STEPS_PER_EVALUATION,
            eval_every_steps=STEPS_PER_EVALUATION,
            early_stop_evaluations=None,
            strategy="auto",
            devices=1,
            num_nodes=1,
        )
        seeds = replace(config.seeds, data_order=self._choose_data_order(config))
        loggers = {name: logger for name, logger in config.logger.items() if logger.name in LOCAL_LOGGERS}
        self.omitted_loggers |= config.logger.keys() - loggers.keys()
        return replace(config, trainer=trainer, logger=loggers, seeds=seeds)

    def _choose_data_order(self, config: RunConfig) -> int:
        """Returns the seed of the data order whose first steps have the most tokens in one step."""
        split, size = self.inputs_cache.load(config).splits.train, config.trainer.batch_size
        key = split, size
        if key not in self._data_orders:
            num_steps = NUM_EVALUATIONS * STEPS_PER_EVALUATION
            self._data_orders[key] = max(
                range(NUM_DATA_ORDERS), key=lambda seed: max(count_step_tokens(split, size, num_steps, seed=seed))
            )
        return self._data_orders[key]


class TrainingClock:
    """Reads the telemetry of the process after each step and each evaluation of one training."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._began = telemetry.sample()
        self._ended = self._began
        self._training: list[float] = []
        self._evaluating: list[float] = []

    def note_step(self) -> bool:
        """Notes the end of a step. Returns False, because the training continues."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # otherwise a step would only count the time to start its kernels
        self._training.append(self._telemetry.sample()["training_s"])
        return False

    def note_evaluation(self) -> bool:
        """Notes the end of an evaluation. Returns True, because the training continues."""
        self._evaluating.append(self._telemetry.sample()["evaluating_s"])
        return True

    def note_end(self) -> None:
        self._ended = self._telemetry.sample()

    def spent(self, phase: str) -> float:
        """Returns the seconds of one phase of the training."""
        return self._ended[f"{phase}_s"] - self._began[f"{phase}_s"]

    def list_steps(self, num_steps: int) -> list[float]:
        """Returns the seconds of each step of a training with this number of steps."""
        # `train_run` does not ask whether to stop after the last step
        ends = [*self._training[: num_steps - 1], self._ended["training_s"]] if num_steps else []
        return [end - start for start, end in zip([self._began["training_s"], *ends], ends, strict=False)]

    def list_evaluations(self) -> list[float]:
        """Returns the seconds of each evaluation."""
        starts = [self._began["evaluating_s"], *self._evaluating]
        return [end - start for start, end in zip(starts, self._evaluating, strict=False)]


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitPart(Split):
    """Some examples of a split."""

    whole: Split
    rows: tuple[int, ...]
    """Indices of the examples in the whole split."""

    @property
    def lengths(self) -> Tensor:
        return self.whole.lengths[torch.tensor(self.rows)]

    @property
    def weights(self) -> Tensor:
        return self.whole.weights[torch.tensor(self.rows)]

    def batch(self, indices: Sequence[int], *, slots: int = 1) -> Batch:
        return self.whole.batch([self.rows[index] for index in indices], slots=slots)

    def describe(self) -> dict[str, Any]:
        return self.whole.describe()


def take_part(split: Split, *, batch_size: int) -> Split:
    """Returns a split with at most `MAX_EVALUATION_BATCHES` batches of an evaluation, evenly spaced by length."""
    batches = EvaluationSampler(split, batch_size=batch_size).batches
    if len(batches) <= MAX_EVALUATION_BATCHES:
        return split
    # from the last batch backwards: it has the longest examples
    taken = batches[:: -math.ceil(len(batches) / MAX_EVALUATION_BATCHES)]
    rows = tuple(row for batch in taken for row in batch)
    return SplitPart(name=split.name, fingerprint=split.fingerprint, whole=split, rows=rows)


def count_step_tokens(split: Split, batch_size: int, num_steps: int, *, seed: int) -> list[int]:
    """Returns the number of tokens, without padding, of the first steps of a run."""
    order = StepBatchSampler(split, batch_size=batch_size, num_steps=num_steps, seed=seed)
    return [int(split.lengths[torch.tensor(order.get_step_indices(step))].sum()) for step in range(num_steps)]


def estimate_work(config: RunConfig) -> tuple[int, int]:
    """Returns a key that sorts runs of one arm by their work: by tokens, then by rank."""
    return count_tokens(config), getattr(config.method, "rank", 0)


def describe_work(config: RunConfig) -> str:
    """Returns a text that is equal for runs of equal time and memory."""
    return json.dumps(_drop_free_settings(as_settings(config)), sort_keys=True, default=str)


def _drop_free_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        name: _drop_free_settings(value, f"{prefix}{name}.") if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if f"{prefix}{name}" not in SETTINGS_WITHOUT_COST
    }


def _count_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
