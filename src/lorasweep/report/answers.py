"""The answers of a sweep in words: three lines for the top of every output, and a sentence for each question.

Sentences are made here, last. No code reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorasweep.config.run import ALPHA, LR, RANK
from lorasweep.record import QuestionName, RetainedRow
from lorasweep.report.caveats import Learning
from lorasweep.report.evidence.verdicts import (
    POSITIVE_VERDICTS,
    Answer,
    AnswerState,
    Blocker,
    ChainOutcome,
)
from lorasweep.report.next_step import (
    NextStep,
    add_seeds,
    add_trials,
    find_early_step,
    find_reasons,
    find_settling_step,
)
from lorasweep.report.recommend import ChosenSubject, choose_arm, choose_subject, pair_fixed_settings
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

SHOWN_SETTINGS = {"rank": RANK, "α": ALPHA, "learning rate": LR}
NO_TEST_SCORES, UNCONFIRMED = "nothing is confirmed on test data yet", "`confirm.seeds=[3,6,10]` adds the confirm stage"
TOO_WIDE = "the interval is too wide, mostly because few {} were used"
BLOCKER_WORDS: Mapping[Blocker, str] = {
    "another value": "another value, which is tested first, is open",
    "no scores": "there are no test scores of both on the same seeds",
    "no margin": "no margin is known",
    "no gain": "full fine-tuning's gain over the frozen base is not shown, so the share has no interval",
    "one seed": "one seed says nothing about another",
    "few seeds": TOO_WIDE.format("seeds"),
    "few examples": TOO_WIDE.format("{examples}"),
    "few trials": TOO_WIDE.format("trials of the search"),
}


@dataclass(frozen=True, kw_only=True)
class AnswerLine:
    """One of the three questions that every sweep is about, with its answer."""

    question: str
    text: str
    state: AnswerState
    next: NextStep | None = None
    """The command for an open question; None if it is settled or not asked."""


def list_answer_lines(data: SweepData, learning: Learning) -> tuple[AnswerLine, ...]:
    """Returns the three lines at the top of the report, and one for each fixed setting and each retained data set."""
    answers = [_answer_full(data, learning), _answer_rank(data, learning), _answer_setting(data, learning)]
    if cut := describe_cut(data):
        answers = [one if one.state == "not asked" else replace(one, text=f"{one.text} {cut}") for one in answers]
    fixed = [_answer_fixed(*pair, data) for pair in pair_fixed_settings(data) if learning.state != "nothing"]
    return (*answers, *fixed, *(_answer_retained(row, data) for row in data.record.retained))


def describe_cut(data: SweepData) -> str:
    """Returns a sentence if `--minutes` left the longest run less than an epoch; otherwise empty."""
    run = data.longest_run
    if run is None or data.record.minutes is None or not run.epochs or run.epochs >= 1:
        return ""
    steps = f"{run.steps_planned:,} steps of {run.config['trainer']['batch_size']:,}"
    return f"To fit `--minutes`, each run had {steps} ({run.epochs:.2g} epochs)."


def describe_answer(answer: Answer, data: SweepData) -> str:
    """Returns the answer on one subject as a sentence without the full stop."""
    return f"`{answer.subject}` {_describe_result(answer, data)}"


def describe_evidence(one: SubjectData, data: SweepData) -> str:
    """Returns in a few words how well a subject is known to do, for a comment in a file of another tool."""
    if not data.evidence.means:
        return f"the best of {len(one.trials)} trials on validation data; {NO_TEST_SCORES}"
    asked = [*data.evidence.list_answers("as_good_as_full"), *data.evidence.list_answers("smallest")]
    if (answer := next((answer for answer in asked if answer.subject == one.name), None)) is None:
        return "confirmed on test data, and compared with no other arm"
    choice = choose_subject(data, one.arm)
    may_be_smaller = choice is not None and choice.data is one and answer.is_settled and not choice.is_settled
    more = "; not settled: a smaller value may be enough" if may_be_smaller else ""
    return f"{name_value(one.name, data)} {_describe_quantity(answer, data)} ({answer.verdict}{more})"


def describe_change(answer: Answer, data: SweepData) -> str:
    """Returns the change of a subject's score on a retained data set, with its verdict."""
    is_small = answer.verdict in POSITIVE_VERDICTS and answer.verdict != "better"
    verdict = f"no more forgotten than {data.record.retain_margin:g}" if is_small else answer.verdict
    return f"{format_estimate(answer.value, answer.interval)} ({verdict})"


