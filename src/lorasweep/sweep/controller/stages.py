"""The stages of a sweep: `search` tunes on validation data, `confirm` scores the chosen settings on test data.

The controller makes the same calls to both stages. A stage decides which trials there are and what run each becomes.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

from optuna.distributions import IntDistribution

from lorasweep.config.run import SEED_KEYS, RunConfig
from lorasweep.record import LookRow, SettingRow, Subject, Trial, find_winner, name_run, read_run
from lorasweep.report.evidence.evidence import answer_sweep, build_scale, read_confirm_scores
from lorasweep.sweep.controller.arm_trials import ArmTrials
from lorasweep.sweep.controller.encoding import History
from lorasweep.sweep.controller.folder import SweepFolder, name_study
from lorasweep.sweep.controller.predictions import predict_best
from lorasweep.sweep.controller.proposals import find_batch_start, propose
from lorasweep.sweep.definition.arms import Arm
from lorasweep.sweep.definition.confirm import has_fixed_score
from lorasweep.training.run_log import RunFolder

SETTING, SEED = "setting", "seed"
"""The parameters of a run in the study of the confirm stage: the number of its setting in the arm, and its seed."""
SETTINGS_ATTRIBUTE = "lorasweep:settings"
"""The study of an arm's confirm stage keeps here the parameters of each setting, by number."""


class Search:
    """Each arm's sampler proposes trials. The best evaluation on validation data is a trial's score."""

    name: Literal["search"] = "search"
    reads_test = False
    """Whether a complete run has still to be scored on test data."""

    def __init__(self, sweep: SweepFolder, *, session: str | None = None) -> None:
        """Reads the trials that have begun."""
        self._sweep = sweep
        arms = sweep.definition.arms
        self.arms = {arm.name: self._read_trials(arm, session) for arm in arms}
        self._histories = {arm.name: History(arm, direction=sweep.record.direction) for arm in arms}
        self._base_scores: dict[str, Mapping[str, float]] = {}
        """Every metric of the frozen base, by name of its arm."""

    def propose(self, trials: ArmTrials) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the parameters of an arm's next trial, and what its sampler stores with it."""
        arm, history, number = trials.arm, self._histories[trials.arm.name], len(trials.trials)
        start = find_batch_start(arm, number)
        # a trial of the same batch that has ended is shown as running, because with other workers it would still run
        history.update(
            trial if trial.number < start else replace(trial, state="running") for trial in trials.trials.values()
        )
        return propose(arm, history, number=number)

    def config(self, arm: Arm, trial: Trial) -> RunConfig:
        """Returns all settings of a trial's run."""
        return arm.compose(trial.params)

    def find_untrained_scores(self, arm: Arm) -> Mapping[str, float]:
        """Returns the scores, on the validation data of evaluations, of an answer that needs no training.

        For data with labels it is the constant answer. For a language model it is the frozen base, if it is an arm.
        Empty if none is known, and for an arm that searches nothing, whose only setting the user wants to see.
        """
        if not arm.space:
            return {}
        if self._sweep.record.constant_answer or (base := self._find_base_arm(arm)) is None:
            return self._sweep.record.constant_answer
        ended = [trial for trial in base.trials.values() if trial.state == "complete"]
        if not ended:  # it failed, or the sweep got this arm after others had begun
            return {}
        if base.arm.name not in self._base_scores:  # in the run's record, because a trial has no loss
            self._base_scores[base.arm.name] = read_run(self._sweep.path / ended[0].run).last
        return self._base_scores[base.arm.name]

    def awaits_base(self, arm: Arm) -> bool:
        """Returns whether the trials of an arm must wait for the score of the frozen base (`find_untrained_scores`)."""
        base = self._find_base_arm(arm) if arm.space and not self._sweep.record.constant_answer else None
        return base is not None and not base.is_over

    def _find_base_arm(self, arm: Arm) -> ArmTrials | None:
        """Returns the arm of the frozen language model on the same data; None without such an arm."""
        for base in self.arms.values():
            if base.arm.name != arm.name and has_fixed_score(base.arm) and base.arm.corner_configs[0].module is None:
                same = all(config.data == base.arm.corner_configs[0].data for config in arm.corner_configs)
                return base if same else None
        return None

    def run_folder(self, trial: Trial) -> RunFolder:
        """Returns the folder of a trial's run, and the arm and trial that the run's record names."""
        return RunFolder(path=self._sweep.path / trial.run, arm=trial.arm, trial=trial.number)

    def _read_trials(self, arm: Arm, session: str | None) -> ArmTrials:
        def build_trial(number: int, params: Mapping[str, Any]) -> Trial:
            subject, run = arm.name_subject(params), name_run(self.name, arm.name, number)
            return Trial(arm=arm.name, subject=subject, number=number, params=dict(params), run=run)

        return ArmTrials(
            arm,
            study=self._sweep.open_study(name_study(arm.name, self.name)),
            storage=self._sweep.storage,
            space=arm.space,
            build_trial=build_trial,
            planned=arm.trials,
            find_batch_start=functools.partial(find_batch_start, arm),
            session=session,
        )


