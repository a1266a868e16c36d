"""The loop of a sweep: ask Optuna for a trial, train it, report, prune, tell. One worker, in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lorasweep.config.run import RunConfig
from lorasweep.data.tasks import goal_direction
from lorasweep.errors import ConfigError
from lorasweep.methods import METHODS
from lorasweep.record import Direction
from lorasweep.sweep.definition import Arm, Definition
from lorasweep.sweep.folder import SweepFolder
from lorasweep.sweep.trials import Observer, OpenTrial, RunEnded, Trials
from lorasweep.training import Workbench, build_workbench, train_run


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
    """Runs the trials of an open sweep until every arm has as many as were asked for."""

    def __init__(
        self,
        sweep: SweepFolder,
        benches: Benches,
        *,
        observer: Observer,
        stop_requested: Callable[[], bool],
        run_ended: RunEnded,
    ) -> None:
        self.sweep = sweep
        self.benches = benches
        self.stop_requested = stop_requested
        self.trials = Trials(sweep, observer=observer, run_ended=run_ended)

    def run(self) -> bool:
        """Runs what is left and returns whether the sweep is complete (False: it was stopped).

        Raises:
            WorkerError: `sweep.max_failures` trials in a row failed.
        """
        self.sweep.save("running")
        complete = self._run_unfinished() and self._run_new()
        self.sweep.save("complete" if complete else "interrupted")
        return complete

    def _run_unfinished(self) -> bool:
        return all(self._run_trial(self.trials.reopen(arm, trial)) for arm, trial in self.trials.unfinished())

    def _run_new(self) -> bool:
        while (arm := self._next_arm()) is not None:
            if self.stop_requested() or not self._run_trial(self.trials.ask(arm)):
                return False
        return True

    def _next_arm(self) -> Arm | None:
        """The arm that is least far; arms without a space, which are quick, come first."""
        open_arms = [arm for arm in self.sweep.definition.arms if self.trials.left(arm) > 0]
        return min(open_arms, key=lambda arm: (bool(arm.space), 1 - self.trials.left(arm) / arm.trials), default=None)

    def _run_trial(self, opened: OpenTrial) -> bool:
        """Trains one trial and tells the study; returns False if it was interrupted and stays running."""
        try:
            record = train_run(
                opened.config,
                opened.place,
                bench=self.benches.of(opened.config),
                should_stop=lambda slot, step, value: self.trials.report(opened, step, value),
                stop_requested=self.stop_requested,
                resume=True,
            )
        except Exception as error:  # a broken trial must not end the sweep
            self.trials.tell_failure(opened, error)
            return True
        if record.status == "interrupted":
            return False
        self.trials.tell(opened, record)
        return True
