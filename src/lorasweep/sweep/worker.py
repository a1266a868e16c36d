"""The loop of the worker: take a trial from the controller, or a pack of them, train, report, tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from lorasweep.errors import ConfigError, OutOfMemory, RecordError, WorkerError
from lorasweep.record import RunRecord, read_run
from lorasweep.sweep.controller.controller import Assignment, Controller, Observer, RunEnded
from lorasweep.sweep.controller.folder import SweepFolder
from lorasweep.sweep.controller.stages import Confirm
from lorasweep.sweep.controller.storage import database_must_answer
from lorasweep.sweep.definition import Arm
from lorasweep.sweep.packing import plan_packing
from lorasweep.training import (
    Benches,
    Evaluated,
    Job,
    choose_pack_size,
    current_ranks,
    lead_run,
    name_device,
    read_pack_state,
    score_run,
    train_pack,
    train_run,
)

LOSS = "loss"
"""The metric that every task has beside its own."""


class Worker:
    """Trains the trials of an open sweep in this process, until every arm has as many as were asked for."""

    def __init__(
        self,
        sweep: SweepFolder,
        benches: Benches,
        *,
        observer: Observer,
        stop_requested: Callable[[], bool],
        run_ended: RunEnded,
    ) -> None:
        """Takes what a worker needs.

        Args:
            sweep: The open sweep.
            benches: Base models and data.
            observer: Is told of the trials.
            stop_requested: Asked after every step.
            run_ended: Called with each run that ended well.
        """
        self.sweep = sweep
        self.benches = benches
        self.stop_requested = stop_requested
        self._plans = plan_packing(sweep.definition)
        self._pack_limits: dict[Any, int | None] = {}
        """Most slots of a pack, by what its trials share; None where packs don't pay."""
        sweep.record.device, sweep.record.threads = name_device(), torch.get_num_threads()
        sweep.measure = lambda: benches.telemetry.sample().as_numbers()
        with self._asking():
            self.controller = Controller(sweep, observer=observer, run_ended=run_ended)

    def run(self) -> bool:
        """Trains what is left and returns whether the sweep is complete (False: it was stopped).

        Raises:
            WorkerError: `sweep.max_failures` trials in a row failed, the sweep's folder can't be written to, or its
                database does not answer.
        """
        try:
            with database_must_answer(self.sweep.path):
                self.controller.save("running")
                complete = self._train_stage() and self._train_confirm_stage()
                if complete:
                    self.controller.clean_run_folders()
                self.controller.save("complete" if complete else "interrupted")
        except OSError as error:
            self.sweep.check_disk(error)
            raise
        return complete

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """While the controller is asked or told. An error of its database must not look like one of the trial."""
        with self.benches.telemetry.phase("storage"), database_must_answer(self.sweep.path):
            yield

    def _train_stage(self) -> bool:
        """Trains what is left of a stage and returns whether it is complete."""
        if not self._resume_pack():
            return False
        while not self.stop_requested() and (assignment := self._take()) is not None:
            slots = self._num_slots(assignment.arm)
            done = self._train_alone(assignment) if slots is None else self._train_pack([assignment], slots=slots)
            if not done:
                return False
        return self.controller.is_complete()

    def _train_confirm_stage(self) -> bool:
        """Trains the confirm stage where one is asked for and possible; returns False if it was stopped."""
        confirm = self.controller.begin_confirm()
        if not self.sweep.record.confirm_seeds:
            return True
        try:
            self._read_test_data(confirm)
        except ConfigError as error:
            self.sweep.warn(f"The confirm stage is left out, because its test data can't be read: {error}")
            return True
        self.controller.start_confirm(confirm)
        return self._train_stage()

    def _read_test_data(self, confirm: Confirm) -> None:
        for arm in self.sweep.definition.arms:
            if (config := confirm.winner_config(arm)) is not None:
                self.benches.of(config).parts.test()

    def _take(
        self, arms: Sequence[Arm] | None = None, *, tell: Callable[[Assignment, RunRecord], None] | None = None
    ) -> Assignment | None:
        """The next trial to train. One whose process was killed after its run ended is told instead.

        Args:
            arms: Only trials of these arms; None stands for all.
            tell: Takes a run that had ended; None is `_tell`.
        """
        with self._asking():
            while (assignment := self.controller.take(arms)) is not None:
                record = find_ended_run(self.controller, assignment)
                if record is None:
                    return assignment
                (tell or self._tell)(assignment, record)
        return None

    def _tell(self, assignment: Assignment, record: RunRecord) -> None:
        """Tells the controller of a run that is complete or paused, scored on test data first where the stage does."""
        if record.status == "complete" and self.controller.stage.reads_test:
            try:
                bench = self.benches.of(assignment.config)
                record = score_run(assignment.place.folder, bench=bench)
                self.sweep.note(bench.parts.test().notes)
            except WorkerError:
                raise
            except Exception as error:  # a run that can't be scored must not end the sweep
                self.controller.tell_failure(assignment, error)
                return
        with self._asking():
            self.controller.tell(assignment, record)

    def _report(self, evaluations: Sequence[tuple[Assignment, int, Mapping[str, float]]]) -> list[bool]:
        metric = self.sweep.record.metric
        with self._asking():
            return self.controller.report(
                [(assignment, step, values[metric]) for assignment, step, values in evaluations],
                losses={assignment: values[LOSS] for assignment, _, values in evaluations if LOSS in values},
            )

    def _train_alone(self, assignment: Assignment) -> bool:
        """Trains one trial and tells the controller; returns False if it was interrupted."""
        try:
            record = self._train(assignment)(
                assignment.config,
                assignment.place,
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

    def _train(self, assignment: Assignment) -> Callable[..., RunRecord]:
        """How a run is trained: with the ranks that follow this process, or by it alone."""
        if current_ranks().size > 1:
            return partial(lead_run, benches=self.benches)
        return partial(train_run, bench=self.benches.of(assignment.config))

    def _resume_pack(self) -> bool:
        """Goes on with the pack of a process that was killed or stopped: the same runs at the same steps.

        So every later number has the bits that it would have had. Returns False if it was stopped again.
        """
        state = read_pack_state(self.sweep.pack_file)
        if state is None:
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
                bench=self.benches.of(first[0].config),
                slots=slots,
                supply=pack.supply,
                on_evaluation=pack.report,
                state_file=self.sweep.pack_file,
                stop_requested=self.stop_requested,
            )
        except WorkerError:
            raise
        except Exception as error:
            self.sweep.check_disk(error)
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
        return [other for other in self.sweep.definition.arms if self._plans[other.name].key == key]

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
                trials = sum(mate.trials for mate in self._pack_mates(arm))
                chosen = choose_pack_size(plan.largest, bench=self.benches.of(plan.largest), trials_left=trials)
                self.sweep.note([chosen.reason])
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
        if self._worker.controller.stage.reads_test:
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
