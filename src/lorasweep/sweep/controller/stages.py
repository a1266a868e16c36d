"""The stages of a sweep: `search` tunes on validation data, `confirm` scores the chosen settings on test data.

The controller hands out the trials of the current stage, round by round (`list_rounds`, `propose`). Beside that, only
the search knows the scores of untrained answers, and only the confirm stage has settings and looks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

from lorasweep.record import (
    LookRow,
    SettingRow,
    Trial,
    count_seeds_due,
    find_winner,
    list_confirm_runs,
    read_run,
)
from lorasweep.report.caveats import judge_learning
from lorasweep.report.evidence.evidence import answer_sweep, read_confirm_scores
from lorasweep.report.sweep_data import load_sweep_data
from lorasweep.sweep.controller.arm_trials import SEED, SETTING, SETTINGS_ATTRIBUTE, ArmTrials
from lorasweep.sweep.controller.encoding import History
from lorasweep.sweep.controller.folder import SweepFolder, name_study
from lorasweep.sweep.controller.predictions import predict_best
from lorasweep.sweep.controller.proposals import find_batch_start, propose
from lorasweep.sweep.controller.stopping import find_half_step
from lorasweep.sweep.definition.arms import Arm
from lorasweep.sweep.definition.confirm import has_fixed_score


class Search:
    """Each arm's sampler proposes trials. The best evaluation on validation data is a trial's score."""

    name: Literal["search"] = "search"

    def __init__(self, sweep: SweepFolder) -> None:
        """Reads the trials that have begun."""
        self._sweep = sweep
        self.arms: dict[str, ArmTrials] = {}
        self._histories: dict[str, History] = {}
        for arm in sweep.definition.arms:
            self.arms[arm.name] = ArmTrials(sweep, arm, stage=self.name, planned=arm.trials)
            self._histories[arm.name] = History(arm, metric=sweep.record.search_metric)
        self._base_scores: dict[str, Mapping[str, float]] = {}
        """Every metric of the frozen base, by name of its arm."""

    def list_rounds(self, trials: ArmTrials) -> list[list[Trial | None]]:
        """Returns the arm's trials by batch of proposals. None stands for a trial that has not begun."""
        every = [*trials.trials.values(), *[None] * trials.num_left]
        first = find_batch_start(trials.arm, trials.planned - 1)
        return [batch for batch in (every[:first], every[first:]) if batch]

    def propose(self, trials: ArmTrials) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the parameters of an arm's next trial, and what its sampler stores with it."""
        arm, history, number = trials.arm, self._histories[trials.arm.name], len(trials.trials)
        start = find_batch_start(arm, number)
        # a trial of the same batch that has ended is shown as running, because with other workers it would still run
        history.update(
            trial if trial.number < start else replace(trial, state="running") for trial in trials.trials.values()
        )
        return propose(arm, history, number=number)

    def find_untrained_scores(self, arm: Arm) -> Mapping[str, float]:
        """Returns the validation scores of an answer that needs no training: the constant one, or the frozen base.

        Empty if none is known, and for an arm that searches nothing, whose only setting the user wants to see.
        """
        base = self._find_base_arm(arm) if arm.space and not self._sweep.record.constant_answer else None
        if base is None:
            return self._sweep.record.constant_answer if arm.space else {}
        ended = [trial for trial in base.trials.values() if trial.state == "complete"]
        if not ended:  # it failed
            return {}
        if base.arm.name not in self._base_scores:  # in the run's record, because a trial has no loss
            self._base_scores[base.arm.name] = read_run(self._sweep.path / ended[0].run).last
        return self._base_scores[base.arm.name]

    def has_learned(self) -> bool:
        """Returns whether a trial is better than an answer that needs no training, as the report judges it.

        If none is, confirm runs would take most of the sweep's time to say so again. Returns True if that is not known,
        or if an arm has runs that are too short to be judged.
        """
        trained = [one.arm.base for one in self.arms.values() if not one.arm.base.method.trains_nothing]
        if any(find_half_step(config) is None for config in trained):
            return True
        ended = [trial for one in self.arms.values() for trial in one.trials.values()]
        data = load_sweep_data(self._sweep.path, replace(self._sweep.record, trials=ended))
        return judge_learning(data).state != "nothing"

    def awaits_base(self, arm: Arm) -> bool:
        """Returns whether the trials of an arm must wait for the score of the frozen base (`find_untrained_scores`)."""
        base = self._find_base_arm(arm) if arm.space and not self._sweep.record.constant_answer else None
        return base is not None and not base.is_over

    def _find_base_arm(self, arm: Arm) -> ArmTrials | None:
        """Returns the arm of the frozen language model on the same data; None without such an arm."""
        for base in self.arms.values():
            if base.arm.name != arm.name and has_fixed_score(base.arm) and base.arm.base.data.task_path:
                same = all(config.data == base.arm.base.data for config in arm.corner_configs)
                return base if same else None
        return None


