"""The answers of a sweep in words: three lines for the top of every output, and a sentence for each question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorasweep.config.run import ALPHA, LR, RANK
from lorasweep.record import RetainedRow
from lorasweep.report.caveats import Learning
from lorasweep.report.evidence.evidence import RetainedChange
from lorasweep.report.evidence.questions import NEGATIVE_VERDICTS, POSITIVE_VERDICTS, Answer
from lorasweep.report.next_step import NextStep, find_next_step, find_retained_step, find_trials_step
from lorasweep.report.recommend import ChosenSubject, choose_arm
from lorasweep.report.sweep_data import SubjectData, SweepData
from lorasweep.wording import (
    count_decimals,
    count_percent_decimals,
    format_estimate,
    format_metric,
    format_score,
    format_setting,
    format_settings,
    format_share,
    format_share_estimate,
    join_words,
    short_key,
)

NOT_ASKED = "Not asked"
NO_TEST_SCORES = "nothing is confirmed on test data yet"
VERDICT_WORDS = {"not worse": "not worse by more than the margin"}
"""Verdicts that have another wording in a sentence."""


@dataclass(frozen=True, kw_only=True)
class AnswerLine:
    """One of the three questions that every sweep is about, with its answer."""

    question: str
    text: str
    is_settled: bool
    next: NextStep | None = None
    """The command for an open question; None if it is settled or not asked."""


def list_answer_lines(data: SweepData, learning: Learning) -> tuple[AnswerLine, ...]:
    """Returns the three lines at the top of the report, and one for each retained data set."""
    unlearned = _describe_unlearned(data, learning)
    (full, is_full), (rank, is_rank), setting = _answer_full(data), _answer_rank(data), _answer_setting(data, learning)
    answers = (
        AnswerLine(
            question="Is LoRA as good as full fine-tuning here?",
            text=f"{full}{unlearned}",
            is_settled=is_full,
            next=None if is_full or full.startswith(NOT_ASKED) else find_next_step("as_good_as_full", data, learning),
        ),
        AnswerLine(
            question="Which rank is enough?",
            text=rank,
            is_settled=is_rank,
            next=None if is_rank or rank.startswith(NOT_ASKED) else find_next_step("smallest", data, learning),
        ),
        setting,
    )
    return (*answers, *(_answer_retained(row, data) for row in data.record.retained))


def describe_answer(answer: Answer, data: SweepData) -> str:
    """Returns the answer on one subject as a sentence without the full stop."""
    return f"`{answer.subject}` {_describe_result(answer, data)}"


def describe_change(change: RetainedChange, data: SweepData) -> str:
    """Returns the change of a subject's score on a retained data set, with its verdict."""
    is_small = change.verdict in POSITIVE_VERDICTS and change.verdict != "better"
    verdict = f"no more forgotten than {data.record.retain_margin:g}" if is_small else change.verdict
    return f"{format_estimate(change.change, change.interval)} ({verdict})"


def name_value(subject: str, data: SweepData) -> str:
    """Returns the name of a subject in a sentence about one arm: `rank 16`, or the name between backticks."""
    found = data.find_subject(subject)
    return found.subject.label if found and found.subject.key else f"`{subject}`"


def _answer_full(data: SweepData) -> tuple[str, bool]:
    arms = [row.name for row in data.record.arms if row.method == "lora"]
    if not arms:
        return f"{NOT_ASKED}: no arm has `method=lora`.", False
    if not any(row.method == "full" for row in data.record.arms):
        return f"{NOT_ASKED}: no arm has `method=full`. Add one to compare LoRA with it.", False
    if not data.evidence.means:
        is_searched = data.record.status == "complete"  # before the end, the arms may have had unequal searches
        best = [one for one in data.subjects if is_searched and one.row.method == "lora" and one.best]
        shares = [share for one in best if (share := data.subject_share_of_full_gain(one)[0]) is not None]
        if not shares:
            return _say_unconfirmed(data), False
        kept = f"The best LoRA trial keeps {format_share(max(shares))} of full's gain on validation data."
        return f"{_say_unconfirmed(data)} {kept}", False
    chains = [(arm, data.evidence.list_answers("as_good_as_full", arm=arm)) for arm in arms]
    found = [(arm, _judge_chain(chain, data)) for arm, chain in chains if chain]
    return _join_arms(found) if found else ("Open: the sweep does not state this question.", False)


