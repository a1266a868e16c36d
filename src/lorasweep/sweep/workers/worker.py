"""The loop of a worker: take a pack from the controller, train it, tell the controller the outcome of each trial.

A worker runs in the controller's process, or in its own: on this machine (`local_workers`) or as a Ray actor
(`ray_workers`).
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorasweep.console import RUNNING_TRAINING
from lorasweep.errors import (
    Diverged,
    LoraSweepError,
    OutOfMemory,
    RecordError,
    RunError,
    WorkerError,
    describe_error,
)
from lorasweep.record import RunRecord, read_run
from lorasweep.report.facts import MAX_CUT_OFF_SHARE
from lorasweep.sweep.controller.controller import Assignment, Controller
from lorasweep.sweep.controller.folder import check_disk, find_checkpoint
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.sweep.definition.confirm import has_fixed_score
from lorasweep.sweep.definition.packing import group_arms
from lorasweep.training.checkpoint import split_checkpoint
from lorasweep.training.finished_run import score_run, write_base_answers
from lorasweep.training.inputs import InputsCache
from lorasweep.training.pack_size import PackSize, choose_pack_size
from lorasweep.training.run import train_runs

ASK_INTERVAL_S = 0.5
"""Seconds until a worker asks again after it got no pack, while other workers train."""


class RemoteController:
    """Calls the methods of a controller in another process."""

    def __init__(self, call: Callable[..., Any]) -> None:
        """`call(name, *args, **kwargs)` returns the answer of the controller's method."""
        self._call = call

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._call, name)


