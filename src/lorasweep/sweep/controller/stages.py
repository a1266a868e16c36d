"""The two stages of a sweep: `search` tunes on validation data, `confirm` runs the winners again on fresh seeds.

The controller's calls are the same for both. A stage says which trials there are and what run each becomes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import optuna
from optuna.distributions import IntDistribution
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import TrialState

from lorasweep.config.run import RunConfig
from lorasweep.config.sweep import FixedSampler, HalvingPruner, MedianPruner, PrunerConfig
from lorasweep.config.targets import Component, instantiate
from lorasweep.sweep.controller.arm_trials import ArmTrials
from lorasweep.sweep.controller.component_sampler import ask_component
from lorasweep.sweep.controller.entry import Entry
from lorasweep.sweep.controller.folder import SweepFolder
from lorasweep.sweep.controller.history import History
from lorasweep.sweep.controller.proposals import propose
from lorasweep.sweep.controller.rows import (
    RUN_ATTRIBUTE,
    SEED,
    TURN_ATTRIBUTE,
    WINNER_ATTRIBUTE,
    confirm_run_name,
    run_name,
)
from lorasweep.sweep.controller.rules import Halving, MedianOfPeers, NoStopping, StoppingRule
from lorasweep.sweep.controller.storage import CONFIRM_STUDY
from lorasweep.sweep.definition.arms import Arm
from lorasweep.sweep.definition.seeds import SEED_KEYS, arm_seeds
from lorasweep.training.run_log import RunPlace

FIRST_PART_FRACTION = 0.5
"""Share of an arm's trials that an adaptive sampler proposes before the first of them is complete."""


