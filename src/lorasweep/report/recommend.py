"""Recommends settings from a sweep's answers, and reads them for `lorasweep train --from`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorasweep.config.build import as_settings, dotted_items
from lorasweep.config.run import ALPHA, LR, RANK, STEPS_KEY
from lorasweep.disk import is_running
from lorasweep.errors import ConfigError, RecordError
from lorasweep.recipes.read import TOOLS, load_table
from lorasweep.recipes.write import list_changes
from lorasweep.record import SWEEP_FILE, get_run_folder, restore_config
from lorasweep.report.caveats import Learning, judge_learning
from lorasweep.report.evidence.verdicts import NEGATIVE_VERDICTS, POSITIVE_VERDICTS
from lorasweep.report.sweep_data import Setting, SubjectResult, SweepData, load_sweep_data
from lorasweep.wording import suggest_nearest

TRAIN_EXAMPLES = "data.max_train_examples"


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The subject to use, and what to type to use it."""

    subject: SubjectResult
    setting: Setting
    """Its best setting, with a record."""
    is_settled: bool
    """Whether the answers settle the choice. Otherwise another arm or a smaller value may be as good."""
    commands: dict[str, str] = field(default_factory=dict)
    """`train`: trains the setting on all data. `export`: exports the adapter of a confirm run."""
    recipes: dict[str, dict[str, str]] = field(default_factory=dict)
    """For each other tool its `name`, the `lines` of its training file with these settings, and the `command` that
    writes them. Empty if there are no such lines."""


def choose_subject(data: SweepData, arm: str) -> Recommendation | None:
    """Returns the subject of an arm to use; None if none has a score.

    If the sweep asks for the smallest sufficient value, the subject is the smallest value that is shown to be
    sufficient, else the largest. Then the choice is settled if the next smaller value is shown to be insufficient, or
    if there is no smaller value. If the sweep does not ask, the subject is the one with the best score.
    """
    choices = _list_choices(data, [arm])
    answer = data.evidence.find_answer("smallest", arm)
    if not choices or not answer.rows:
        return _choose_best(choices, data)
    name = answer.good.subject if answer.good else answer.largest
    chosen = next((one for one in choices if one.subject.name == name), choices[-1])
    return replace(chosen, is_settled=chosen.subject.name == name and answer.state == "settled")


def choose_arm(data: SweepData, methods: Sequence[str] | None = None) -> Recommendation | None:
    """Returns the subject to use among all arms that train, or among those of some methods.

    If a subject is shown to be better than full fine-tuning, it is used. Else if subjects are shown to be as good, the
    one with the fewest trained parameters is used. If only a larger value than the smallest sufficient one is shown to
    be as good, that is used, and a smaller one may be as good. Else the one with the best score is used, and the choice
    is settled if all others are shown to be no better.
    """
    rows = [row for row in data.record.arms if not row.is_base]
    names = [row.name for row in rows if methods is None or row.method in methods]
    choices = [choice for name in names if (choice := choose_subject(data, name))]
    verdicts = {row.subject: row.verdict for row in data.evidence.answers if row.name == "as_good_as_full"}

    def list_positive(found: Sequence[Recommendation]) -> list[Recommendation]:
        return [one for one in found if verdicts.get(one.subject.name) in POSITIVE_VERDICTS]

    as_good = [replace(one, is_settled=False) for one in list_positive(_list_choices(data, names))]
    positive = list_positive(choices) or as_good
    if better := [one for one in positive if verdicts[one.subject.name] == "better"]:
        return _choose_best(better, data)
    if positive:
        return min(positive, key=lambda one: one.subject.cost("trainable_params") or math.inf)
    if (chosen := _choose_best(choices, data)) is None:
        return None
    others = [one.subject.name for one in choices if one is not chosen]
    is_best = bool(data.evidence.means) and all(_is_no_worse(chosen.subject.name, other, data) for other in others)
    return replace(chosen, is_settled=chosen.is_settled and is_best)