@dataclass(kw_only=True, eq=False)
class Worker:
    """Trains the packs that the controller hands out, until the sweep is over or the worker is stopped."""

    path: Path
    definition: Definition
    controller: Controller
    """The sweep's controller, or a `RemoteController` for a controller in another process."""
    test_metric: str
    """The metric on test data of a complete confirm run."""
    inputs_cache: InputsCache
    stop_requested: Callable[[], bool]
    """Called before the first and after every step of a training. If it returns True, the worker stops, and its trials
    keep their last checkpoints."""
    name: str = ""
    """Unique name of the worker. Empty for a worker in the controller's process, which is the only worker."""
    num_workers: int = 1
    """Number of workers that share the trials. More workers mean smaller packs."""
    train_runs: Callable[..., bool] | None = None
    """Replaces `train_runs`, for example to train with several processes."""

    def __post_init__(self) -> None:
        self.inputs_cache.folder = self.path
        self._is_interrupted = False
        self._slots: dict[str, int] = {}  # by arm

    def run(self) -> None:
        """Trains until the sweep is over."""
        if not self.controller.is_over():
            self._choose_slots()
        while not (self._is_interrupted or self.stop_requested()):
            if pack := self.controller.take(worker=self.name, slots=self._slots):
                self._train(pack)
            elif self.controller.is_over():
                break
            else:  # packs of other workers may be released, or the next round or stage may begin
                time.sleep(ASK_INTERVAL_S)

    def _choose_slots(self) -> None:
        for arms in group_arms(self.definition):
            size = choose_slots(self.definition, arms, inputs_cache=self.inputs_cache, num_workers=self.num_workers)
            self.controller.note([size.reason] if size.reason else [])
            self._slots |= {arm.name: size.slots for arm in arms}

    def _train(self, pack: Sequence[Assignment]) -> None:
        """Trains a pack from its checkpoint, or from step 0, and tells the controller how each trial ended.

        Trials of an interrupted pack stay assigned to this worker until the sweep is resumed.
        """
        running, unscored = list[Assignment](), list[Assignment]()

        def end(assignment: Assignment, outcome: RunRecord | Diverged) -> None:
            if isinstance(outcome, RunRecord) and outcome.status == "interrupted":
                return
            running.remove(assignment)
            if isinstance(outcome, Diverged):
                self.controller.tell_failure(assignment, outcome)
            elif outcome.status == "complete" and assignment.reads_test:
                unscored.append(assignment)  # scoring moves the base, so it waits for the end of the pack
            else:
                self.controller.tell(assignment, outcome)

        for assignment in pack:
            running.append(assignment)
            record = None
            with suppress(RecordError):
                record = read_run(assignment.run_folder.path)
            # A killed process may have ended the run without telling the controller. Such a run must not train again.
            if record is not None and record.status in ("complete", "stopped"):
                end(assignment, record)
        if running:
            self._train_rest(running, on_end=end)
        for assignment in () if self._is_interrupted else unscored:
            try:
                self.controller.tell(assignment, self._score(assignment))
            except WorkerError:
                raise
            except Exception as error:
                self.controller.tell_failure(assignment, _make_portable(error))

    def _train_rest(self, running: list[Assignment], *, on_end: Callable[..., None]) -> None:
        """Trains the trials of a pack that have not ended. `on_end` removes those that end from `running`.

        An error of a trial must not end the sweep. If memory runs out, a pack continues as two halves, and after any
        other error as packs of one, so that only the trial that causes the error fails.
        """
        config, file = running[0].config, find_checkpoint(self.path, running[0].trial.pack)
        file.parent.mkdir(exist_ok=True)
        try:
            self._is_interrupted = not (self.train_runs or train_runs)(
                list(running),
                inputs=self.inputs_cache.load(config),
                checkpoint_file=file,
                on_evaluation=self.controller.report,
                on_end=on_end,
                stop_requested=self.stop_requested,
                on_phase=RUNNING_TRAINING.note,
            )
        except WorkerError:
            raise
        except Exception as error:
            check_disk(self.path, error)
            if len(running) == 1:
                self.controller.tell_failure(running[0], _make_portable(error))
            elif running:
                self._split(running, error)

    def _split(self, running: Sequence[Assignment], error: Exception) -> None:
        size = math.ceil(len(running) / 2) if isinstance(error, OutOfMemory) else 1
        if isinstance(error, OutOfMemory):
            arms = next(arms for arms in group_arms(self.definition) if running[0].arm.name in [a.name for a in arms])
            self._slots |= {arm.name: size for arm in arms}
        packs = [running[first : first + size] for first in range(0, len(running), size)]
        names = [running[0].trial.pack, *(pack[0].run_folder.path.name for pack in packs[1:])]
        # A process may be killed between any two writes. So the checkpoint of each new pack is written before the
        # controller knows the pack, and the old file, which the first pack inherits, keeps the states of all.
        parts = {
            find_checkpoint(self.path, name): [one.run_folder.path.name for one in (pack if number else running)]
            for number, (name, pack) in enumerate(zip(names, packs, strict=True))
        }
        split_checkpoint(find_checkpoint(self.path, names[0]), parts)
        self.controller.split(packs)
        self.controller.warn(
            f"A pack broke, so its trials continue in packs of at most {size} slots. {describe_error(error)}."
        )

    def _score(self, assignment: Assignment) -> RunRecord:
        inputs = self.inputs_cache.load(assignment.config)
        others = self.definition.retained.items()
        retained = {name: self.inputs_cache.load_splits(data, assignment.config) for name, data in others}
        record = score_run(assignment.run_folder.path, inputs=inputs, retained=retained)
        self.controller.note(inputs.splits.test().notes)
        answers = record.answers.get("test", {})  # the base answers first, hours before the report
        if answers.get("cut_off", 0) > MAX_CUT_OFF_SHARE * answers.get("examples", 0):
            self.controller.warn(
                "Many generated answers are cut off at `data.answers.max_new_tokens`. If they are right so far, stop "
                "the sweep and start a new one with a larger number."
            )
        if not any(has_fixed_score(arm) for arm in self.definition.arms):
            write_base_answers(self.path, assignment.config, inputs=inputs)
        if self.test_metric not in record.test:
            raise RunError(str(record.answers["test"]["problem"]))
        return record


def _make_portable(error: Exception) -> Exception:
    """Returns an error that another process can read. One of a user's class may fail to be pickled."""
    if isinstance(error, LoraSweepError | OSError):
        return error
    return RunError(traceback.format_exception_only(error)[-1].strip())


def choose_slots(
    definition: Definition, arms: Sequence[Arm], *, inputs_cache: InputsCache, num_workers: int
) -> PackSize:
    """Returns how many trials of a group of arms (`group_arms`) train together at most, and the reason.

    It is 1 if each trial trains alone. The reason is empty if `worker.pack_size` says it.
    """
    plan, wanted = arms[0].packing, arms[0].sweep_config.worker.pack_size
    if plan.key is None:
        return PackSize(1, "")
    if wanted != "auto":
        return PackSize(wanted, "")
    trials = math.ceil(sum(arm.trials for arm in arms) / num_workers)
    return choose_pack_size(plan.largest, inputs=inputs_cache.load(plan.largest), trials_left=trials)
