"""The loop of a worker: take a trial from the controller, train it alone or in a pack, tell the controller the outcome.

A worker runs in the controller's process, or as a Ray actor in its own process (`ray_workers`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from lorasweep.console import RUNNING_TRAINING
from lorasweep.errors import OutOfMemory, RecordError, RunError, WorkerError, describe_error
from lorasweep.record import RunRecord, read_run
from lorasweep.report.facts import MAX_CUT_OFF_SHARE
from lorasweep.sweep.controller.controller import Assignment, Controller
from lorasweep.sweep.controller.folder import PACK_FILE, check_disk
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.sweep.definition.confirm import has_fixed_score
from lorasweep.sweep.definition.packing import list_pack_arms
from lorasweep.training.checkpoint import PackCheckpoint, read_pack
from lorasweep.training.finished_run import score_run, write_base_answers
from lorasweep.training.inputs import InputsCache
from lorasweep.training.packs.pack import train_pack
from lorasweep.training.packs.size import PackSize, choose_pack_size
from lorasweep.training.run import train_alone

ASK_INTERVAL_S = 2.0
"""Seconds until a worker asks again after it got no trial, while other workers train."""
Trained: TypeAlias = RunRecord | Exception
"""Result of a training: a record (complete, stopped or interrupted) or an error."""


@dataclass(kw_only=True, eq=False)
class Worker:
    """Trains the trials that the controller hands out, until the sweep is over or the worker is stopped."""

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
    train_alone: Callable[..., RunRecord] | None = None
    """Replaces `train_alone` for runs outside of packs, for example to train with several processes."""

    def __post_init__(self) -> None:
        self.inputs_cache.folder = self.path
        self._pack_file = self.path / (f"pack-{self.name}.ckpt" if self.name else PACK_FILE)
        self._max_slots: dict[Any, int | None] = {}  # by `ArmPacking.key`; None if each trial trains alone
        self._is_interrupted = False
        self._unscored: list[tuple[Assignment, RunRecord]] | None = None
        """Runs to score on test data after the current pack, because scoring moves the base. None if no pack trains."""

    def run(self) -> None:
        """Trains until the sweep is over."""
        # The pack is resumed before `take` is called, which would hand out its trials one by one.
        self._resume_pack()
        while not (self._is_interrupted or self.stop_requested()):
            if (assignment := self.take()) is None:
                if self.controller.is_over():
                    break
                # trials of other workers may be released, or the next batch or stage may begin
                time.sleep(ASK_INTERVAL_S)
            elif (slots := self._choose_slots(assignment.arm)) is not None:
                self._train_pack([assignment], slots=slots)
            else:
                self.tell(assignment, _catch_failure(self._train_alone, assignment))

    def _resume_pack(self) -> None:
        """Resumes the pack of a killed or stopped process, with the same runs in the same slots at the same steps.

        So the results are bit-identical to those without the interruption.
        """
        # Only the worker without a name can have a file of an earlier process. A dead worker on Ray is replaced by a
        # worker with another name, and the controller hands out the trials of the dead worker one by one.
        checkpoint = None if self.name else read_pack(self._pack_file)
        if checkpoint is None:
            return
        assignments = [self.controller.take_by_folder(folder) for folder in checkpoint.runs]
        resumable = [assignment for assignment in assignments if assignment is not None]
        if len(resumable) < len(assignments):  # the process was killed when all trials of this stage had ended
            self._pack_file.unlink()
        else:
            slots = max(self._choose_slots(resumable[0].arm) or 1, len(resumable))
            self._train_pack(resumable, slots=slots, resumed=checkpoint)

    def take(self, arms: Sequence[Arm] | None = None) -> Assignment | None:
        """Returns the next trial to train, of the given arms or of all arms. None if no trial can train now."""
        names = None if arms is None else [arm.name for arm in arms]
        # A killed process may have ended the run without telling the controller. Such a run must not train again.
        while assignment := self.controller.take(names, worker=self.name):
            record = None
            with suppress(RecordError):
                record = read_run(assignment.run_folder.path)
            if record is None or record.status not in ("complete", "stopped"):
                return assignment
            self.tell(assignment, record)
        return None

    def tell(self, assignment: Assignment, outcome: Trained) -> None:
        """Tells the controller the outcome of a training.

        Scores a complete run of the confirm stage on test data first. Skips an interrupted run, whose trial stays
        assigned to this worker until the sweep is resumed.
        """
        if isinstance(outcome, RunRecord) and outcome.status == "interrupted":
            self._is_interrupted = True
            return
        if isinstance(outcome, RunRecord) and outcome.status == "complete" and assignment.reads_test:
            if self._unscored is not None:
                self._unscored.append((assignment, outcome))
                return
            outcome = _catch_failure(self._score, assignment)
        if isinstance(outcome, Exception):
            self.controller.tell_failure(assignment, outcome)
        else:
            self.controller.tell(assignment, outcome)

    def _train_alone(self, assignment: Assignment) -> RunRecord:
        config, folder = assignment.config, assignment.run_folder
        inputs = self.inputs_cache.load(config)
        return (self.train_alone or train_alone)(
            config,
            folder,
            inputs=inputs,
            on_evaluation=lambda step, metrics: self.controller.report([(assignment, step, metrics)])[0],
            stop_requested=self.stop_requested,
            on_phase=RUNNING_TRAINING.note,
            resume=True,
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

    def _train_pack(
        self, first_trials: Sequence[Assignment], *, slots: int, resumed: PackCheckpoint | None = None
    ) -> None:
        """Trains trials that can share a pack, of all arms, until no such trial is left or the worker is stopped.

        The controller fills the other slots, except in a resumed pack, whose checkpoint has all of its trials.
        """
        key = first_trials[0].arm.packing.key
        arms = list_pack_arms(self.definition, first_trials[0].arm)
        running = list(first_trials)

        def next_run() -> Assignment | None:
            if (assignment := self.take(arms)) is not None:
                running.append(assignment)
            return assignment

        def end(assignment: Assignment, outcome: Trained) -> None:
            running.remove(assignment)
            self.tell(assignment, outcome)

        self._unscored = []
        # A resumed pack is not filled up: it must have the same slots as before the interruption.
        while resumed is None and len(running) < slots and next_run() is not None:
            pass
        try:
            is_done = train_pack(
                list(running),
                inputs=self.inputs_cache.load(first_trials[0].config),
                slots=slots,
                next_run=next_run,
                on_evaluation=self.controller.report,
                on_end=end,
                checkpoint_file=self._pack_file,
                resumed=resumed,
                stop_requested=self.stop_requested,
                on_phase=RUNNING_TRAINING.note,
            )
        except WorkerError:
            raise
        except Exception as error:
            check_disk(self.path, error)
            # The trials resume from their last evaluation: in smaller packs if memory ran out, after any other error in
            # packs of one slot. A trial that also breaks such a pack begins again alone, with smaller micro-batches if
            # memory runs out again. There only the trial that causes the error fails.
            smaller = len(running) // 2 if isinstance(error, OutOfMemory) else min(1, len(running) - 1)
            self._max_slots[key] = smaller or None
            size = f"continue in packs of at most {smaller} slots" if smaller else "train alone"
            self.controller.warn(f"A pack broke, so its trials {size}. {describe_error(error)}.")
            self.controller.release(running)
            is_done = True
        self._is_interrupted = not is_done
        unscored, self._unscored = self._unscored, None
        for assignment, record in unscored if is_done else ():
            self.tell(assignment, record)

    def _choose_slots(self, arm: Arm) -> int | None:
        """Returns how many trials of an arm train together: `worker.pack_size`, or the result of `choose_pack_size`.

        None means that each trial trains alone, by `train_alone`. A pack with one slot is different: only it can resume
        a run that began in a pack.
        """
        key, wanted = arm.packing.key, arm.sweep_config.worker.pack_size
        if key is None or wanted == 1:
            return None
        if key not in self._max_slots:
            chosen = choose_slots(self.definition, arm, inputs_cache=self.inputs_cache, num_workers=self.num_workers)
            self.controller.note([chosen.reason] if chosen.reason else [])
            self._max_slots[key] = None if chosen.slots == 1 else chosen.slots
        return self._max_slots[key]


def choose_slots(definition: Definition, arm: Arm, *, inputs_cache: InputsCache, num_workers: int) -> PackSize:
    """Returns how many trials of an arm train together at most, and the reason.

    It is 1 if each trial trains alone. The reason is empty if `worker.pack_size` says it.
    """
    plan, wanted = arm.packing, arm.sweep_config.worker.pack_size
    if plan.key is None:
        return PackSize(1, "")
    if wanted != "auto":
        return PackSize(wanted, "")
    trials = math.ceil(sum(other.trials for other in list_pack_arms(definition, arm)) / num_workers)
    return choose_pack_size(plan.largest, inputs=inputs_cache.load(plan.largest), trials_left=trials)


def _catch_failure(train: Callable[[Assignment], RunRecord], assignment: Assignment) -> Trained:
    """Returns an error of a trial instead of raising it, because a failed trial must not end the sweep."""
    try:
        return train(assignment)
    except WorkerError:
        raise
    except Exception as error:
        return error