def explain_open(answer: Answer) -> str | None:
    """Returns why an answer is open; None if it is settled."""
    examples = "groups of test examples" if answer.has_groups else "test examples"
    return BLOCKER_WORDS[answer.blocker].format(examples=examples) if answer.blocker else None


def build_entry(answer: Answer) -> dict[str, Any]:
    """Returns the answer as files have it. The name of `smallest` ends in the key's last part: `smallest_rank`."""
    return {
        "name": f"{answer.name}_{short_key(answer.key)}" if answer.name == "smallest" and answer.key else answer.name,
        **{field: getattr(answer, field) for field in ("subject", "reference", "verdict", "value", "interval")},
        "open_because": explain_open(answer),
    }


def _answer_full(data: SweepData, learning: Learning) -> AnswerLine:
    arms = [row.name for row in data.record.arms if row.method == "lora" and row.name not in data.fixed_arms]
    missing = None if arms else "no arm has `method=lora`."
    if arms and not any(row.method == "full" for row in data.record.arms):
        missing = "no arm has `method=full`. Add one to compare LoRA with it."
    question = "Is LoRA as good as full fine-tuning here?"
    line = _answer_chains(question, "as_good_as_full", arms, missing, _describe_full, data, learning)
    compared = [one.name for one in data.subjects if one.row.method in ("lora", "full")]
    if not (names := [f"`{name}`" for name in compared if name in learning.unlearned]):
        return line
    but = f" But {join_words(names)} {'is' if len(names) == 1 else 'are'} not shown to beat {learning.baseline}."
    return replace(line, text=line.text + but)


def _answer_rank(data: SweepData, learning: Learning) -> AnswerLine:
    arms = [row.name for row in data.record.arms if row.method == "lora" and row.key == RANK]
    missing = None if arms else "no LoRA arm has `confirm_each: method.rank`."
    return _answer_chains("Which rank is enough?", "smallest", arms, missing, _describe_smallest, data, learning)


def _answer_chains(
    question: str,
    name: QuestionName,
    arms: Sequence[str],
    missing: str | None,
    describe: Callable[[ChainOutcome, SweepData], str],
    data: SweepData,
    learning: Learning,
) -> AnswerLine:
    """Returns the line on all arms that a question of the sweep asks about; `missing` says why there is none."""
    step = find_early_step(data, learning)
    if not missing and not data.evidence.means:
        more = "the confirm stage follows the search" if data.record.looks else UNCONFIRMED
        return AnswerLine(question=question, text=f"Open: {NO_TEST_SCORES}; {more}.", state="open", next=step)
    outcomes = [data.evidence.find_outcome(name, arm) for arm in arms]
    asked = [outcome for outcome in outcomes if outcome.state != "not asked"]
    if missing or not asked:
        text = f"Not asked: {missing or 'the sweep does not state this question.'}"
        return AnswerLine(question=question, text=text, state="not asked")
    text = " ".join(f"{f'`{one.arm}`: ' if len(asked) > 1 else ''}{describe(one, data)}" for one in asked)
    blocking = [answer for one in asked if (answer := one.blocking)]
    if not blocking:
        return AnswerLine(question=question, text=text, state="settled")
    most, done = max(data.record.looks, default=0), data.record.looks_done
    if done and not done[-1].next and done[-1].seeds < most:
        text += f" The sweep ended at {done[-1].seeds} of {most} seeds, because more had no good chance to settle it."
    step = step or find_settling_step(name, blocking, data)
    if step.command is None and learning.state == "not shown":
        step = NextStep(None, "nothing is shown to be learned. A new sweep with more steps or data may learn something")
    return AnswerLine(question=question, text=text, state="open", next=step)


