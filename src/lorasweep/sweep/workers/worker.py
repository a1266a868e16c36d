"""The loop of a worker: take a trial from the controller, train it alone or in a pack, tell the controller.

A worker runs in the controller's process, or in a process of its own as a Ray actor (`ray_workers`).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from lorasweep.errors import OutOfMemory, RecordError, WorkerError
from lorasweep.record import RunRecord, read_run
from lorasweep.sweep.controller.controller import Assignment, Controller
from lorasweep.sweep.controller.folder import PACK_FILE, check_writable
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.sweep.definition.packing import plan_packing
from lorasweep.training.inputs import InputsCache
from lorasweep.training.packs.pack import train_pack
from lorasweep.training.packs.size import choose_pack_size
from lorasweep.training.packs.slots import RunRequest, SlotEvaluation
from lorasweep.training.packs.state import read_pack_state
from lorasweep.training.run import train_run
from lorasweep.training.score import score_run

LOSS = "loss"
"""The metric that every task has beside its own."""
POLL_INTERVAL_S = 2.0
"""Seconds after which a worker without a trial asks again, while other workers train."""
Outcome: TypeAlias = RunRecord | Exception
"""How a training ended: with a record (complete, paused or interrupted) or with an error."""


@dataclass(kw_only=True, eq=False)
class Worker:
    """Trains the trials that the controller hands out, until the sweep is over or the worker is stopped."""

    path: Path
    """The sweep's folder."""
    definition: Definition
    controller: Controller
    """The sweep's controller, or a client of it in another process."""
    metric: str
    """The metric that every trial is scored by."""
    inputs_cache: InputsCache
    stop_requested: Callable[[], bool]
    """Asked after every step; the worker then stops, and each of its trials keeps its last checkpoint."""
    name: str = ""
    """Tells this worker from others. The only worker of a sweep, in the controller's process, has no name."""
    num_workers: int = 1
    """Workers that share the trials; decides the size of a pack."""
    train_alone: Callable[..., RunRecord] | None = None
    """Trains a run outside of a pack in place of `train_run`, such as with several processes."""

    def __post_init__(self) -> None:
        self.telemetry = self.inputs_cache.telemetry
        self._pack_file = self.path / (f"pack-{self.name}.json" if self.name else PACK_FILE)
        self._requests = itertools.count(1)
        self._plans = plan_packing(self.definition)
        self._pack_limits: dict[Any, int | None] = {}  # by what trials share; None where packs do not pay
        self._is_interrupted = False

    def run(self) -> None:
        """Trains until the sweep is over or the worker is stopped.

        Raises:
            WorkerError: `sweep.max_failures` trials in a row failed, the sweep's folder can't be written to, or its
                database does not answer.
        """
        self._resume_pack()
        while (assignment := self._wait_for_trial()) is not None:
            if (slots := self._choose_slots(assignment.arm)) is not None:
                self._train_pack([assignment], slots=slots)
            else:
                self.tell(assignment, self._train_alone(assignment))
        self._note_usage()

    def _wait_for_trial(self) -> Assignment | None:
        """Returns the next trial, waiting while others train the last ones; None if the sweep is over or stopped."""
        while not (self._is_interrupted or self.stop_requested()):
            if (assignment := self.take(tell=self.tell)) is not None:
                return assignment
            if self.controller.is_over():
                return None
            time.sleep(POLL_INTERVAL_S)  # a trial may still be released, resumed, or belong to the next stage
        return None

    def take(
        self, arms: Sequence[Arm] | None = None, *, tell: Callable[[Assignment, Outcome], None]
    ) -> Assignment | None:
        """Returns the next trial to train, or None where there is none now.

        Args:
            arms: Only trials of these arms; None stands for all.
            tell: Takes the record of a trial that needs no training, because its process was killed after its run.
        """
        names = None if arms is None else [arm.name for arm in arms]
        with self.telemetry.phase("storage"):
            while assignment := self.controller.take(names, worker=self.name, request=next(self._requests)):
                if (record := find_ended_run(self.controller, assignment)) is None:
                    return assignment
                tell(assignment, record)
        return None

    def report(self, evaluations: Sequence[tuple[Assignment, int, Mapping[str, float]]]) -> list[bool]:
        """Reports trial, step and metrics of one moment's evaluations; returns for each trial whether it goes on."""
        with self.telemetry.phase("storage"):
            return self.controller.report(
                [(assignment, step, values[self.metric]) for assignment, step, values in evaluations],
                losses={assignment: values[LOSS] for assignment, _, values in evaluations if LOSS in values},
            )

    def tell(self, assignment: Assignment, outcome: Outcome) -> None:
        """Tells the controller how a training ended; a complete run is scored on test data first where the stage does.

        An interrupted run is not told: its trial stays this worker's until the sweep is resumed.
        """
        if isinstance(outcome, RunRecord) and outcome.status == "interrupted":
            self._is_interrupted = True
            return
        if isinstance(outcome, RunRecord) and outcome.status == "complete" and assignment.reads_test:
            outcome = self._score(assignment)
        with self.telemetry.phase("storage"):
            if isinstance(outcome, Exception):
                self.controller.tell_failure(assignment, outcome)
            else:
                self.controller.tell(assignment, outcome)
        self._note_usage()

    def _train_alone(self, assignment: Assignment) -> Outcome:
        try:
            return (self.train_alone or train_run)(
                assignment.config,
                assignment.place,
                inputs=self.inputs_cache.load(assignment.config),
                on_evaluation=lambda step, values: self.report([(assignment, step, values)])[0],
                stop_requested=self.stop_requested,
                resume=True,
            )
        except WorkerError:
            raise
        except Exception as error:  # a broken trial must not end the sweep
            return error

    def _score(self, assignment: Assignment) -> Outcome:
        try:
            inputs = self.inputs_cache.load(assignment.config)
            record = score_run(assignment.place.folder, inputs=inputs)
            self.controller.note(inputs.splits.test().notes)
        except WorkerError:
            raise
        except Exception as error:  # a run that can't be scored must not end the sweep
            return error
        return record

    def _resume_pack(self) -> None:
        """Resumes the pack of a process that was killed or stopped: the same runs in the same slots at the same steps.

        Then every later number has the bits that it would have had without the interruption.
        """
        state = read_pack_state(self._pack_file)
        if state is None or self.name:  # a worker that is replaced has another name; its trials are resumed one by one
            return
        taken = [self.controller.take_back(slot.folder_name) for slot in state.slots]
        found = [assignment for assignment in taken if assignment is not None]
        if len(found) == len(taken):  # else it is the pack of another stage
            slots = max(self._choose_slots(found[0].arm) or 1, len(found))
            self._train_pack(found, slots=slots, start_steps=[slot.step for slot in state.slots])

    def _train_pack(self, first: Sequence[Assignment], *, slots: int, start_steps: Sequence[int] | None = None) -> None:
        """Trains trials of all arms that can share a pack, until none of them is left or the worker is stopped.

        Args:
            first: Trials for the first slots. The others are filled by the controller, unless the pack is resumed.
            slots: Trials that train at once, at most.
            start_steps: The steps of the first trials in a pack that is resumed.
        """
        plan = self._plans[first[0].arm.name]
        pack = _PackTrials(self, arms=self._pack_mates(first[0].arm))
        steps: Sequence[int | None] = start_steps or [None] * len(first)
        requests = [pack.add(assignment, start_step=step) for assignment, step in zip(first, steps, strict=True)]
        while start_steps is None and len(requests) < slots and (request := pack.next_run()) is not None:
            requests.append(request)
        try:
            is_done = train_pack(
                requests,
                inputs=self.inputs_cache.load(first[0].config),
                slots=slots,
                next_run=pack.next_run,
                on_evaluation=pack.report,
                state_file=self._pack_file,
                stop_requested=self.stop_requested,
            )
        except WorkerError:
            raise
        except Exception as error:
            check_writable(self.path, error)
            # The trials resume from their last evaluation. After memory ran out they do so in smaller packs, after any
            # other error in packs of one, where the trial that is to blame fails by itself.
            smaller = len(pack.running) // 2 if isinstance(error, OutOfMemory) else 1
            self._pack_limits[plan.key] = max(1, smaller)
            self.controller.release(list(pack.running.values()))
            is_done = True
        self._is_interrupted = not is_done
        for assignment, record in pack.unscored if is_done else ():
            self.tell(assignment, record)

    def _pack_mates(self, arm: Arm) -> list[Arm]:
        key = self._plans[arm.name].key
        return [other for other in self.definition.arms if self._plans[other.name].key == key]

    def _choose_slots(self, arm: Arm) -> int | None:
        """Returns how many trials of an arm train together: `worker.pack_size`, or the answer of `choose_pack_size`.

        None means that each trains alone, outside of packs. A pack of one is not the same: a run that began in a pack
        can be resumed in packs only.
        """
        plan, wanted = self._plans[arm.name], arm.sweep_config.worker.pack_size
        if plan.key is None or wanted == 1:
            return None
        if plan.key not in self._pack_limits:
            self._pack_limits[plan.key] = self._measure_slots(arm) if wanted == "auto" else wanted
        return self._pack_limits[plan.key]

    def _measure_slots(self, arm: Arm) -> int | None:
        config = self._plans[arm.name].largest
        trials = math.ceil(sum(mate.trials for mate in self._pack_mates(arm)) / self.num_workers)
        chosen = choose_pack_size(config, inputs=self.inputs_cache.load(config), trials_left=trials)
        self.controller.note([chosen.reason])
        return None if chosen.slots == 1 else chosen.slots

    def _note_usage(self) -> None:
        self.controller.note_usage(self.name, self.telemetry.sample())


