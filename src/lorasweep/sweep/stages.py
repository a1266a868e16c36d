"""A sweep's stages, each with its trials: `search` tunes on validation data, `confirm` runs the winners on fresh seeds.

The worker's loop is the same for both; a stage says which trials there are, what run each becomes and what it is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from lorasweep.config.run import RunConfig
from lorasweep.record import RunRecord
from lorasweep.sweep.confirm import SEED_KEYS, arm_seeds, find_winner, seed_settings
from lorasweep.sweep.controller.proposals import propose
from lorasweep.sweep.definition import Arm
from lorasweep.sweep.duplicates import name_function
from lorasweep.sweep.folder import SweepFolder
from lorasweep.sweep.rows import (
    DUPLICATE_ATTRIBUTE,
    FUNCTION_ATTRIBUTE,
    SEED,
    WINNER_ATTRIBUTE,
    confirm_run_name,
    run_name,
)
from lorasweep.sweep.storage import open_confirm_study
from lorasweep.training import RunPlace

ScoreRun = Callable[[RunConfig, Path], RunRecord]
"""Scores a finished run on test data, once, and returns its record."""


class Stage(Protocol):
    """What a worker must know of a stage."""

    name: str
    """`search` or `confirm`."""
    reads_test: bool
    """Whether a run that ended has still to be scored on test data."""

    def study(self, arm: Arm) -> optuna.Study | None:
        """Optuna's study of an arm; None where the arm has no trials in this stage."""

    def asked(self, arm: Arm) -> int:
        """How many trials an arm has in this stage, those that ended included."""

    def left(self, arm: Arm) -> int:
        """How many of them have not begun."""

    def ask(self, arm: Arm) -> Trial:
        """Begins the next one; while no other worker does."""

    def describe(self, arm: Arm, trial: Trial) -> None:
        """Notes what there is to say of one that was just begun."""

    def params(self, arm: Arm, trial: Trial) -> Mapping[str, Any]:
        """The settings that tell a trial's run from others of its arm, as a person reads them."""

    def config(self, arm: Arm, trial: Trial) -> RunConfig:
        """All settings of a trial's run."""

    def place(self, arm: Arm, number: int) -> RunPlace:
        """Where a trial's run belongs."""

    def should_prune(self, arm: Arm, trial: Trial, step: int, value: float) -> bool:
        """Takes an evaluation and says whether the trial is to end."""

    def finish(self, config: RunConfig, record: RunRecord, folder: Path) -> tuple[RunRecord, float | None]:
        """Returns a run that ended, and what its trial is worth."""


class Search:
    """Each arm's sampler proposes, its pruner cuts short, and the best evaluation on validation data counts."""

    name = "search"
    reads_test = False

    def __init__(self, sweep: SweepFolder) -> None:
        self.sweep = sweep
        self._functions: dict[str, dict[str, int]] = {}
        """Per arm, the earliest trial of each function among the first `_looked_at`."""
        self._looked_at: dict[str, int] = {}
        self._composed: dict[tuple[str, int], RunConfig] = {}
        """Settings of trials that have just been asked for."""

    def study(self, arm: Arm) -> optuna.Study:
        """The arm's search."""
        return self.sweep.studies[arm.name]

    def asked(self, arm: Arm) -> int:
        """The arm's number of trials."""
        return arm.trials

    def left(self, arm: Arm) -> int:
        """Trials that the sampler has not been asked for."""
        return arm.trials - len(self.study(arm).get_trials(deepcopy=False))

    def ask(self, arm: Arm) -> Trial:
        """Asks the arm's sampler for a new trial."""
        study = self.study(arm)
        history = study.get_trials(deepcopy=False)
        params = propose(
            arm.space,
            history,
            sampler=arm.driver.sampler,
            direction="minimize" if study.direction == optuna.study.StudyDirection.MINIMIZE else "maximize",
            trials=arm.trials,
            number=len(history),
            seed=arm.driver.sweep.seed,
            arm=arm.name,
        )
        study.enqueue_trial(params)
        return study.ask(fixed_distributions=arm.space)

    def describe(self, arm: Arm, trial: Trial) -> None:
        """Names what the trial trains, and an earlier one that trains the same."""
        config = self._composed[arm.name, trial.number] = arm.compose(trial.params)
        function = name_function(config)
        first = self._first_of_its_function(arm, trial, function)
        trial.set_user_attr(FUNCTION_ATTRIBUTE, function)
        if first != trial.number:
            trial.set_user_attr(DUPLICATE_ATTRIBUTE, first)

    def params(self, arm: Arm, trial: Trial) -> Mapping[str, Any]:
        """The swept keys and their values."""
        return trial.params

    def config(self, arm: Arm, trial: Trial) -> RunConfig:
        """The arm's settings with them."""
        return self._composed.pop((arm.name, trial.number), None) or arm.compose(trial.params)

    def place(self, arm: Arm, number: int) -> RunPlace:
        """A folder by arm and number."""
        return RunPlace(folder=self.sweep.path / run_name(arm.name, number), arm=arm.name, trial=number)

    def should_prune(self, arm: Arm, trial: Trial, step: int, value: float) -> bool:
        """Reports an evaluation and asks the pruner."""
        known = frozen(trial)
        if step not in known.intermediate_values:
            trial.report(value, step)
        elif step < max(known.intermediate_values):  # it was not pruned here before it went back to a checkpoint
            return False
        return trial.should_prune()

    def finish(self, config: RunConfig, record: RunRecord, folder: Path) -> tuple[RunRecord, float | None]:
        """The run's best evaluation."""
        return record, record.score

    def _first_of_its_function(self, arm: Arm, trial: Trial, function: str) -> int:
        """The number of the arm's earliest trial that trains the same function, which may be this one."""
        functions, looked_at = self._functions.setdefault(arm.name, {}), self._looked_at.get(arm.name, 0)
        if looked_at < trial.number:  # those that other workers, or an earlier session, began
            for earlier in self.study(arm).get_trials(deepcopy=False)[looked_at : trial.number]:
                known = earlier.user_attrs.get(FUNCTION_ATTRIBUTE) or name_function(arm.compose(earlier.params))
                functions.setdefault(known, earlier.number)
        self._looked_at[arm.name] = trial.number + 1
        return functions.setdefault(function, trial.number)