def pair_fixed_settings(data: SweepData) -> list[tuple[Recommendation, Recommendation]]:
    """Returns each of the fixed arms, with the subject to use of an arm that searches the same method."""
    pairs = []
    for row in (row for row in data.record.arms if row.name in data.fixed_arms):
        others = [other.name for other in data.record.arms if other.space and other.method == row.method]
        searched = _choose_best([one for name in others if (one := choose_subject(data, name))], data)
        if (fixed := choose_subject(data, row.name)) and searched:
            pairs.append((fixed, searched))
    return pairs


def _list_choices(data: SweepData, arms: Sequence[str]) -> list[Recommendation]:
    """Returns the subjects of arms that can be used: those with a score and a record. One alone is settled."""
    found = [one for one in data.subjects if one.arm in arms and data.find_score(one) is not None]
    usable = [(one, one.best) for one in found if one.best and one.best.record]
    return [Recommendation(subject=one, setting=best, is_settled=len(usable) == 1) for one, best in usable]


def _choose_best(choices: Sequence[Recommendation], data: SweepData) -> Recommendation | None:
    sign = data.shown_metric.sign
    return min(choices, key=lambda one: sign * (data.find_score(one.subject) or 0.0), default=None)


def _is_no_worse(subject: str, other: str, data: SweepData) -> bool:
    """Returns whether an answer shows that a subject is no worse than another."""
    for row in data.evidence.answers:
        if row.name != "smallest" and (row.subject, row.reference) == (subject, other):
            return row.verdict in POSITIVE_VERDICTS
        if row.name != "smallest" and (row.subject, row.reference) == (other, subject):
            return row.verdict in (*NEGATIVE_VERDICTS, "equivalent")
    return False


def recommend(data: SweepData, learning: Learning) -> list[Recommendation]:
    """Returns the setting to use, and that of the best LoRA arm if another method is recommended.

    The list has no subject that is not shown to have learned anything.
    """
    chosen = choose_arm(data)
    if learning.has_failed or chosen is None:
        return []
    lora = choose_arm(data, ["lora"])
    choices = [chosen, lora] if lora and chosen.subject.row.method != "lora" else [chosen]
    choices = [one for one in choices if one.subject.name not in learning.unlearned]
    return [
        replace(
            one,
            is_settled=one.is_settled and bool(data.evidence.means),
            commands=_list_commands(one.subject, data),
            recipes=_list_recipes(one, data),
        )
        for one in choices
    ]


def _list_commands(one: SubjectResult, data: SweepData) -> dict[str, str]:
    """Returns the commands that train the settings again, and that export the adapter of a confirm run, if it can."""
    commands, source = {}, shlex.quote(str(data.folder / one.name))
    if data.record.status == "complete":
        commands["train"] = f"lorasweep train --from {source}"
    run = next((run.record for run in one.confirm_runs if run.is_complete and run.record), None)
    if run and one.row.method in ("lora", "peft"):
        with suppress(RecordError):  # damaged settings have no command
            config = restore_config(run)
            trust = " --trust" if config.model.trust_remote_code else ""
            if config.capabilities.exports is True:
                commands["export"] = f"lorasweep export {source} --format peft --out adapter{trust}"
    return commands


def _list_recipes(one: Recommendation, data: SweepData) -> dict[str, dict[str, str]]:
    recipes: dict[str, dict[str, str]] = {}
    if (record := one.setting.record) is None:
        return recipes
    for tool in TOOLS:
        with suppress(RecordError, ConfigError):  # damaged settings, no LoRA, or a value that the tool does not have
            settings = dict(dotted_items(as_settings(restore_config(record))))
            lines = [change.line for change in list_changes(tool, settings, one.setting.params)]
            source = shlex.quote(str(data.folder / one.subject.name))
            command = f"lorasweep export {source} --format {tool} --into FILE.yaml"
            recipes[tool] = {"name": load_table(tool)["name"], "lines": "\n".join(lines), "command": command}
    return recipes