def _describe_full(outcome: ChainOutcome, data: SweepData) -> str:
    """Returns the answer on the values of one arm against full fine-tuning."""
    good, below, is_alone = outcome.good, outcome.below, len(outcome.answers) == 1
    if good:
        first = name_value(good.subject, data)
        said = f"{first} {_describe_result(good, data)}"
        if below:
            smaller = f"{name_value(below.subject, data)} {_describe_result(below, data)}"
            return f"Yes from {first} on: {said}; {smaller}."
        what = short_key(good.key) if good.key else "value"
        return f"Yes: {said}." if is_alone else f"Yes, at every {what} that was tried: {said}."
    assert below is not None
    name = name_value(below.subject, data)
    if below.is_settled:
        return f"No{'' if is_alone else ', at none of the values'}: {name} {_describe_result(below, data)}."
    more = f" {_name_bad(outcome, data)} worse." if outcome.bad else ""
    return f"Open: {name} {_describe_quantity(below, data)}; {explain_open(below)}.{more}"


def _describe_smallest(outcome: ChainOutcome, data: SweepData) -> str:
    """Returns which value of an arm's key is enough."""
    good, below = outcome.good, outcome.below
    smaller = name_value(below.subject, data) if below else ""
    result = f"{smaller} {_describe_result(below, data)}" if below else ""
    if good:
        first = name_value(good.subject, data)
        enough, said = f"{_capitalize(first)} is enough", _describe_result(good, data)
        if not below:
            return f"{enough}, the smallest that was tried: it {said}."
        verdict = f" and {smaller} is not" if below.is_settled else f"; whether {smaller} is enough is open"
        return f"{enough}{verdict}: {first} {said}; {result}."
    assert below is not None
    largest, quantity = name_value(outcome.largest, data), _describe_quantity(below, data)
    if below.is_settled:
        return f"{_capitalize(largest)}, the largest that was tried: {smaller} is not enough, it {quantity}."
    more = f" {_name_bad(outcome, data)} not enough." if outcome.bad else ""
    said = f"{_capitalize(smaller)} {quantity}; {explain_open(below)}."
    return f"Open: nothing below {largest} is shown to be enough. {said}{more}"


def _name_bad(outcome: ChainOutcome, data: SweepData) -> str:
    names = [name_value(answer.subject, data) for answer in outcome.bad]
    return f"{_capitalize(join_words(names))} {'is' if len(names) == 1 else 'are'}"


def name_value(subject: str, data: SweepData) -> str:
    """Returns the name of a subject in a sentence about one arm: `rank 16`, or the name between backticks."""
    found = data.find_subject(subject)
    return found.subject.label if found and found.subject.key else f"`{subject}`"


def _describe_result(answer: Answer, data: SweepData) -> str:
    """Returns the tested quantity with its interval and verdict; an open answer also has its reason."""
    verdict = "not worse by more than the margin" if answer.verdict == "not worse" else answer.verdict
    because = "" if answer.is_settled else f": {explain_open(answer)}"
    return f"{_describe_quantity(answer, data)} ({verdict}{because})"


def _describe_quantity(answer: Answer, data: SweepData) -> str:
    """Returns the tested quantity with its interval, as the predicate of a sentence about the subject.

    All answers of a question have the same number of decimals.
    """
    value, interval, margin = answer.value, answer.interval, data.margin_share
    intervals = [one.interval for one in data.evidence.find_outcome(answer.name, answer.arm).answers]
    found = data.evidence.estimate_difference(answer.subject, answer.reference)
    if answer.is_share and interval is None and found and (known := found.find_interval(data.evidence.confidence)):
        # a share of a gain that is not shown has no interval, and would look exact
        shown = f"{format_estimate(found.value, known)} {format_metric(data.shown_metric.name)}"
        return f"differs from {name_value(answer.reference, data)} by {shown}"
    if value is None:
        return f"is not compared with {name_value(answer.reference, data)}"
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