class Confirm:
    """The best configuration of each arm on fresh seeds; its best weights are scored once on test data."""

    name = "confirm"
    reads_test = True

    def __init__(self, sweep: SweepFolder, *, score: ScoreRun) -> None:
        self.sweep = sweep
        self.score = score
        self.winners = {arm.name: find_winner(sweep.studies[arm.name]) for arm in sweep.definition.arms}

    def begin(self) -> None:
        """Makes the study of each arm that has a winner and puts its seeds in line, but for those that are there."""
        self.sweep.storage.exclusively(self._begin)

    def _begin(self) -> None:
        for arm in self.sweep.definition.arms:
            winner = self.winners[arm.name]
            if winner is None:
                self.sweep.warn(f"Arm `{arm.name}` has no complete trial, so the confirm stage leaves it out.")
                continue
            study = open_confirm_study(self.sweep.storage, arm.name, direction=self.sweep.record.direction)
            study.set_user_attr(WINNER_ATTRIBUTE, winner.number)
            in_line = len(study.get_trials(deepcopy=False))
            for seed in arm_seeds(arm, self.sweep.record.confirm_seeds)[in_line:]:
                study.enqueue_trial({SEED: seed})
            self.sweep.confirm_studies[arm.name] = study

    def winner_config(self, arm: Arm) -> RunConfig | None:
        """The settings that won the arm's search, or None where no trial is complete."""
        winner = self.winners[arm.name]
        return None if winner is None else arm.compose(winner.params)

    def study(self, arm: Arm) -> optuna.Study | None:
        """The arm's study of seeds."""
        return self.sweep.confirm_studies.get(arm.name)

    def asked(self, arm: Arm) -> int:
        """The arm's number of seeds."""
        study = self.study(arm)
        return 0 if study is None else len(study.get_trials(deepcopy=False))

    def left(self, arm: Arm) -> int:
        """Seeds that wait."""
        study = self.study(arm)
        return 0 if study is None else len(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def ask(self, arm: Arm) -> Trial:
        """Takes the next seed."""
        study = self.study(arm)
        assert study is not None
        return study.ask(fixed_distributions={SEED: IntDistribution(0, 2**32 - 1)})

    def describe(self, arm: Arm, trial: Trial) -> None:
        """A seed says all."""

    def params(self, arm: Arm, trial: Trial) -> Mapping[str, Any]:
        """The winner's values of the swept keys, with the seed in place of any that were searched."""
        kept = {key: value for key, value in self._winner(arm).params.items() if key not in SEED_KEYS}
        return {**kept, SEED: trial.params[SEED]}

    def config(self, arm: Arm, trial: Trial) -> RunConfig:
        """The winner's settings, every source of chance set by the seed."""
        return arm.compose({**self.params(arm, trial), **seed_settings(trial.params[SEED])})

    def place(self, arm: Arm, number: int) -> RunPlace:
        """A folder of its own; the trial in the record is the winner."""
        folder = self.sweep.path / confirm_run_name(arm.name, number)
        return RunPlace(folder=folder, arm=arm.name, trial=self._winner(arm).number)

    def should_prune(self, arm: Arm, trial: Trial, step: int, value: float) -> bool:
        """Never."""
        return False

    def finish(self, config: RunConfig, record: RunRecord, folder: Path) -> tuple[RunRecord, float | None]:
        """The run with its score on test data."""
        scored = self.score(config, folder)
        return scored, scored.test[scored.metric]

    def _winner(self, arm: Arm) -> FrozenTrial:
        winner = self.winners[arm.name]
        assert winner is not None
        return winner


def frozen(trial: Trial) -> FrozenTrial:
    """Returns a trial as the storage has it now."""
    return trial.study._storage.get_trial(trial._trial_id)