def read_recommended(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the recommended settings of a sweep, and the `origin` that the record of a run with them names.

    `source` is the folder of a sweep, or `SWEEP/ARM` for the setting of an arm or of one of its confirmed values.
    Raises the errors of `find_recommended`, and RecordError if the folder is not a sweep.
    """
    data, one, setting = load_recommended(source, key="--from")
    origin = {"sweep": str(data.folder.resolve()), "name": data.record.name, "arm": one.name, "trial": setting.trial}
    return list_overrides(one, setting), origin


def find_recommended_run(source: Path) -> tuple[Path, str]:
    """Returns the folder of the recommended run, and its name. Arguments and errors as in `read_recommended`."""
    data, one, setting = load_recommended(source, key="SWEEP")
    run = setting.run
    assert run is not None  # `find_recommended` refuses others
    num_seeds = sum(run.is_complete for run in one.confirm_runs)
    best = f", the best of {num_seeds} seeds on validation data" if num_seeds > 1 else ""
    best += " (WARNING: nothing is shown to be learned in this sweep)" if judge_learning(data).has_failed else ""
    return get_run_folder(data.folder, run.run), f"{run.name}{best}"


def load_recommended(
    source: Path, *, key: str, methods: Sequence[str] | None = None
) -> tuple[SweepData, SubjectResult, Setting]:
    """Returns the sweep of SWEEP or SWEEP/ARM, and what `find_recommended` returns, which also raises its errors."""
    is_arm = not (source / SWEEP_FILE).is_file() and (source.parent / SWEEP_FILE).is_file()
    data = load_sweep_data(source.parent if is_arm else source)
    return data, *find_recommended(data, source.name if is_arm else None, key=key, methods=methods)


def find_recommended(
    data: SweepData, name: str | None, *, key: str, methods: Sequence[str] | None = None
) -> tuple[SubjectResult, Setting]:
    """Returns the recommended subject, and its setting, which has a run with a record.

    Args:
        data: A sweep.
        name: An arm or a subject, or None for the whole sweep.
        key: What names them, for messages.
        methods: Without a name, arms of these methods come first.

    Raises:
        RecordError: The sweep is not complete, or there are no such settings.
        ConfigError: The sweep has no such arm.
    """
    folder, in_python = str(data.folder), key == "subject"
    if data.record.status != "complete":
        call = "read_status" if is_running(data.folder) else "resume_sweep"
        remedy = f"Call `lorasweep.{call}({folder!r})`" if in_python else f"Type `{data.completing_command}`"
        raise RecordError(f"a sweep must be complete, but {folder!r} is {data.record.status}. {remedy}.")
    names = list(dict.fromkeys([row.name for row in data.record.arms] + [one.name for one in data.subjects]))
    if name is not None and name not in names:
        raise ConfigError(
            f"`{key}` must be {'' if in_python else 'SWEEP or SWEEP/ARM with '}one of {', '.join(names)}, but got "
            f"{name!r}."
            f"{suggest_nearest(name, names)}"
        )
    if name is None and judge_learning(data).has_failed:
        raise RecordError(
            f"`{key}` must be a sweep that learned something, but nothing is shown to be learned in {folder!r}. "
            f"`{'recommended(ARM)' if in_python else f'{folder}/ARM'}` names an arm nevertheless."
        )
    if name is None:
        choice = (choose_arm(data, methods) if methods else None) or choose_arm(data)
    else:
        choice = choose_subject(data, name)
    one = data.find_subject(name) or (choice.subject if choice else None)
    if one is None or one.best is None or one.best.record is None or one.row.is_base:
        raise RecordError(
            f"`{key}` must be a sweep, or an arm, with a complete trial of a method that trains, but "
            f"{'/'.join(filter(None, (folder, name)))!r} has none."
        )
    return one, one.best


def list_overrides(one: SubjectResult, setting: Setting) -> dict[str, Any]:
    """Returns a subject's settings by dotted key, for `lorasweep train` on all training data."""
    settings = {key: value for key, value in one.row.settings.items() if key != "output"} | setting.params
    exact = (STEPS_KEY, LR, *((RANK, ALPHA) if one.row.method == "lora" else ()))
    # These are listed even if they have default values, so that a change of a default has no effect.
    settings |= {key: value for key in exact if (value := setting.get(key)) is not None}
    return {key: None if key == TRAIN_EXAMPLES else value for key, value in settings.items()}
