"""The loop of a sweep: ask Optuna for a trial, train it, report, prune, tell. One worker, in this process."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from optuna.trial import Trial
from optuna.trial import TrialState as OptunaState

from lorasweep.config.run import RunConfig
from lorasweep.data.tasks import goal_direction
from lorasweep.errors import ConfigError, OutOfMemory, RunError, WorkerError
from lorasweep.methods import METHODS
from lorasweep.record import Direction, RunRecord
from lorasweep.sweep.definition import Arm, Definition
from lorasweep.sweep.folder import (
    INFEASIBLE_ATTRIBUTE,
    REASON_ATTRIBUTE,
    RUN_ATTRIBUTE,
    SCORE_ATTRIBUTE,
    SweepFolder,
)
from lorasweep.sweep.search import build_sampler
from lorasweep.training import RunPlace, Workbench, build_workbench, train_run


class Observer(Protocol):
    """What a sweep tells while it runs; the live table is one."""

    def trial_started(self, arm: Arm, number: int, params: Mapping[str, Any], *, steps: int) -> None:
        """A trial begins; its run has so many optimizer steps."""

    def evaluated(self, arm: Arm, number: int, step: int, value: float) -> None:
        """A running trial was evaluated."""

    def trial_ended(self, arm: Arm, number: int, state: str, value: float | None) -> None:
        """A trial ended as `complete`, `pruned`, `failed` or `infeasible`."""


class Benches:
    """Base models and data by the settings that decide them, each loaded once."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[Any, ...], Workbench] = {}

    def of(self, config: RunConfig) -> Workbench:
        """Returns the workbench of a run, loaded if no earlier run needed it."""
        key = (config.model, config.data, config.trainer.precision, config.trainer.device)
        if key not in self._loaded:
            self._loaded[key] = build_workbench(config)
        return self._loaded[key]


def check_definition(definition: Definition, benches: Benches) -> dict[str, RunConfig]:
    """Checks every arm against its base model, before anything is written; returns one composed run per arm.

    Raises:
        ConfigError: A rank, target or other setting does not fit the model.
    """
    configs: dict[str, RunConfig] = {}
    for arm in definition.arms:
        for config in arm.corners():
            try:
                METHODS[config.method.name].check(benches.of(config).base.model, config.method)
            except ConfigError as error:
                raise ConfigError(f"arm `{arm.name}`: {error}") from error
            configs.setdefault(arm.name, config)
    return configs


def sweep_direction(configs: Mapping[str, RunConfig]) -> Direction:
    """Returns the direction of the sweep's metric."""
    return goal_direction(next(iter(configs.values())).data.metric)


class Worker:
    """Runs the trials of an open sweep until every arm has as many as were asked for.

    `run_ended` is called with the record, the folder and the swept values of each finished run.
    """

    def __init__(
        self,
        sweep: SweepFolder,
        benches: Benches,
        *,
        observer: Observer,
        stop_requested: Callable[[], bool],
        run_ended: Callable[[RunRecord, Path, Mapping[str, Any]], None],
    ) -> None:
        self.sweep = sweep
        self.benches = benches
        self.observer = observer
        self.stop_requested = stop_requested
        self.run_ended = run_ended
        self.failures_in_a_row = 0

    def run(self) -> bool:
        """Runs what is left and returns whether the sweep is complete (False: it was stopped).

        Raises:
            WorkerError: `sweep.max_failures` trials in a row failed.
        """
        self.sweep.save("running")
        for arm in self.sweep.definition.arms:
            for trial in self.sweep.unfinished_trials(arm):
                if not self._run_trial(arm, Trial(self.sweep.studies[arm.name], trial._trial_id)):
                    return self._stop()
        while (next_arm := self._next_arm()) is not None:
            if self.stop_requested() or not self._run_trial(next_arm, self._ask(next_arm)):
                return self._stop()
        self.sweep.save("complete")
        return True

    def _next_arm(self) -> Arm | None:
        """The arm that is least far; arms without a space, which are quick, come first."""
        left = [arm for arm in self.sweep.definition.arms if self.sweep.finished(arm) < arm.trials]
        return min(left, key=lambda arm: (bool(arm.space), self.sweep.finished(arm) / arm.trials), default=None)

    def _ask(self, arm: Arm) -> Trial:
        study = self.sweep.studies[arm.name]
        number = len(study.get_trials(deepcopy=False))
        study.sampler = build_sampler(
            arm.driver.sampler, arm.space, seed=arm.driver.sweep.seed, number=number, arm=arm.name
        )
        trial = study.ask(fixed_distributions=arm.space)
        trial.set_user_attr(RUN_ATTRIBUTE, self.sweep.run_name(arm.name, trial.number))
        return trial

    def _run_trial(self, arm: Arm, trial: Trial) -> bool:
        """Trains one trial and tells the study; returns False if it was interrupted and stays running."""
        study = self.sweep.studies[arm.name]
        name = self.sweep.run_name(arm.name, trial.number)
        config = arm.compose(trial.params)
        self.observer.trial_started(arm, trial.number, trial.params, steps=config.trainer.max_steps)
        self.sweep.save()

        def should_stop(slot: int, step: int, value: float) -> bool:
            self.observer.evaluated(arm, trial.number, step, value)
            trial.report(value, step)
            return trial.should_prune()

        place = RunPlace(folder=self.sweep.path / name, arm=arm.name, trial=trial.number)
        try:
            record = train_run(
                config,
                place,
                bench=self.benches.of(config),
                should_stop=should_stop,
                stop_requested=self.stop_requested,
                resume=True,
            )
        except Exception as error:  # a broken trial must not end the sweep
            self._tell_failure(arm, trial, error)
            return True
        if record.status == "interrupted":
            return False
        self.failures_in_a_row = 0
        trial.set_user_attr(SCORE_ATTRIBUTE, record.score)
        if record.status == "pruned":
            trial.set_user_attr(REASON_ATTRIBUTE, record.reason)
            study.tell(trial, state=OptunaState.PRUNED)
        else:
            study.tell(trial, record.score)
        self.run_ended(record, place.folder, trial.params)
        self._ended(arm, trial.number, record.status, record.score)
        return True

    def _tell_failure(self, arm: Arm, trial: Trial, error: Exception) -> None:
        infeasible = isinstance(error, OutOfMemory)
        reason = str(error) if isinstance(error, RunError) else traceback.format_exception_only(error)[-1].strip()
        trial.set_user_attr(REASON_ATTRIBUTE, reason)
        if infeasible:
            trial.set_user_attr(INFEASIBLE_ATTRIBUTE, value=True)
            trial.set_constraint("memory", 1.0)
        self.sweep.studies[arm.name].tell(trial, state=OptunaState.FAIL)
        self._ended(arm, trial.number, "infeasible" if infeasible else "failed", None)
        self.failures_in_a_row += 1
        limit = arm.driver.sweep.max_failures
        if self.failures_in_a_row >= limit:
            self.sweep.save("interrupted")
            raise WorkerError(
                f"fewer than {limit} trials in a row may fail (`sweep.max_failures`), "
                f"but the last one failed too: {reason} "
                f"Their records in {str(self.sweep.path / 'runs')!r} have the tracebacks."
            ) from error

    def _ended(self, arm: Arm, number: int, state: str, value: float | None) -> None:
        self.sweep.save()
        self.observer.trial_ended(arm, number, state, value)

    def _stop(self) -> bool:
        self.sweep.save("interrupted")
        return False