class Confirmation:
    """The setting of each subject is trained again on fresh seeds, each run to its end, and scored once on test data.

    All subjects train up to each planned look, until no open question may be settled by further seeds. The decisions
    depend on the scores alone, so a resumed stage makes the same decisions. Runs that began before a sweep grew are
    kept, and are not repeated.
    """

    name: Literal["confirm"] = "confirm"

    def __init__(self, sweep: SweepFolder, settings: Sequence[SettingRow], *, looks: Sequence[int]) -> None:
        """Reads the runs that have begun, and plans those of the first look."""
        self._sweep = sweep
        self._settings = {(row.arm, row.setting): row for row in settings}
        self._looks = looks
        self._plan = defaultdict[str, list[list[tuple[int, int]]]](list)
        """Setting and seed of the runs that each look so far trains, by arm."""
        self.looks_done: list[LookRow] = []
        chosen = {row.arm for row in settings}
        arms = [arm for arm in sweep.definition.arms if arm.name in chosen]
        self.arms = {arm.name: ArmTrials(sweep, arm, stage=self.name, planned=0) for arm in arms}
        self._plan_runs()

    def list_rounds(self, trials: ArmTrials) -> list[list[Trial | None]]:
        """Returns the arm's runs by look, as `Search.list_rounds`."""
        begun = _list_begun(trials)
        return [[begun.get(run) for run in runs] for runs in self._plan[trials.arm.name]]

    def propose(self, trials: ArmTrials) -> tuple[dict[str, Any], dict[str, Any]]:
        begun = _list_begun(trials)
        setting, seed = next(run for runs in self._plan[trials.arm.name] for run in runs if run not in begun)
        return {SETTING: setting, SEED: seed}, {}

    def find_tried(self, run: Trial) -> int | None:
        """Returns the number of the search's trial that has the setting of a run; None if no trial has it."""
        row = self._settings.get((run.arm, run.setting_number or 0))
        return row.trial if row else None

    @property
    def has_next_look(self) -> bool:
        return not self.looks_done or not self.looks_done[-1].is_last

    def begin_next_look(self) -> bool:
        """Tests the questions after all runs of a look have ended. Returns whether further runs are planned."""
        record, num_done = self._sweep.record, len(self.looks_done)
        record.confirm = [run for trials in self.arms.values() for run in trials.trials.values()]
        # A stage that was killed, or that grew, also has runs of later looks.
        seeds = record.confirm_seeds[: self._looks[num_done]]
        known = replace(record, confirm=[run for run in record.confirm if run.seed in seeds])
        scores = read_confirm_scores(known, self._sweep.path)
        answers = answer_sweep(record, scores)
        # where more seeds were asked for, also those that the plan had given up
        stops_early = isinstance(self._sweep.definition.sweep_config.confirm.seeds, tuple)
        is_over = stops_early and not any(answer.may_settle for answer in answers)
        is_last = is_over or num_done + 1 == len(self._looks)
        still_open = dict.fromkeys(answer.subject for answer in answers if not answer.is_settled)
        self.looks_done.append(LookRow(seeds=self._looks[num_done], open=list(still_open), is_last=is_last))
        record.looks_done = list(self.looks_done)
        self._plan_runs()
        return not is_last

    def _plan_runs(self) -> None:
        seeds, num_due = self._sweep.record.confirm_seeds, count_seeds_due(self._looks, self.looks_done)
        for name, trials in self.arms.items():
            settings = {row.subject: row.setting for row in self._settings.values() if row.arm == name}
            is_fixed = has_fixed_score(trials.arm)
            runs = list_confirm_runs([*settings], seeds=num_due, is_fixed=is_fixed)
            known = [run for look in self._plan[name] for run in look]  # the runs of earlier looks come first
            planned = [(settings[subject], seeds[index]) for subject, index in runs]
            new = [run for run in planned if run not in known]
            self._plan[name].append(new)
            trials.planned = len({*_list_begun(trials), *known, *new})


def _list_begun(trials: ArmTrials) -> dict[tuple[int | None, int | None], Trial]:
    """Returns the confirm runs of an arm that have begun, by setting and seed."""
    return {(trial.setting_number, trial.seed): trial for trial in trials.trials.values()}


OpenStage: TypeAlias = Search | Confirmation


def choose_settings(search: Search, *, sweep: SweepFolder) -> list[SettingRow]:
    """Returns the setting that the confirm stage trains for each subject.

    It is the best complete trial of an arm, or the setting that is predicted best for a value of `confirm_each`. The
    study of the arm's confirm stage keeps the parameters, before any run begins.
    """
    rows: list[SettingRow] = []
    for arm_trials in search.arms.values():
        arm, trials = arm_trials.arm, list(arm_trials.trials.values())
        study = sweep.open_study(name_study(arm.name, Confirmation.name))
        known: list[dict[str, Any]] = list(study.user_attrs.get(SETTINGS_ATTRIBUTE, []))
        for subject in arm.subjects:
            winner = None if subject.params else find_winner(trials, record=sweep.record)
            row = None
            if subject.params or winner:
                chosen = winner.params if winner else None
                row = predict_best(arm, trials, subject, metric=sweep.record.search_metric, chosen=chosen)
            if row is None:
                sweep.warn(f"`{subject.name}` has no trial with a score, so the confirm stage skips it.")
                continue
            if row.params not in known:
                known.append(row.params)
            if winner is not None:
                row = replace(row, trial=winner.number, score=winner.search_score)
            rows.append(replace(row, setting=known.index(row.params)))
        if known != study.user_attrs.get(SETTINGS_ATTRIBUTE, []):
            study.set_user_attr(SETTINGS_ATTRIBUTE, known)
    return rows