def _judge_chain(chain: Sequence[Answer], data: SweepData) -> tuple[str, bool]:
    """Returns the answer on the values of one arm against full fine-tuning, and whether it is settled."""
    positive = [answer for answer in chain if answer.verdict in POSITIVE_VERDICTS]
    smaller = [answer for answer in chain if answer.verdict not in POSITIVE_VERDICTS][-1:]
    if positive:
        first = name_value(positive[0].subject, data)
        said = f"{first} {_describe_result(positive[0], data)}"
        if len(chain) == 1:
            return f"Yes: {said}.", True
        if not smaller:
            what = short_key(chain[0].key) if chain[0].key else "value"
            return f"Yes, at every {what} that was tried: {said}.", True
        below = f"{name_value(smaller[0].subject, data)} {_describe_result(smaller[0], data)}"
        return f"Yes from {first} on: {said}; {below}.", smaller[0].is_settled
    largest = chain[-1]
    name = name_value(largest.subject, data)
    if largest.verdict in NEGATIVE_VERDICTS:
        said = f"{name} {_describe_result(largest, data)}."
        return f"No{', at none of the values' if len(chain) > 1 else ''}: {said}", True
    worse = [name_value(answer.subject, data) for answer in chain if answer.verdict in NEGATIVE_VERDICTS]
    more = f" {join_words(worse)} {'is' if len(worse) == 1 else 'are'} worse." if worse else ""
    said = f"{name} {_describe_quantity(largest, data)}; {_describe_open(largest)}."
    return f"Open: {said}{_capitalize(more)}", False


def _answer_rank(data: SweepData) -> tuple[str, bool]:
    asked = [row.name for row in data.record.arms if row.method == "lora" and row.key == RANK]
    if not asked:
        return f"{NOT_ASKED}: no LoRA arm has `confirm_each: method.rank`.", False
    if not data.evidence.means:
        return _say_unconfirmed(data), False
    found = [(arm, judge_smallest(arm, data)) for arm in asked if data.evidence.list_answers("smallest", arm=arm)]
    return _join_arms(found) if found else ("Open: the sweep does not state this question.", False)


def judge_smallest(arm: str, data: SweepData) -> tuple[str, bool]:
    """Returns which value of an arm's key is enough, and whether that is settled."""
    chain = data.evidence.list_answers("smallest", arm=arm)
    sufficient = [answer for answer in chain if answer.verdict == "sufficient"]
    smaller = [answer for answer in chain if answer.verdict != "sufficient"][-1:]
    largest = name_value(chain[-1].compared_with[-1], data)
    below = name_value(smaller[0].subject, data) if smaller else ""
    result = _describe_result(smaller[0], data) if smaller else ""
    if sufficient:
        first = name_value(sufficient[0].subject, data)
        said = f"{first} {_describe_result(sufficient[0], data)}"
        if not smaller:
            return f"{_capitalize(first)} is enough, the smallest that was tried: it{said.removeprefix(first)}.", True
        if smaller[0].verdict == "insufficient":
            return f"{_capitalize(first)} is enough and {below} is not: {said}; {below} {result}.", True
        return f"{_capitalize(first)} is enough; whether {below} is enough is open: {said}; {below} {result}.", False
    if smaller[0].verdict == "insufficient":
        said = _describe_quantity(smaller[0], data)  # without the verdict, which the sentence says
        return f"{_capitalize(largest)}, the largest that was tried: {below} is not enough, it {said}.", True
    worse = [name_value(answer.subject, data) for answer in chain if answer.verdict == "insufficient"]
    more = f" {_capitalize(join_words(worse))} {'is' if len(worse) == 1 else 'are'} not enough." if worse else ""
    said = f"{below} {_describe_quantity(smaller[0], data)}; {_describe_open(smaller[0])}."
    return f"Open: nothing below {largest} is shown to be enough. {_capitalize(said)}{more}", False