class _PackTrials:
    """The trials of one pack: which request is for which trial, and the runs to score once the pack has ended."""

    def __init__(self, worker: Worker, *, arms: list[Arm]) -> None:
        self.running: dict[RunRequest, Assignment] = {}
        self.unscored: list[tuple[Assignment, Outcome]] = []
        """Complete runs of a stage that reads test data. Scoring moves the base, on which the pack still trains."""
        self._worker = worker
        self._arms = arms

    def add(self, assignment: Assignment, *, start_step: int | None = None) -> RunRequest:
        """Returns a trial in the form in which the pack takes it."""
        request = RunRequest(
            config=assignment.config,
            place=assignment.place,
            on_end=lambda record: self._tell(self.running.pop(request), record),
            on_failure=lambda error: self._tell(self.running.pop(request), error),
            start_step=start_step,
        )
        self.running[request] = assignment
        return request

    def next_run(self) -> RunRequest | None:
        """Returns the next trial that can share the pack, or None where there is none now."""
        assignment = self._worker.take(self._arms, tell=self._tell)
        return None if assignment is None else self.add(assignment)

    def report(self, evaluations: Sequence[SlotEvaluation]) -> list[bool]:
        """Reports the evaluations of all slots in one call, and returns for each run whether it continues."""
        return self._worker.report([(self.running[e.request], e.step, e.values) for e in evaluations])

    def _tell(self, assignment: Assignment, outcome: Outcome) -> None:
        if assignment.reads_test and not isinstance(outcome, Exception):
            self.unscored.append((assignment, outcome))
        else:
            self._worker.tell(assignment, outcome)


def find_ended_run(controller: Controller, assignment: Assignment) -> RunRecord | None:
    """Returns the record of a run whose process was killed after the run had ended, but before that was told."""
    try:
        record = read_run(assignment.place.folder)
    except RecordError:
        return None
    is_paused = record.status == "paused" and controller.awaits_pause(assignment, step=record.steps_done)
    return record if record.status == "complete" or is_paused else None