class Stage(Protocol):
    """What the controller must know of a stage."""

    @property
    def name(self) -> str:
        """Returns `search` or `confirm`."""

    reads_test: bool
    """Whether a run that is complete has still to be scored on test data."""
    trials: dict[str, ArmTrials]
    """By the name of the arm, in the order of the sweep file."""

    def propose(self, trials: ArmTrials) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the parameters of an arm's next trial, and what else is to be written of it."""

    def config(self, arm: Arm, params: Mapping[str, Any]) -> RunConfig:
        """Returns all settings of a trial's run."""

    def shown_params(self, arm: Arm, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the settings that tell a trial's run from others of its arm, as a person reads them."""

    def place(self, arm: Arm, number: int) -> RunPlace:
        """Returns where a trial's run belongs."""


class Search:
    """Each arm's sampler proposes, its rule pauses, and the best evaluation on validation data counts."""

    name = "search"
    reads_test = False

    def __init__(self, sweep: SweepFolder, *, session: str | None = None) -> None:
        """Reads each arm's trials; `session` is that of the controller."""
        self._sweep = sweep
        self._session = session
        self.trials = {arm.name: self._open(arm) for arm in sweep.definition.arms}

    def propose(self, trials: ArmTrials) -> tuple[dict[str, Any], dict[str, Any]]:
        """Asks the arm's sampler."""
        arm = trials.arm
        params, state = propose_for(arm, trials.history(), number=len(trials.entries))
        return params, {RUN_ATTRIBUTE: run_name(arm.name, trials.next_number()), **state}

    def config(self, arm: Arm, params: Mapping[str, Any]) -> RunConfig:
        """Returns the arm's settings with the swept values."""
        return arm.compose(params)

    def shown_params(self, arm: Arm, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the swept keys and their values."""
        return dict(params)

    def place(self, arm: Arm, number: int) -> RunPlace:
        """Returns a folder by arm and number."""
        return RunPlace(folder=self._sweep.path / run_name(arm.name, number), arm=arm.name, trial=number)

    def _open(self, arm: Arm) -> ArmTrials:
        config = arm.driver.pruner
        own = isinstance(config, Component)
        return ArmTrials(
            arm,
            study=self._sweep.open_study(arm.name, pruner=_own_pruner(config)),
            storage=self._sweep.storage,
            space=arm.space,
            planned=arm.trials,
            rule=build_rule(arm),
            by_loss=getattr(config, "criterion", "metric") == "loss",
            prunes_by_study=own,
            first_part=_first_part(arm),
            session=self._session,
        )


class Confirm:
    """The best configuration of each arm on fresh seeds. The best weights of each run are scored once on test data."""

    name = "confirm"
    reads_test = True

    def __init__(self, sweep: SweepFolder, search: Search, *, session: str | None = None) -> None:
        """Makes the study of each arm that has a winner, or opens the one that is there."""
        self._sweep = sweep
        self.winners: dict[str, Entry] = {}
        self.trials: dict[str, ArmTrials] = {}
        for arm in sweep.definition.arms:
            number = find_winner(search.trials[arm.name].study)
            if number is None:
                sweep.warn(f"Arm `{arm.name}` has no complete trial, so the confirm stage leaves it out.")
                continue
            self.winners[arm.name] = search.trials[arm.name].entries[number]
            study = sweep.open_study(CONFIRM_STUDY.format(arm=arm.name))
            study.set_user_attr(WINNER_ATTRIBUTE, number)
            self.trials[arm.name] = ArmTrials(
                arm,
                study=study,
                storage=sweep.storage,
                space={SEED: IntDistribution(0, 2**32 - 1)},
                planned=len(self._seeds(arm)),
                session=session,
            )

    def propose(self, trials: ArmTrials) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the next seed."""
        name = confirm_run_name(trials.arm.name, trials.next_number())
        return {SEED: self._seeds(trials.arm)[len(trials.entries)]}, {RUN_ATTRIBUTE: name}

    def config(self, arm: Arm, params: Mapping[str, Any]) -> RunConfig:
        """Returns the winner's settings, every source of chance set by the seed."""
        return arm.compose({**self.shown_params(arm, params), **dict.fromkeys(SEED_KEYS, params[SEED])})

    def shown_params(self, arm: Arm, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the winner's values of the swept keys, with the seed in place of any that were searched."""
        kept = {key: value for key, value in self.winners[arm.name].params.items() if key not in SEED_KEYS}
        return {**kept, SEED: params[SEED]}

    def place(self, arm: Arm, number: int) -> RunPlace:
        """Returns a folder of its own; the trial in the record is the winner."""
        folder = self._sweep.path / confirm_run_name(arm.name, number)
        return RunPlace(folder=folder, arm=arm.name, trial=self.winners[arm.name].number)

    def _seeds(self, arm: Arm) -> list[int]:
        return arm_seeds(arm, self._sweep.record.confirm_seeds)


def find_winner(study: optuna.Study) -> int | None:
    """Returns the number of the best complete trial of a search, the earliest of equals; None where none is complete.

    Only the controller's own trials count.
    """
    sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
    complete = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if TURN_ATTRIBUTE in trial.user_attrs
    ]
    best = min(complete, key=lambda trial: (sign * (trial.value or 0.0), trial.number), default=None)
    return None if best is None else best.number


def propose_for(arm: Arm, history: History, *, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the parameters of an arm's next trial, and what is to be kept with it; as `proposals.propose`."""
    sampler, seed = arm.driver.sampler, arm.driver.sweep.seed
    if isinstance(sampler, Component):
        return ask_component(sampler, history, number=number, seed=seed, arm=arm.name)
    params = propose(
        history,
        sampler=sampler,
        trials=arm.trials,
        number=number,
        seed=seed,
        arm=arm.name,
    )
    return params, {}


def build_rule(arm: Arm) -> StoppingRule:
    """Returns the rule by which an arm's trials are paused.

    Raises:
        ConfigError: The pruner can't be built.
    """
    pruner = arm.driver.pruner
    trainer = next(arm.corners()).trainer
    if next(arm.corners()).method.name == "frozen":  # it has no steps
        return NoStopping()
    steps = range(trainer.eval_every_steps, trainer.max_steps, trainer.eval_every_steps)
    if isinstance(pruner, HalvingPruner):
        # A rung behind the last evaluation but one would compare trials that have ended: it is left out.
        wanted = [fraction * trainer.max_steps for fraction in pruner.rungs]
        latest = steps[-1] + steps.step / 2 if steps else 0
        near = [min(steps, key=lambda step: (abs(step - rung), step)) for rung in wanted if rung <= latest]
        rungs = sorted(set(near))
        if not rungs:
            return NoStopping()  # `find_warnings` says so
        return Halving(rungs=tuple(rungs), reduction_factor=pruner.reduction_factor, min_survivors=pruner.min_survivors)
    if isinstance(pruner, MedianPruner):
        rungs = [step for step in steps if step >= pruner.min_fraction * trainer.max_steps]
        return MedianOfPeers(rungs=tuple(rungs), min_trials=pruner.min_trials)
    _own_pruner(pruner)
    return NoStopping()


def _own_pruner(config: PrunerConfig) -> BasePruner | None:
    expected: type[BasePruner] = BasePruner  # type: ignore[type-abstract]
    return instantiate(config, key="pruner", expected=expected) if isinstance(config, Component) else None


def _first_part(arm: Arm) -> int | None:
    is_adaptive = not isinstance(arm.driver.sampler, FixedSampler)  # a component may learn
    return math.ceil(FIRST_PART_FRACTION * arm.trials) if is_adaptive else None