class Confirmation:
    """The setting of each subject is trained again on fresh seeds, each run to its end, and scored once on test data.

    Seeds come in groups, up to each planned look. After a look, only subjects of open questions that further seeds may
    settle train on more seeds. The decisions depend on the scores alone, so a resumed stage makes the same decisions.
    Runs that began before a sweep grew are kept, and are not repeated.
    """

    name: Literal["confirm"] = "confirm"
    reads_test = True

    def __init__(
        self, sweep: SweepFolder, settings: Sequence[SettingRow], *, looks: Sequence[int], session: str | None = None
    ) -> None:
        """Reads the runs that have begun, and plans those of the first look."""
        self._sweep = sweep
        self._settings = {(row.arm, row.setting): row for row in settings}
        self._looks = looks
        self._plan: dict[str, list[tuple[int, int]]] = {row.arm: [] for row in settings}
        """Setting and seed of the runs of the looks so far, by arm."""
        self.looks_done: list[LookRow] = []
        self._add_to_plan({row.subject for row in settings})
        arms = [arm for arm in sweep.definition.arms if arm.name in self._plan]
        self.arms = {arm.name: self._read_trials(arm, session) for arm in arms}

    def propose(self, trials: ArmTrials) -> tuple[dict[str, Any], dict[str, Any]]:
        begun = _list_begun(trials)
        setting, seed = next(run for run in self._plan[trials.arm.name] if run not in begun)
        return {SETTING: setting, SEED: seed}, {}

    def config(self, arm: Arm, trial: Trial) -> RunConfig:
        """Returns the settings of a run, with every source of randomness set by the seed."""
        return arm.compose({**trial.params, **dict.fromkeys(SEED_KEYS, trial.seed)})

    def run_folder(self, trial: Trial) -> RunFolder:
        """Returns the folder of a run; the run's record names the trial of the search that has its setting."""
        setting = self._settings.get((trial.arm, trial.setting_number or 0))
        return RunFolder(path=self._sweep.path / trial.run, arm=trial.arm, trial=setting.trial if setting else None)

    @property
    def has_next_look(self) -> bool:
        """Whether a planned look has not been tested yet."""
        return len(self.looks_done) < len(self._looks) and (not self.looks_done or bool(self.looks_done[-1].next))

    def begin_next_look(self) -> bool:
        """Tests the questions after all runs of a look have ended. Returns whether further runs are planned."""
        record, num_done = self._sweep.record, len(self.looks_done)
        record.confirm = [run for trials in self.arms.values() for run in trials.trials.values()]
        # A stage that was killed, or that grew, also has runs of later looks.
        seeds = record.confirm_seeds[: self._looks[num_done]]
        known = replace(record, confirm=[run for run in record.confirm if run.seed in seeds])
        scores = read_confirm_scores(known, self._sweep.path)
        answers = answer_sweep(record, scores)
        undecided = [answer for answer in answers if answer.may_settle]
        subjects = {name for answer in undecided for name in (answer.subject, *answer.compared_with)}
        if undecided and (scale := build_scale(record, scores)).margin.is_share_of_gain:
            subjects |= {name for name in (scale.base, scale.full) if name is not None}
        if self._sweep.definition.sweep_config.confirm.seeds != "auto":  # more seeds were asked for explicitly
            subjects = {row.subject for row in self._settings.values()}
        if num_done + 1 == len(self._looks):
            subjects = set()
        open_subjects = [answer.subject for answer in answers if not answer.is_settled]
        self.looks_done.append(
            LookRow(seeds=self._looks[num_done], open=list(dict.fromkeys(open_subjects)), next=sorted(subjects))
        )
        record.looks_done = list(self.looks_done)
        self._add_to_plan(subjects)
        for name, trials in self.arms.items():
            trials.planned = len(_list_begun(trials) | set(self._plan[name]))
        return bool(subjects)

    def _add_to_plan(self, subjects: Collection[str]) -> None:
        """Adds the runs of the next look: each of these subjects on each of its seeds."""
        done = len(self.looks_done)
        first = self._looks[done - 1] if done else 0
        seeds = self._sweep.record.confirm_seeds[first : self._looks[done]] if done < len(self._looks) else []
        for seed in seeds:
            for row in self._settings.values():
                is_fixed = has_fixed_score(self._sweep.definition.find_arm(row.arm))
                if row.subject in subjects and not (is_fixed and self._plan[row.arm]):
                    self._plan[row.arm].append((row.setting, seed))

    def _read_trials(self, arm: Arm, session: str | None) -> ArmTrials:
        study = self._sweep.open_study(name_study(arm.name, self.name))
        settings: list[dict[str, Any]] = study.user_attrs[SETTINGS_ATTRIBUTE]

        def build_trial(number: int, params: Mapping[str, Any]) -> Trial:
            setting = settings[params[SETTING]]
            return Trial(
                stage=self.name,
                arm=arm.name,
                subject=arm.name_subject(setting),
                number=number,
                params={key: value for key, value in setting.items() if key not in SEED_KEYS},
                setting_number=params[SETTING],
                seed=params[SEED],
                run=name_run(self.name, arm.name, number),
            )

        trials = ArmTrials(
            arm,
            study=study,
            storage=self._sweep.storage,
            space={SETTING: IntDistribution(0, 2**32 - 1), SEED: IntDistribution(0, 2**32 - 1)},
            build_trial=build_trial,
            planned=0,
            session=session,
        )
        trials.planned = len(_list_begun(trials) | set(self._plan[arm.name]))
        return trials


