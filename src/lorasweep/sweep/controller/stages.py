"""The stages of a sweep: `search` tunes on validation data, `confirm` scores the winner of each arm on test data.

A sweep that grew runs through the stages in rounds: a round ends before the trials that were added begin.

The controller makes the same calls to both stages. A stage decides which trials there are and what run each becomes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from optuna.distributions import IntDistribution

from lorasweep.config.components import Component
from lorasweep.config.run import SEED_KEYS, RunConfig
from lorasweep.config.sweep import FixedSampler
from lorasweep.record import ConfirmRow, TrialRow
from lorasweep.selection import find_winner
from lorasweep.sweep.controller.arm_trials import ArmTrials
from lorasweep.sweep.controller.folder import SweepFolder
from lorasweep.sweep.controller.proposals import propose
from lorasweep.sweep.controller.record_rows import SEED, TRIAL, confirm_name, confirm_row, run_name, trial_row
from lorasweep.sweep.controller.stopping_rules import build_pruner, build_rule
from lorasweep.sweep.controller.storage import name_study
from lorasweep.sweep.controller.trial import ASSIGNMENT_ATTRIBUTE
from lorasweep.sweep.definition.arms import Arm
from lorasweep.sweep.definition.seeds import arm_seeds
from lorasweep.training.run_log import RunFolder

FIRST_TRIALS_FRACTION = 0.5
"""Fraction of an arm's trials that an adaptive sampler proposes before it has results of them.