def _answer_setting(data: SweepData, learning: Learning) -> AnswerLine:
    choice = choose_arm(data, ["lora"])
    text, is_settled = _describe_setting(choice, data, learning)
    step = None if is_settled else find_trials_step(choice.data.arm if choice else None, data, learning)
    return AnswerLine(question="At which α and learning rate?", text=text, is_settled=is_settled, next=step)


def _describe_setting(choice: ChosenSubject | None, data: SweepData, learning: Learning) -> tuple[str, bool]:
    if learning.state == "nothing":
        return "Open: no settings are recommended, because nothing was learned.", False
    if choice is None or choice.data.best is None:
        return "Open: no trial of LoRA is complete.", False
    best, setting = choice.data.best, choice.data.setting
    alpha, lr, rank = (best.numeric_setting(key) for key in (ALPHA, LR, RANK))
    named = [(alpha, "α"), (lr, "learning rate")]
    values = join_words([f"{name} {format_setting(value)}" for value, name in named if value is not None])
    others = {key: value for key, value in best.params.items() if key not in (RANK, ALPHA, LR)}
    at = "" if rank is None else f"Rank {format_setting(rank)}: "
    more = f" with {format_settings(others)}" if others else ""
    law = ""
    if alpha and lr and best.follows_rate_law:
        law = f" At another α: lr = u/√α with u = {lr * math.sqrt(alpha):.3g}."
    if setting is None:
        return f"Open: {at.lower()}{values}{more} in the best complete trial so far; {NO_TEST_SCORES}.{law}", False
    if best.is_predicted:
        ratio = setting.rate_ratio
        near = "" if ratio is None else f", a factor of {ratio:.3g} from the rate of the nearest complete trial"
        origin = f"predicted{near}"
    else:
        origin = f"tried as trial {best.number} of `{best.arm}`"
    regret, is_small = describe_regret(choice.data, data)
    costs = [f"{name} the rate costs at least {_format_difference(c, data)}" for name, c in setting.rate_costs.items()]
    more_costs = f" By the search's model, {join_words(costs)}." if costs else ""
    return f"{at}{values}{more} ({origin}; {regret}).{more_costs}{law}", is_small


def _answer_retained(row: RetainedRow, data: SweepData) -> AnswerLine:
    question, base = f"What was forgotten of {row.name}?", data.evidence.base
    changes = [change for change in data.retained if change.data == row.name and change.subject != base]
    if not changes:
        step = find_retained_step([], data)
        return AnswerLine(question=question, text=f"Open: {NO_TEST_SCORES}.", is_settled=False, next=step)
    parts = [f"{name_value(change.subject, data)} {describe_change(change, data)}" for change in changes]
    return AnswerLine(
        question=question,
        text=f"Changes of {format_metric(row.metric.name)} against `{base}` "
        f"({row.metric.better_scores} is better): {'; '.join(parts)}.",
        is_settled=not (unsettled := [change for change in changes if change.verdict == "open"]),
        next=find_retained_step(unsettled, data) if unsettled else None,
    )


def describe_regret(one: SubjectData, data: SweepData) -> tuple[str, bool]:
    """Returns how much better an untried setting may be, and whether that is known to be less than the margin."""
    regret = one.setting.regret if one.setting else None
    if regret is None:
        return "how much better another setting could be is not known", False
    margin, size = data.search_margin, _format_difference(regret, data)
    is_small = margin is not None and regret <= margin
    advice = "" if is_small or margin is None else ", which is above the margin; more trials would lower it"
    return f"the best untried setting is expected to gain {size} more{advice}", is_small