def _list_begun(trials: ArmTrials) -> set[tuple[int | None, int | None]]:
    """Returns the settings and seeds of the confirm runs of an arm that have begun."""
    return {(trial.setting_number, trial.seed) for trial in trials.trials.values()}


Stage: TypeAlias = Search | Confirmation


def choose_settings(search: Search, *, sweep: SweepFolder) -> list[SettingRow]:
    """Returns the setting that the confirm stage trains for each subject.

    It is the best complete trial of an arm, or the setting that is predicted best for a value of `confirm_each`. The
    study of the arm's confirm stage keeps the parameters, before any run begins.
    """
    rows: list[SettingRow] = []
    for arm in (trials.arm for trials in search.arms.values()):
        chosen = {subject.name: _choose(search, arm, subject, sweep) for subject in arm.subjects}
        found = [row for row in chosen.values() if row]
        for name in [name for name, row in chosen.items() if row is None]:
            sweep.warn(f"`{name}` has no trial with a score, so the confirm stage skips it.")
        if not found:
            continue
        study = sweep.open_study(name_study(arm.name, Confirmation.name))
        known: list[dict[str, Any]] = list(study.user_attrs.get(SETTINGS_ATTRIBUTE, []))
        known += [row.params for row in found if row.params not in known]
        if known != study.user_attrs.get(SETTINGS_ATTRIBUTE):
            study.set_user_attr(SETTINGS_ATTRIBUTE, known)
        rows += [replace(row, setting=known.index(row.params)) for row in found]
    return rows


def _choose(search: Search, arm: Arm, subject: Subject, sweep: SweepFolder) -> SettingRow | None:
    fixed = subject.params
    trials = list(search.arms[arm.name].trials.values())
    winner = None if fixed else find_winner(trials, record=sweep.record)
    if winner is None and not fixed:
        return None
    prediction = predict_best(
        arm,
        trials,
        direction=sweep.record.direction,
        fixed=fixed,
        chosen=None if winner is None else winner.params,
    )
    if prediction is None:
        return None
    params, trial = prediction.params, winner.number if winner else prediction.trial
    return SettingRow(
        subject=subject.name,
        arm=arm.name,
        setting=0,
        params=params,
        trial=trial,
        score=winner.value if winner else prediction.score,
        rate_ratio=prediction.rate_ratio,
        regret=prediction.regret if arm.space else None,
        rate_costs=prediction.rate_costs,
    )
