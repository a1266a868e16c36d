"""The loop of a worker: take a trial from the controller, or a pack of them, train, report, tell.

A worker runs in the controller's process, or in one of its own as a Ray actor (`ray_workers`).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorasweep.errors import OutOfMemory, RecordError, WorkerError
from lorasweep.record import RunRecord, read_run
from lorasweep.sweep.controller.controller import Assignment, Controller
from lorasweep.sweep.controller.folder import PACK_FILE, check_writable
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.sweep.definition.packing import plan_packing
from lorasweep.training.inputs import InputsCache
from lorasweep.training.packs.pack import train_pack
from lorasweep.training.packs.size import choose_pack_size
from lorasweep.training.packs.slots import Evaluated, Job
from lorasweep.training.packs.state import read_pack_state
from lorasweep.training.run import train_run
from lorasweep.training.score import score_run

LOSS = "loss"
"""The metric that every task has beside its own."""
POLL_INTERVAL_S = 2.0
"""Seconds after which a worker without a trial asks again, while other workers train."""


class Worker:
    """Trains the trials that the controller hands out, until the sweep is over."""

    def __init__(
        self,
        path: Path,
        definition: Definition,
        controller: Controller,
        *,
        metric: str,
        inputs_cache: InputsCache,
        stop_requested: Callable[[], bool],
        name: str = "",
        num_workers: int = 1,
        train_alone: Callable[..., RunRecord] | None = None,
    ) -> None:
        """Takes what a worker needs.

        Args:
            path: The sweep's folder.
            definition: The sweep.
            controller: It, or a client of it in another process.
            metric: What every trial is scored by.
            inputs_cache: Base models and data.
            stop_requested: Asked after every step.
            name: Tells this worker from others. The only worker of a sweep, in the controller's process, has none.
            num_workers: How many workers share the trials, for the size of a pack.
            train_alone: Trains a run outside of a pack in place of `train_run`, such as with several processes.
        """
        self.path = path
        self.definition = definition
        self.controller = controller
        self.metric = metric
        self.inputs_cache = inputs_cache
        self.stop_requested = stop_requested
        self.name = name
        self.num_workers = num_workers
        self._train_run = train_alone or train_run
        self.pack_file = path / (f"pack-{name}.json" if name else PACK_FILE)
        self._requests = itertools.count(1)
        self._plans = plan_packing(definition)
        self._pack_limits: dict[Any, int | None] = {}
        """Most slots of a pack, by what its trials share; None where packs don't pay."""

    def run(self) -> bool:
        """Trains until the sweep is over, and returns whether it is (False: the worker was stopped).

        Raises:
            WorkerError: `sweep.max_failures` trials in a row failed, the sweep's folder can't be written to, or its
                database does not answer.
        """
        is_over = self._resume_pack() and self._train()
        self._note_usage()
        return is_over

    def _train(self) -> bool:
        while not self.stop_requested():
            if (assignment := self._take()) is not None:
                if not self._train_assignment(assignment):
                    return False
            elif self.controller.is_over():
                return True
            else:  # others train the last trials, or those that decide what goes on
                time.sleep(POLL_INTERVAL_S)
        return False

    def _train_assignment(self, assignment: Assignment) -> bool:
        slots = self._num_slots(assignment.arm)
        return self._train_alone(assignment) if slots is None else self._train_pack([assignment], slots=slots)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Counts the time in which the controller is asked or told."""
        with self.inputs_cache.telemetry.phase("storage"):
            yield

    def _note_usage(self) -> None:
        self.controller.note_usage(self.name, self.inputs_cache.telemetry.sample())

    def _take(
        self, arms: Sequence[Arm] | None = None, *, tell: Callable[[Assignment, RunRecord], None] | None = None
    ) -> Assignment | None:
        """The next trial to train. One whose process was killed after its run ended is told instead.

        Args:
            arms: Only trials of these arms; None stands for all.
            tell: Takes a run that had ended; None is `_tell`.
        """
        names = None if arms is None else [arm.name for arm in arms]
        with self._asking():
            while assignment := self.controller.take(names, worker=self.name, request=next(self._requests)):
                record = find_ended_run(self.controller, assignment)
                if record is None:
                    return assignment
                (tell or self._tell)(assignment, record)
        return None

    def _tell(self, assignment: Assignment, record: RunRecord) -> None:
        """Tells the controller of a run that is complete or paused, scored on test data first where the stage does."""
        if record.status == "complete" and assignment.reads_test:
            try:
                inputs = self.inputs_cache.of(assignment.config)
                record = score_run(assignment.place.folder, inputs=inputs)
                self.controller.note(inputs.splits.test().notes)
            except WorkerError:
                raise
            except Exception as error:  # a run that can't be scored must not end the sweep
                self.controller.tell_failure(assignment, error)
                return
        with self._asking():
            self.controller.tell(assignment, record)
        self._note_usage()

    def _report(self, evaluations: Sequence[tuple[Assignment, int, Mapping[str, float]]]) -> list[bool]:
        with self._asking():
            return self.controller.report(
                [(assignment, step, values[self.metric]) for assignment, step, values in evaluations],
                losses={assignment: values[LOSS] for assignment, _, values in evaluations if LOSS in values},
            )

    def _train_alone(self, assignment: Assignment) -> bool:
        """Trains one trial and tells the controller; returns False if it was interrupted."""
        try:
            record = self._train_run(
                assignment.config,
                assignment.place,
                inputs=self.inputs_cache.of(assignment.config),
                on_evaluation=lambda step, values: self._report([(assignment, step, values)])[0],
                stop_requested=self.stop_requested,
                resume=True,
            )
        except WorkerError:
            raise
        except Exception as error:  # a broken trial must not end the sweep
            self.controller.tell_failure(assignment, error)
            return True
        if record.status == "interrupted":
            return False
        self._tell(assignment, record)
        return True

    def _resume_pack(self) -> bool:
        """Goes on with the pack of a process that was killed or stopped: the same runs at the same steps.

        So every later number has the bits that it would have had. Returns False if it was stopped again.
        """
        state = read_pack_state(self.pack_file)
        if state is None or self.name:  # a worker that is replaced has another name; its trials go on one by one
            return True
        taken = [self.controller.take_back(slot.folder_name) for slot in state.slots]
        found = [assignment for assignment in taken if assignment is not None]
        if len(found) < len(taken):  # the pack of another stage
            return True
        slots = max(self._num_slots(found[0].arm) or 1, len(found))
        return self._train_pack(found, slots=slots, start_steps=[slot.step for slot in state.slots])

    def _train_pack(
        self, first: Sequence[Assignment], *, slots: int, start_steps: Sequence[int | None] | None = None
    ) -> bool:
        """Trains trials of all arms that can share a pack, until none of them is left; False if it was interrupted.

        Args:
            first: The first slots' trials.
            slots: Up to so many train at once.
            start_steps: Where the first ones go on from, for a pack that is resumed.
        """
        pack = _Pack(self, arms=self._pack_mates(first[0].arm))
        steps = [None] * len(first) if start_steps is None else start_steps
        jobs = [pack.job(assignment, start_step=step) for assignment, step in zip(first, steps, strict=True)]
        while start_steps is None and len(jobs) < slots and (job := pack.supply()) is not None:
            jobs.append(job)
        try:
            done = train_pack(
                jobs,
                inputs=self.inputs_cache.of(first[0].config),
                slots=slots,
                supply=pack.supply,
                on_evaluation=pack.report,
                state_file=self.pack_file,
                stop_requested=self.stop_requested,
            )
        except WorkerError:
            raise
        except Exception as error:
            check_writable(self.path, error)
            # The trials go on from their last evaluation: after running out of memory in smaller packs, after any other
            # error each in a pack of its own, where the one that is to blame fails by itself.
            fewer = len(pack.running) // 2 if isinstance(error, OutOfMemory) else 1
            self._pack_limits[self._plans[first[0].arm.name].key] = max(1, fewer)
            self.controller.release(pack.running)
            done = True
        for assignment, record in pack.unscored if done else ():
            self._tell(assignment, record)
        return done

    def _pack_mates(self, arm: Arm) -> list[Arm]:
        key = self._plans[arm.name].key
        return [other for other in self.definition.arms if self._plans[other.name].key == key]

    def _num_slots(self, arm: Arm) -> int | None:
        """How many trials to train together: what was asked for, or what the rule of `choose_pack_size` says.

        None where each trains alone. A pack of one is another matter: a run that began in a pack goes on in packs only.
        """
        plan = self._plans[arm.name]
        wanted: int | str | None = arm.driver.worker.pack_size
        if plan.key is None or wanted == 1:
            return None
        if plan.key not in self._pack_limits:
            if wanted == "auto":
                trials = math.ceil(sum(mate.trials for mate in self._pack_mates(arm)) / self.num_workers)
                chosen = choose_pack_size(plan.largest, inputs=self.inputs_cache.of(plan.largest), trials_left=trials)
                self.controller.note([chosen.reason])
                wanted = None if chosen.slots == 1 else chosen.slots
            self._pack_limits[plan.key] = None if wanted is None else int(wanted)
        return self._pack_limits[plan.key]


class _Pack:
    """The trials of a pack while it trains."""

    def __init__(self, worker: Worker, *, arms: list[Arm]) -> None:
        self._worker = worker
        self._arms = arms
        self._assignments: dict[Job, Assignment] = {}
        self.running: list[Assignment] = []
        self.unscored: list[tuple[Assignment, RunRecord]] = []
        """Complete runs that are scored once the pack has ended: scoring moves the base that it trains on."""

    def supply(self) -> Job | None:
        """Returns the next trial that can share the pack."""
        assignment = self._worker._take(self._arms, tell=self._tell)
        return None if assignment is None else self.job(assignment)

    def job(self, assignment: Assignment, *, start_step: int | None = None) -> Job:
        """Returns a trial as the pack takes it."""
        job = Job(
            config=assignment.config,
            place=assignment.place,
            ended=lambda record: self._end(assignment, record),
            failed=lambda error: self._fail(assignment, error),
            start_step=start_step,
        )
        self._assignments[job] = assignment
        self.running.append(assignment)
        return job

    def report(self, evaluated: Sequence[Evaluated]) -> list[bool]:
        """Reports the evaluations of all slots at once and returns which runs go on."""
        return self._worker._report([(self._assignments[e.job], e.step, e.values) for e in evaluated])

    def _end(self, assignment: Assignment, record: RunRecord) -> None:
        self.running.remove(assignment)
        self._tell(assignment, record)

    def _tell(self, assignment: Assignment, record: RunRecord) -> None:
        if assignment.reads_test:
            self.unscored.append((assignment, record))
        else:
            self._worker._tell(assignment, record)

    def _fail(self, assignment: Assignment, error: Exception) -> None:
        self.running.remove(assignment)
        with self._worker._asking():
            self._worker.controller.tell_failure(assignment, error)


def find_ended_run(controller: Controller, assignment: Assignment) -> RunRecord | None:
    """Returns the record of a run that was complete or paused when its process was killed, before that was told."""
    try:
        record = read_run(assignment.place.folder)
    except RecordError:
        return None
    is_paused = record.status == "paused" and controller.awaits_pause(assignment, step=record.steps_done)
    return record if record.status == "complete" or is_paused else None