def _format_difference(difference: float, data: SweepData) -> str:
    is_searched = data.record.verdict_metric.name == data.record.search_metric.name
    gain = (data.evidence.gain if is_searched else None) or data.full_gain
    return (
        f"{format_share(difference / gain)} of full's gain"
        if gain
        else f"{format_score(difference)} {data.record.search_metric.name}"
    )


def _describe_result(answer: Answer, data: SweepData) -> str:
    """Returns the tested quantity with its interval and verdict; an open answer also has its reason and remedy."""
    verdict = VERDICT_WORDS.get(answer.verdict, answer.verdict)
    if answer.verdict == "open":
        verdict = f"open: {_describe_open(answer)}"
    return f"{_describe_quantity(answer, data)} ({verdict})"


def _describe_open(answer: Answer) -> str:
    closing = f"; {answer.to_settle} would probably settle it" if answer.to_settle else ""
    return f"{answer.open_because}{closing}"


def _describe_quantity(answer: Answer, data: SweepData) -> str:
    """Returns the tested quantity with its interval, as the predicate of a sentence about the subject.

    All answers of a question have the same number of decimals.
    """
    if answer.value is None:
        return f"is not compared with {name_value(answer.reference, data)}"
    value, interval, margin = answer.value, answer.interval, data.margin_share
    intervals = [one.interval for one in data.evidence.list_answers(answer.name, arm=answer.arm)]
    if not answer.is_share:
        margin = data.evidence.margin or 0.0
        decimals = count_decimals(intervals, critical=(0.0, margin, -margin))
        difference = format_estimate(value, interval, decimals=decimals)
        metric = f"{format_metric(data.shown_metric.name)} ({data.shown_metric.better_scores} is better)"
        return f"differs from `{answer.reference}` by {difference} {metric}"
    critical = (1.0, 1.0 - margin, 1.0 + margin)
    decimals = count_percent_decimals(intervals, critical=critical)
    if answer.name == "as_good_as_full":
        return f"keeps {format_share_estimate(value, interval, decimals=decimals)} of full's gain"
    # against another reference, the tested quantity is 1 plus the difference as a share of full's gain
    shifted = None if interval is None else (interval[0] - 1, interval[1] - 1)
    difference = format_share_estimate(value - 1, shifted, decimals=decimals)
    return f"gains {difference} of full's gain against {name_value(answer.reference, data)}"


def _describe_unlearned(data: SweepData, learning: Learning) -> str:
    """Returns a sentence on the subjects of LoRA and of full fine-tuning that are not shown to have learned anything.

    It has a space before it; the text is empty if there are none.
    """
    compared = [one.name for one in data.subjects if one.row.method in ("lora", "full")]
    names = [f"`{name}`" for name in compared if name in learning.unlearned]
    if not names:
        return ""
    return f" But {join_words(names)} {'is' if len(names) == 1 else 'are'} not shown to beat {learning.answer}."


def _say_unconfirmed(data: SweepData) -> str:
    if data.record.looks:
        return f"Open: {NO_TEST_SCORES}; the confirm stage follows the search."
    return f"Open: {NO_TEST_SCORES}; `confirm.seeds=auto` adds the confirm stage."


def _join_arms(found: Sequence[tuple[str, tuple[str, bool]]]) -> tuple[str, bool]:
    """Returns the answers of several arms as one text, and whether all are settled."""
    if len(found) == 1:
        return found[0][1]
    text = " ".join(f"`{arm}`: {text}" for arm, (text, _) in found)
    return text, all(is_settled for _, (_, is_settled) in found)


def _capitalize(text: str) -> str:
    stripped = text.lstrip()
    return text[: len(text) - len(stripped)] + stripped[:1].upper() + stripped[1:]
