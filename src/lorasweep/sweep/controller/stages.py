"""The two stages of a sweep: `search` tunes on validation data, `confirm` runs the winners again on fresh seeds.

The controller makes the same calls to both. A stage decides which trials there are and what run each becomes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from optuna.distributions import IntDistribution

from lorasweep.config.components import Component
from lorasweep.config.run import RunConfig
from lorasweep.config.sweep import FixedSampler
from lorasweep.record import ConfirmRow, TrialRow, best_trial
from lorasweep.sweep.controller.arm_trials import ArmTrials
from lorasweep.sweep.controller.folder import SweepFolder
from lorasweep.sweep.controller.proposals import propose
from lorasweep.sweep.controller.record_rows import SEED, confirm_row, confirm_run_name, run_name, trial_row
from lorasweep.sweep.controller.stopping_rules import build_pruner, build_rule
from lorasweep.sweep.controller.storage import CONFIRM_STUDY
from lorasweep.sweep.definition.arms import Arm
from lorasweep.sweep.definition.seeds import SEED_KEYS, arm_seeds
from lorasweep.training.run_log import RunFolder

FIRST_TRIALS_FRACTION = 0.5
"""Fraction of an arm's trials that an adaptive sampler proposes before the first of them is complete."""


class Search:
    """Each arm's sampler proposes trials. The best evaluation on validation data is a trial's score."""

    name = "search"
    reads_test = False
    """Whether a complete run has still to be scored on test data."""

    def __init__(self, sweep: SweepFolder, *, session: str | None = None) -> None:
        self._sweep = sweep
        self.arms = {arm.name: self._read_trials(arm, session) for arm in sweep.definition.arms}

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
        trials = self.arms[arm].trials
        return [
            trial_row(arm, frozen, is_paused=trials[frozen.number].state == "paused")
            for frozen in self.arms[arm].frozen()
        ]

    def _read_trials(self, arm: Arm, session: str | None) -> ArmTrials:
        is_adaptive = not isinstance(arm.sweep_config.sampler, FixedSampler)  # a component may learn
        return ArmTrials(
            arm,
            study=self._sweep.open_study(arm.name, pruner=build_pruner(arm)),
            storage=self._sweep.storage,
            space=arm.space,
            planned=arm.trials,
            rule=build_rule(arm),
            by_loss=getattr(arm.sweep_config.pruner, "criterion", "metric") == "loss",
            prunes_by_study=isinstance(arm.sweep_config.pruner, Component),
            first_trials=math.ceil(FIRST_TRIALS_FRACTION * arm.trials) if is_adaptive else None,
            session=session,
        )


class Confirm:
    """The best configuration of each arm on fresh seeds. The best weights of each run are scored once on test data."""

    name = "confirm"
    reads_test = True

    def __init__(self, sweep: SweepFolder, search: Search, *, session: str | None = None) -> None:
        self._sweep = sweep
        self.winners: dict[str, TrialRow] = {}
        self.arms: dict[str, ArmTrials] = {}
        for arm in sweep.definition.arms:
            winner = best_trial(search.rows(arm.name), direction=sweep.record.direction)
            if winner is None:
                sweep.warn(f"Arm `{arm.name}` has no complete trial, so the confirm stage skips it.")
                continue
            self.winners[arm.name] = winner
            self.arms[arm.name] = ArmTrials(
                arm,
                study=sweep.open_study(CONFIRM_STUDY.format(arm=arm.name)),
                storage=sweep.storage,
                space={SEED: IntDistribution(0, 2**32 - 1)},
                planned=len(arm_seeds(arm, sweep.record.confirm_seeds)),
                session=session,
            )

    def propose(self, trials: ArmTrials) -> tuple[dict[str, Any], dict[str, Any]]:
        return {SEED: self._sweep.record.confirm_seeds[len(trials.trials)]}, {}

    def config(self, arm: Arm, params: Mapping[str, Any]) -> RunConfig:
        """Returns the winner's settings with every source of randomness set by the seed."""
        return arm.compose({**self.shown_params(arm, params), **dict.fromkeys(SEED_KEYS, params[SEED])})

    def shown_params(self, arm: Arm, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the winner's values of the swept keys, with the seed in place of any that were searched."""
        kept = {key: value for key, value in self.winners[arm.name].params.items() if key not in SEED_KEYS}
        return {**kept, SEED: params[SEED]}

    def run_folder(self, arm: Arm, number: int) -> RunFolder:
        """Returns the folder of a run; the trial that the run's record names is the winner."""
        folder = self._sweep.path / confirm_run_name(arm.name, number)
        return RunFolder(path=folder, arm=arm.name, trial=self.winners[arm.name].number)

    def rows(self, arm: str) -> list[ConfirmRow]:
        return [confirm_row(arm, frozen, winner=self.winners[arm].number) for frozen in self.arms[arm].frozen()]


Stage: TypeAlias = Search | Confirm
