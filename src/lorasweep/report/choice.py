"""Chooses the settings to use: the value of each arm's `confirm_each` key, then the arm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorasweep.report.evidence.questions import NEGATIVE_VERDICTS, POSITIVE_VERDICTS
from lorasweep.report.sweep_data import ArmData, SweepData
from lorasweep.wording import count_decimals, format_estimate, format_score


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One subject, and whether the answers settle that it is the one to use."""

    arm: ArmData
    is_settled: bool


def choose_subject(data: SweepData, arm: str) -> Choice | None:
    """Returns the subject of an arm to use; None if none has a score.

    If the sweep asks for the smallest sufficient value, the subject is the smallest value that is shown to be
    sufficient, else the largest. Then the choice is settled if the next smaller value is shown to be insufficient, or
    if there is no smaller value. If the sweep does not ask, the subject is the one with the best score.
    """
    subjects = [one for one in data.arms if one.arm == arm and find_score(one, data) is not None]
    subjects = [one for one in subjects if one.best and one.best.record]
    if not subjects:
        return None
    chain = data.evidence.list_answers("smallest", arm=arm)
    if not chain:
        best = min(subjects, key=lambda one: get_score_sort_key(one, data))
        return Choice(arm=best, is_settled=len(subjects) == 1)
    sufficient = [answer.subject for answer in chain if answer.verdict == "sufficient"]
    smaller = [answer.verdict for answer in chain if answer.verdict != "sufficient"][-1:]
    name = sufficient[0] if sufficient else chain[-1].compared_with[-1]
    chosen = next((one for one in subjects if one.name == name), subjects[-1])
    return Choice(arm=chosen, is_settled=chosen.name == name and set(smaller) <= {"insufficient"})


def choose_arm(data: SweepData, methods: Sequence[str] | None = None) -> Choice | None:
    """Returns the subject to use among all arms that train, or among those of some methods.

    If a subject is shown to be better than full fine-tuning, it is used. Else if subjects are shown to be as good, the
    one with the fewest trained parameters is used. If only a larger value than the smallest sufficient one is shown to
    be as good, that is used, and a smaller one may be as good. Else the one with the best score is used, and the choice
    is settled if all others are shown to be no better.
    """
    rows = [arm.row for arm in data.searches if arm.row.method != "frozen"]
    names = [row.name for row in rows if methods is None or row.method in methods]
    choices = [choice for name in names if (choice := choose_subject(data, name)) and choice.arm.best]
    if not choices:
        return None
    verdicts = {answer.subject: answer.verdict for answer in data.evidence.list_answers("as_good_as_full")}
    positive = [one for one in choices if verdicts.get(one.arm.name) in POSITIVE_VERDICTS]
    as_good = [arm for arm in data.arms if arm.arm in names and verdicts.get(arm.name) in POSITIVE_VERDICTS]
    positive = positive or [Choice(arm=arm, is_settled=False) for arm in as_good if arm.best and arm.best.record]
    better = [one for one in positive if verdicts[one.arm.name] == "better"]
    if positive and not better:
        return min(positive, key=lambda one: one.arm.cost("trainable_params") or math.inf)
    chosen = min(better or choices, key=lambda one: get_score_sort_key(one.arm, data))
    if better:
        return chosen
    others = [one.arm.name for one in choices if one is not chosen]
    is_best = bool(data.evidence.subjects) and all(_is_no_worse(chosen.arm.name, other, data) for other in others)
    return Choice(arm=chosen.arm, is_settled=chosen.is_settled and is_best)


def find_best_arm(method: str, data: SweepData) -> ArmData | None:
    """Returns the subject of a method with the best score; None if none has a score."""
    arms = [arm for arm in data.arms if arm.row.method == method and find_score(arm, data) is not None]
    return min(arms, key=lambda arm: get_score_sort_key(arm, data), default=None)


def get_score_sort_key(arm: ArmData, data: SweepData) -> float:
    """Returns a key that sorts subjects from the best score to the worst; those without a score come last."""
    value = find_score(arm, data)
    return math.inf if value is None else data.sign * value


def find_score(arm: ArmData, data: SweepData) -> float | None:
    """Returns the score of a subject: on test data after a confirm stage, else that of the best complete trial."""
    if data.evidence.subjects:
        found = data.evidence.subject(arm.name)
        return found.mean if found else None
    return arm.best.value if arm.best else None


def format_arm_score(arm: ArmData, data: SweepData) -> str:
    """Returns a subject's score: on test data with its interval after a confirm stage, else the best trial's.

    All subjects of a sweep get the same number of decimals.
    """
    value = find_score(arm, data)
    if found := data.evidence.subject(arm.name):
        decimals = count_decimals(one.interval for one in data.evidence.subjects)
        return format_estimate(value, found.interval, decimals=decimals)
    return format_score(value, beside=[other.best.value for other in data.arms if other.best])


def _is_no_worse(subject: str, other: str, data: SweepData) -> bool:
    """Returns whether an answer shows that a subject is no worse than another."""
    for answer in data.evidence.answers:
        if answer.name != "smallest" and (answer.subject, answer.reference) == (subject, other):
            return answer.verdict in POSITIVE_VERDICTS
        if answer.name != "smallest" and (answer.subject, answer.reference) == (other, subject):
            return answer.verdict in (*NEGATIVE_VERDICTS, "equivalent")
    return False