The other trials begin once all of these have a value of the first rung (docs/benchmarks.md, Proposals)."""

Plan: TypeAlias = dict[str, list[tuple[TrialRow, int]]]
"""The runs of the confirm stage, by arm: which trial of the search runs again, and its seed."""


class Search:
    """Each arm's sampler proposes trials. The best evaluation on validation data is a trial's score."""

    name: Literal["search"] = "search"
    reads_test = False
    """Whether a complete run has still to be scored on test data."""

    def __init__(self, sweep: SweepFolder, *, sweep_round: int, session: str | None = None) -> None:
        """Reads the trials that have begun. Rounds count from 0 (`Definition.rounds`)."""
        self._sweep = sweep
        arms = sweep.definition.arms_in_round(sweep_round)
        self.arms = {name: self._read_trials(arm, session) for name, arm in arms.items()}

    def propose(self, trials: ArmTrials) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the parameters of an arm's next trial, and user attributes that the trial must get."""
        direction = self._sweep.record.direction
        return propose(trials.arm, trials.history(), number=len(trials.trials), direction=direction)

    def config(self, arm: Arm, params: Mapping[str, Any]) -> RunConfig:
        """Returns all settings of a trial's run."""
        return arm.compose(params)

    def shown_params(self, arm: Arm, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the settings that distinguish a trial's run from others of its arm, as a person reads them."""
        return dict(params)

    def run_folder(self, arm: Arm, number: int) -> RunFolder:
        """Returns the folder of a trial's run, and the arm and trial that the run's record names."""
        return RunFolder(path=self._sweep.path / run_name(arm.name, number), arm=arm.name, trial=number)

    def rows(self, arm: str) -> list[TrialRow]:
        """Returns the rows of an arm's trials, by number; an arm that a later round adds has none."""
        if arm not in self.arms:
            return []
        trials = self.arms[arm]
        return [
            trial_row(arm, frozen, is_paused=trials.trials[frozen.number].state == "paused")
            for frozen in trials.frozen()
        ]

    def _read_trials(self, arm: Arm, session: str | None) -> ArmTrials:
        is_adaptive = not isinstance(arm.sweep_config.sampler, FixedSampler)  # a component may learn
        return ArmTrials(
            arm,
            study=self._sweep.open_study(name_study(arm.name, self.name), pruner=build_pruner(arm)),
            storage=self._sweep.storage,
            space=arm.space,
            planned=arm.trials,
            rule=build_rule(arm),
            by_loss=getattr(arm.sweep_config.pruner, "criterion", "metric") == "loss",
            constant_answer=self._sweep.record.constant_answer,
            prunes_by_study=isinstance(arm.sweep_config.pruner, Component),
            first_trials=math.ceil(FIRST_TRIALS_FRACTION * arm.trials) if is_adaptive else None,
            session=session,
        )


class Confirmation:
    """The winner of each arm runs again on fresh seeds, each run to its end, and is scored once on test data.

    Runs that an earlier round began are kept, and are not repeated.
    """

    name: Literal["confirm"] = "confirm"
    reads_test = True

    def __init__(self, sweep: SweepFolder, plan: Plan, *, session: str | None = None) -> None:
        """Reads the runs that have begun. Arms that are missing in the plan skip the stage."""
        self._sweep = sweep
        self._plan = plan
        self.arms = {arm.name: self._read_trials(arm, session) for arm in sweep.definition.arms if arm.name in plan}

    def propose(self, trials: ArmTrials) -> tuple[dict[str, Any], dict[str, Any]]:
        begun = {(trial.params[TRIAL], trial.params[SEED]) for trial in trials.trials.values()}
        planned = ((row.number, seed) for row, seed in self._plan[trials.arm.name])
        number, seed = next(run for run in planned if run not in begun)
        return {TRIAL: number, SEED: seed}, {}

    def config(self, arm: Arm, params: Mapping[str, Any]) -> RunConfig:
        """Returns the settings of the trial that runs again, with every source of randomness set by the seed."""
        return arm.compose({**self.shown_params(arm, params), **dict.fromkeys(SEED_KEYS, params[SEED])})

    def shown_params(self, arm: Arm, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the trial's values of the swept keys, with the seed in place of swept seeds."""
        swept = next(row.params for row, _ in self._plan[arm.name] if row.number == params[TRIAL])
        kept = {key: value for key, value in swept.items() if key not in SEED_KEYS}
        return {**kept, SEED: params[SEED]}

    def run_folder(self, arm: Arm, number: int) -> RunFolder:
        """Returns the folder of a run; the trial that the run's record names is the trial of the search."""
        folder = self._sweep.path / confirm_name(arm.name, number)
        return RunFolder(path=folder, arm=arm.name, trial=self.arms[arm.name].trials[number].params[TRIAL])

    def rows(self, arm: str) -> list[ConfirmRow]:
        return [confirm_row(arm, frozen) for frozen in self.arms[arm].frozen()]

    def _read_trials(self, arm: Arm, session: str | None) -> ArmTrials:
        study = self._sweep.open_study(name_study(arm.name, self.name))
        planned = {(row.number, seed) for row, seed in self._plan[arm.name]}
        begun = {
            (trial.params[TRIAL], trial.params[SEED])
            for trial in study.get_trials(deepcopy=False)
            if ASSIGNMENT_ATTRIBUTE in trial.user_attrs
        }
        return ArmTrials(
            arm,
            study=study,
            storage=self._sweep.storage,
            space={TRIAL: IntDistribution(0, 2**32 - 1), SEED: IntDistribution(0, 2**32 - 1)},
            planned=len(planned | begun),
            session=session,
        )


Stage: TypeAlias = Search | Confirmation


def plan_confirmation(search: Search, *, sweep: SweepFolder, seeds: list[int]) -> Plan:
    """Returns the runs of the confirm stage: the winner of each arm of the round on each seed."""
    plan: Plan = {}
    for arm in (trials.arm for trials in search.arms.values()):
        winner = find_winner(search.rows(arm.name), record=sweep.record)
        if winner is None:
            sweep.warn(f"Arm `{arm.name}` has no complete trial, so the confirm stage skips it.")
        else:
            plan[arm.name] = [(winner, seed) for seed in arm_seeds(arm, seeds)]
    return plan
