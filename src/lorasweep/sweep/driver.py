"""The loop of a worker: ask Optuna for a trial, train it, report, prune, tell. Any number of them serve one sweep."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lorasweep.config.run import RunConfig
from lorasweep.errors import ConfigError, OutOfMemory, WorkerError
from lorasweep.record import RunRecord
from lorasweep.sweep.confirm import draw_seeds
from lorasweep.sweep.definition import Arm, Definition
from lorasweep.sweep.folder import SweepFolder
from lorasweep.sweep.packing import plan_packing
from lorasweep.sweep.software import describe_software, packages_fingerprint
from lorasweep.sweep.stages import Confirm, Search, Stage
from lorasweep.sweep.trials import Observer, OpenTrial, RunEnded, Trials
from lorasweep.sweep.workers import Colleagues, Registration
from lorasweep.training import (
    Benches,
    Job,
    check_run,
    choose_pack_size,
    current_ranks,
    lead_run,
    measure_pack_sizes,
    name_device,
    score_run,
    train_pack,
    train_run,
)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 3.0
"""Between two looks at what other workers run."""


def check_definition(definition: Definition, benches: Benches) -> dict[str, RunConfig]:
    """Checks every arm against its base model, before anything is written; returns one composed run per arm.

    Raises:
        ConfigError: A rank, target or other setting does not fit the model, or the search leaves no seed fresh.
    """
    plan_packing(definition)
    draw_seeds(definition)
    configs: dict[str, RunConfig] = {}
    for arm in definition.arms:
        for config in arm.corners():
            base = benches.of(config).base
            try:
                check_run(config, base)
            except ConfigError as error:
                raise ConfigError(f"arm `{arm.name}`: {error}") from error
            configs.setdefault(arm.name, config)
    return configs


def sweep_metric(configs: Mapping[str, RunConfig], benches: Benches) -> str:
    """Returns what every arm is scored by; `data.metric: auto` depends on the data.

    Raises:
        ConfigError: The arms have different metrics.
    """
    metrics = sorted({benches.of(config).parts.metric for config in configs.values()})
    if len(metrics) > 1:
        raise ConfigError(f"all arms must have one `data.metric`, but got {', '.join(metrics)}.")
    return metrics[0]


def data_notes(configs: Mapping[str, RunConfig], benches: Benches) -> list[str]:
    """Returns what there is to say on the data of the arms and the attention that was chosen, each sentence once."""
    return list(dict.fromkeys(note for config in configs.values() for note in benches.of(config).notes))


class Worker:
    """One of the processes that run the trials of an open sweep, until every arm has as many as were asked for."""

    def __init__(
        self,
        sweep: SweepFolder,
        benches: Benches,
        *,
        observer: Observer,
        stop_requested: Callable[[], bool],
        run_ended: RunEnded,
        time_left_s: Callable[[], float | None] = lambda: None,
        job: str | None = None,
    ) -> None:
        """Takes what a worker needs.

        Args:
            sweep: The open sweep.
            benches: Base models and data.
            observer: Hears of this worker's trials.
            stop_requested: Asked after every step.
            run_ended: Called with each run that ended well.
            time_left_s: Seconds until this process is ended from outside; None where it is not.
            job: The Slurm job that it runs in.
        """
        self.sweep = sweep
        self.benches = benches
        self.observer = observer
        self.run_ended = run_ended
        self.plans = plan_packing(sweep.definition)
        self.pack_limits: dict[Any, int] = {}
        """Largest packs after one ran out of memory or broke, by what its trials share."""
        lease_s = sweep.definition.driver.worker.lease_s
        self.colleagues = Colleagues(sweep.path, lease_s=lease_s)
        self.registration = Registration(
            sweep.path,
            lease_s=lease_s,
            code=describe_software()["lorasweep"],
            packages=packages_fingerprint(),
            device=name_device(),
            job=job,
            measure=lambda: benches.telemetry.sample().as_numbers(),
            idle=sweep.storage.rest,
            stopped=self._leave_out,
        )
        self._asked_to_stop = stop_requested
        self._time_left_s = time_left_s
        self._time_given_s = time_left_s()
        sweep.has_others = self._has_others
        sweep.storage.stop_waiting_when(stop_requested)

    def run(self) -> bool:
        """Runs what is left and returns whether the sweep is complete (False: this worker was stopped).

        Raises:
            WorkerError: `sweep.max_failures` trials in a row failed, the sweep's folder can't be written to, its
                database does not answer, or others took this worker for lost.
        """
        try:
            with self.registration:
                self.sweep.save("running")
                complete = self._run_stage(Search(self.sweep)) and self._confirm()
                self.registration.end(None if complete else "it was stopped")
            self.sweep.save("complete" if complete else "interrupted")
        except OSError as error:
            self.sweep.check_disk(error)
            raise
        return complete

    def stop_requested(self) -> bool:
        """Whether this worker is to stop after the step that runs.

        Raises:
            WorkerLost: Others took it for lost.
        """
        self.registration.check()
        return self._asked_to_stop()

    def _leave_out(self, seconds: float) -> None:
        """Time in which the process was stopped is none that the sweep took."""
        self.sweep.stopped_s += seconds
        self.benches.telemetry.leave_out(seconds)

    def _has_others(self) -> bool:
        return any(row.id != self.registration.id for row in self.colleagues.live())

    def _confirm(self) -> bool:
        """Runs the confirm stage where one is asked for and possible; returns False if it was stopped."""
        if not self.sweep.record.confirm_seeds:
            return True
        stage = Confirm(self.sweep, score=self._score)
        try:
            for arm in self.sweep.definition.arms:
                if (config := stage.winner_config(arm)) is not None:
                    self.benches.of(config).parts.test()
        except ConfigError as error:
            self.sweep.warn(f"The confirm stage is left out, because its test data can't be read: {error}")
            return True
        stage.begin()
        return self._run_stage(stage)

    def _score(self, config: RunConfig, folder: Path) -> RunRecord:
        bench = self.benches.of(config)
        record = score_run(folder, bench=bench)
        self.sweep.note(bench.parts.test().notes)
        return record

    def _run_stage(self, stage: Stage) -> bool:
        """Runs what is left of a stage and returns whether it is complete."""
        self.trials = Trials(
            self.sweep,
            stage,
            worker=self.registration,
            colleagues=self.colleagues,
            observer=self.observer,
            run_ended=self.run_ended,
            telemetry=self.benches.telemetry,
        )
        self.pack_sizes: dict[Any, int] = {}
        self.requeued: list[OpenTrial] = []
        """Trials whose pack broke up."""
        pause_s = FIRST_PAUSE_S
        while True:
            with self.benches.telemetry.phase("storage"):
                arm = self._next_arm()
            if arm is not None:
                if self.stop_requested() or not self._run_arm(arm):
                    return False
                pause_s = FIRST_PAUSE_S
            elif self.trials.others_run():
                if self.stop_requested() or self._lacks_time():
                    return False
                with self.benches.telemetry.phase("waiting"):
                    time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                return not any(self.trials.left(arm) for arm in self.sweep.definition.arms)

    def _next_arm(self) -> Arm | None:
        """The arm of a trial whose pack broke up, or whose worker is gone, else the one that is least far."""
        if self.requeued:
            return self.requeued[0].arm
        arms = self._arms_in_time(self.sweep.definition.arms)
        if abandoned := [arm for arm, _ in self.trials.abandoned() if arm in arms]:
            return abandoned[0]
        return min((arm for arm in arms if self.trials.left(arm) > 0), key=self.trials.order, default=None)

    def _arms_in_time(self, arms: Sequence[Arm]) -> list[Arm]:
        """The arms whose trials can end before this process is ended, or are longer than all the time it was given."""
        left_s, given_s = self._time_left_s(), self._time_given_s
        if left_s is None or given_s is None:
            return list(arms)
        expected = {arm.name: self.trials.expected_s(arm) or 0.0 for arm in arms}
        return [arm for arm in arms if expected[arm.name] <= left_s or expected[arm.name] > given_s]

    def _lacks_time(self) -> bool:
        """Whether trials are left of which none can end before this process is ended: it waits for nothing then."""
        return any(self.trials.left(arm) for arm in self.sweep.definition.arms)

    def _run_arm(self, arm: Arm) -> bool:
        """Runs one trial of an arm, or a pack with its trials; returns False if it was interrupted."""
        size = self._pack_size(arm)
        if size > 1:
            return self._run_pack(arm, size)
        opened = self._take([arm])
        return opened is None or self._run_trial(opened)

    def _take(self, arms: Sequence[Arm]) -> OpenTrial | None:
        """The next trial of these arms: one whose pack broke up, one that its worker left, or a new one."""
        for opened in self.requeued:
            if opened.arm in arms:
                self.requeued.remove(opened)
                return opened
        return self.trials.take(self._arms_in_time(arms))

    def _train(self, config: RunConfig) -> Callable[..., RunRecord]:
        """How a run is trained: with the ranks that follow this process, or by it alone."""
        if current_ranks().size > 1:
            return partial(lead_run, benches=self.benches)
        return partial(train_run, bench=self.benches.of(config))

    def _run_trial(self, opened: OpenTrial) -> bool:
        """Trains one trial and tells the study; returns False if it was interrupted and stays running."""
        try:
            record = self._train(opened.config)(
                opened.config,
                opened.place,
                should_stop=lambda slot, step, value: self.trials.report(opened, step, value),
                stop_requested=self.stop_requested,
                resume=True,
            )
        except WorkerError:
            raise
        except Exception as error:  # a broken trial must not end the sweep
            self.trials.tell_failure(opened, error)
            return True
        if record.status == "interrupted":
            return False
        self.trials.tell(opened, record)
        return True

    def _run_pack(self, first: Arm, size: int) -> bool:
        """Trains trials of all arms that can share a pack, as many at once as fit, until none of them is left."""
        arms = self._pack_mates(first)
        running: list[OpenTrial] = []
        trained: list[tuple[OpenTrial, RunRecord]] = []

        def supply() -> Job | None:
            opened = self._take(arms)
            return None if opened is None else self._job(opened, running, trained)

        jobs = [job for job in (supply() for _ in range(size)) if job is not None]
        if not jobs:
            return True
        try:
            if not train_pack(
                jobs, bench=self.benches.of(jobs[0].config), supply=supply, stop_requested=self.stop_requested
            ):
                return False  # what is trained and not scored yet is told when the sweep goes on
        except WorkerError:
            raise
        except Exception as error:
            self.sweep.check_disk(error)
            # The trials go on from their last evaluation: after running out of memory in smaller packs, after any other
            # error alone, where the one that is to blame fails by itself.
            fewer = len(running) // 2 if isinstance(error, OutOfMemory) else 1
            self.pack_limits[self.plans[first.name].key] = max(1, fewer)
            self.requeued = running
        for opened, record in trained:
            self.trials.tell(opened, record)
        return True

    def _job(self, opened: OpenTrial, running: list[OpenTrial], trained: list[tuple[OpenTrial, RunRecord]]) -> Job:
        def ended(record: RunRecord) -> None:
            running.remove(opened)
            if self.trials.stage.reads_test:  # scoring moves the base that the pack still trains on
                trained.append((opened, record))
            else:
                self.trials.tell(opened, record)

        def failed(error: Exception) -> None:
            running.remove(opened)
            self.trials.tell_failure(opened, error)

        running.append(opened)
        return Job(
            config=opened.config,
            place=opened.place,
            should_stop=lambda step, value: self.trials.report(opened, step, value),
            ended=ended,
            failed=failed,
        )

    def _pack_mates(self, arm: Arm) -> list[Arm]:
        key = self.plans[arm.name].key
        return [other for other in self.sweep.definition.arms if self.plans[other.name].key == key]

    def _pack_size(self, arm: Arm) -> int:
        """How many trials to train together: what was asked for, or what a measurement found to pay."""
        plan = self.plans[arm.name]
        if plan.key is None:
            return 1
        if plan.key not in self.pack_sizes:
            wanted = arm.driver.worker.pack_size
            mates = self._pack_mates(arm)
            most = sum(self.trials.left(mate) for mate in mates)
            most += sum(mate in mates for mate, _ in self.trials.abandoned())
            if wanted == "auto":
                most = max(1, -(-most // max(1, len(self.colleagues.live()))))  # the others want some too
                measured = measure_pack_sizes(plan.largest, bench=self.benches.of(plan.largest), most=most)
                wanted = choose_pack_size(measured)
            self.pack_sizes[plan.key] = wanted
        return min(self.pack_sizes[plan.key], self.pack_limits.get(plan.key, self.pack_sizes[plan.key]))