def _answer_setting(data: SweepData, learning: Learning) -> AnswerLine:
    choice, is_settled = choose_arm(data, ["lora"]), False
    step = find_reasons("no trial of LoRA is complete", data)
    if learning.state == "nothing":
        text = "Open: no settings are recommended, because nothing was learned."
    elif choice is None:
        text = "Open: no trial of LoRA is complete."
    else:
        is_settled = data.has_small_regret(choice.data)
        text = _describe_setting(choice, data, is_settled=is_settled)
        step = add_trials([choice.data.row], data)
    return AnswerLine(
        question="At which α and learning rate?",
        text=text,
        state="settled" if is_settled else "open",
        next=None if is_settled else find_early_step(data, learning) or step,
    )


def _describe_setting(choice: ChosenSubject, data: SweepData, *, is_settled: bool) -> str:
    best, setting = choice.best, choice.data.setting
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
        return f"Open: {at.lower()}{values}{more} in the best complete trial so far; {NO_TEST_SCORES}.{law}"
    origin = f"tried as trial {best.number} of `{best.arm}`"
    if best.is_predicted:
        ratio = setting.rate_ratio
        near = "" if ratio is None else f", a factor of {ratio:.3g} from the rate of the nearest complete trial"
        origin = f"predicted{near}"
    regret = "how much better another setting could be is not known"
    if setting.regret is not None:
        regret = f"the best untried setting is expected to gain {_format_difference(setting.regret, data)} more"
    # where the best setting is open, the model knows too little to say what others cost
    known = setting.rate_costs if is_settled else {}
    costs = [f"{name} the rate costs at least {_format_difference(c, data)}" for name, c in known.items()]
    more_costs = f" By the search's model, {join_words(costs)}." if costs else ""
    return f"{'' if is_settled else 'Open: '}{at}{values}{more} ({origin}; {regret}).{more_costs}{law}"


def _answer_fixed(fixed: ChosenSubject, searched: ChosenSubject, data: SweepData) -> AnswerLine:
    """Returns what the fixed settings of an arm reach, beside the best ones that the sweep found for the method."""
    evidence, parts = data.evidence, []
    against_full = {answer.subject: answer for answer in evidence.list_answers("as_good_as_full")}
    for one in (fixed, searched):
        named = [(what, one.best.numeric_setting(key)) for what, key in SHOWN_SETTINGS.items()]
        setting = ", ".join(f"{what} {format_setting(number)}" for what, number in named if number is not None)
        answer = against_full.get(one.data.name)
        if answer and answer.value is not None:
            reached = _describe_result(answer, data)
        else:
            mean = evidence.mean(one.data.name)
            metric = data.shown_metric if mean else data.record.search_metric
            interval = mean.find_interval(evidence.confidence) if mean else None
            score = format_estimate(mean.value if mean else one.data.search_score, interval)
            reached = f"has {score} {format_metric(metric.name)}"
        parts.append(f"{setting} {reached}")
    is_settled = all(evidence.mean(one.data.name) for one in (fixed, searched))
    return AnswerLine(
        question=f"What do the settings of {fixed.data.name} cost?",
        text=f"{'' if is_settled else 'Open: '}{_capitalize(parts[0])}; {parts[1]}.",
        state="settled" if is_settled else "open",
        next=None if is_settled else find_early_step(data),
    )


def _format_difference(difference: float, data: SweepData) -> str:
    metric = data.record.search_metric
    gain = (data.evidence.gain if data.record.verdict_metric == metric else None) or data.full_gain
    return f"{format_share(difference / gain)} of full's gain" if gain else f"{format_score(difference)} {metric.name}"


def _answer_retained(row: RetainedRow, data: SweepData) -> AnswerLine:
    question, found = f"What was forgotten of {row.name}?", data.retained.get(row.name, ())
    parts = [f"{name_value(answer.subject, data)} {describe_change(answer, data)}" for answer in found]
    metric = f"{format_metric(row.metric.name)} against `{data.evidence.base}` ({row.metric.better_scores} is better)"
    text = f"Changes of {metric}: {'; '.join(parts)}." if found else f"Open: {NO_TEST_SCORES}."
    is_settled = bool(found) and all(answer.is_settled for answer in found)
    step = find_early_step(data) or (
        add_seeds(data) if found else find_reasons("no run has a score on this data", data)
    )
    return AnswerLine(
        question=question,
        text=text,
        state="settled" if is_settled else "open",
        next=None if is_settled else step,
    )


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]
