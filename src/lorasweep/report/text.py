"""The words of the report: what `report.facts` found, as sentences and cells for every output. No code reads them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorasweep.config.method import LoraConfig
from lorasweep.config.run import ALPHA, LR, RANK, SCALING, STEPS_KEY
from lorasweep.config.sweep import ENOUGH_SEEDS, ENOUGH_TRIALS, parse_margin
from lorasweep.record import QuestionName
from lorasweep.report.caveats import Fault
from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.evidence.verdicts import (
    CHAINS,
    Answer,
    AnswerName,
    AnswerRow,
    Blocker,
    Missing,
    NextStep,
    StepName,
    Verdict,
)
from lorasweep.report.facts import Findings, list_subject_rows
from lorasweep.report.recommend import Recommendation, choose_subject
from lorasweep.report.sweep_data import SubjectResult, SweepData
from lorasweep.wording import (
    UNKNOWN,
    count_decimals,
    count_percent_decimals,
    format_bytes,
    format_count,
    format_estimate,
    format_metric,
    format_score,
    format_seconds,
    format_setting,
    format_settings,
    format_share,
    format_share_estimate,
    join_words,
    short_key,
)

BLOCKERS: Mapping[Blocker, str] = {
    "another value": "another value is tested first",
    "no scores": "no test scores of both on the same seeds",
    "no margin": "no margin is known",
    "no gain": "nothing clearly improved on the base, so shares of a gain mean nothing",
    "one seed": "one seed says nothing about another",
    "few seeds": "mostly because of few seeds",
    "few examples": "mostly because of few test examples",
    "few trials": "mostly because of few trials of the search",
}
NEEDS: Mapping[Blocker, str] = {
    "no margin": "an arm with `method=frozen`, or `confirm.margin` as a number in the metric's unit",
    "no gain": "more steps or data",
    "few seeds": "a larger `confirm.margin`",
    "few examples": "more test examples",
}
"""For each blocker of an answer, a change that may settle the question in a new sweep."""
MISSING: Mapping[Missing, str] = {
    "no LoRA arm": "no arm has `method=lora`",
    "no full arm": "no arm has `method=full`",
    "no rank": "no LoRA arm has `confirm_each: method.rank`",
    "not stated": "the sweep does not state this question",
    "not confirmed": "nothing is confirmed on test data yet",
    "no trial": "no trial of LoRA is complete",
    "not learned": "nothing is shown to be learned",
    "no score": "no run has a score on this data",
}
STEPS: Mapping[StepName, str] = {
    "wait": "the sweep still runs",
    "complete": "completes the sweep",
    "confirm": "adds the confirm stage",
    "longer": "a longer run, {} steps",
    "arm": "a new sweep with full fine-tuning; `plan` instead of `sweep` shows its time",
    "seeds": "{} seeds in all may settle it",
    "trials": "twice the trials, {} in all",
}
PURPOSES = {
    "train": "To train {} again on all training data",
    "export": "To get the adapter of the best confirm run of {}",
}
SETTING_NAMES = {"method.name": "method", RANK: "rank", ALPHA: "α", LR: "learning rate", STEPS_KEY: "steps"}
"""The settings that the recommendation shows first, with their names."""
METHOD_NAMES = {"lora": "LoRA", "full": "full fine-tuning"}
PRESENT: Mapping[Verdict, str] = {
    "worse": "They are worse",
    "better": "Nothing, they are better",
    "equivalent": "Nothing that matters",
    "not worse": "No more than the margin",
}
OUTSIDE: Mapping[AnswerName, str] = {
    "present": "The settings in use are compared with settings that the same test scores chose, which makes them look "
    "worse than they are. This verdict is outside the 5 %.",
    "retained": "Verdicts on what was forgotten are outside the 5 %.",
}
"""A sentence for each kind of answer that the sweep does not state beforehand."""
MAX_HARMLESS_CUT = 0.1
"""The share of training examples above which those that are cut off may explain that nothing was learned."""


def name_question(answer: Answer, data: SweepData) -> str:
    arm = data.find_arm(answer.arm)
    several = sum(row.method == "lora" and row.name not in data.fixed_arms for row in data.record.arms) > 1
    name = "LoRA" if arm is None or (arm.method == "lora" and not several) else f"`{arm.name}`"
    key = short_key(arm.key) if arm and arm.key else "rank"
    of_arm = "" if name == "LoRA" else f" of {name}"
    return {
        "as_good_as_full": f"Is {name} as good as full fine-tuning here?",
        "smallest": f"Which {key}{of_arm} is enough?",
        "setting": "At which α and learning rate?",
        "pair": f"Is {name} as good as `{answer.rows[0].reference}`?" if answer.rows else "",
        "present": f"What do the settings of {answer.arm} cost?",
        "retained": f"What was forgotten of {answer.arm}?",
    }[answer.name]


def describe_headline(answer: Answer, data: SweepData) -> str:
    """Returns the answer in a few words: the values, intervals and verdicts are in its rows."""
    if answer.missing:
        because = f"{'Open' if answer.state == 'open' else 'Not asked'}: {MISSING[answer.missing]}."
        if answer.missing in ("not confirmed", "no trial") and data.record.status != "complete":
            done = sum(trial.state == "complete" for trial in data.trials)
            because = f"Open: {done} of {sum(row.trials for row in data.record.arms)} trials are complete."
        one = data.find_subject(answer.arm) if answer.missing == "not confirmed" else None
        best = data.find_best_subject(one.arm) if one else None
        return f"{because} Best so far: {describe_full_setting(best)}." if best else because
    first, blocking = answer.rows[0], answer.blocking
    why = f"open: {BLOCKERS[blocking.blocker]}" if blocking and blocking.blocker else "open"
    if len(answer.needs) > 1:
        why = f"open: because of {join_words(list(answer.needs))}"
    if answer.name == "setting":
        one = data.find_subject(first.subject)
        setting = describe_full_setting(one, is_asked=True)
        weakness = _describe_weakness(answer, data)
        return f"{capitalize(f'{setting}{weakness}' if first.is_settled else f'open: {setting}')}."
    if answer.name == "present" and first.is_settled:
        present, found = (describe_full_setting(data.find_subject(name)) for name in (first.subject, first.reference))
        return f"{PRESENT[first.verdict]}. Present: {present}. Found: {found}."
    if answer.name == "retained":
        limit = f"more than {data.record.retain_margin:g}"
        worse = join_words([name_value(row.subject, data) for row in answer.rows if row.verdict == "worse"])
        rest = capitalize(why) if answer.state == "open" else "" if worse else f"No {limit}"
        return ". ".join(filter(None, [f"{worse} forgot {limit}" if worse else "", rest])) + "."
    if answer.name == "pair":
        return f"{capitalize(first.verdict if first.is_settled else why)}."
    if answer.name not in CHAINS:
        return f"{capitalize(why)}."
    return f"{capitalize(_describe_chain(answer, why, data))}{_describe_weakness(answer, data)}."


def _describe_weakness(answer: Answer, data: SweepData) -> str:
    """Returns on how little a settled answer rests: few seeds, or few trials. Empty otherwise."""
    row, parts = answer.good or answer.rows[-1], []
    if not row.is_settled:
        return ""
    if answer.name == "setting":
        trials = data.list_trials(row.arm)
        return f", on {len(trials)} trials alone" if len(trials) < ENOUGH_TRIALS else ""
    if row.num_seeds < ENOUGH_SEEDS:
        parts.append(f"{row.num_seeds} seed{'s' if row.num_seeds > 1 else ''}")
    full = data.find_subject(row.reference) if answer.name == "as_good_as_full" else None
    if full and full.row.space and len(full.trials) < ENOUGH_TRIALS and row.verdict != "worse":
        parts.append(f"{len(full.trials)} trials of full fine-tuning")
    return f", on {join_words(parts)} alone" if parts else ""


def _describe_chain(answer: Answer, why: str, data: SweepData) -> str:
    good, below, is_alone = answer.good, answer.below, len(answer.rows) == 1
    first, smaller = (name_value(row.subject, data) if row else "" for row in (good, below))
    is_known, is_smallest = below is None or below.is_settled, answer.name == "smallest"
    if good and not is_known:
        return f"{'at most' if is_smallest else 'yes from'} {first}. {capitalize(smaller)} is {why}"
    if not is_known:
        return why
    if is_smallest and good:
        return f"{first}; {f'{smaller} is not enough' if below else 'the smallest that was tried'}"
    if is_smallest:
        return f"{name_value(answer.largest, data)}, the largest that was tried"
    if good:
        return f"yes from {first}" if below else f"yes{'' if is_alone else ', at each value'}"
    return f"no{'' if is_alone else ', at no value'}"


def name_value(subject: str | None, data: SweepData) -> str:
    """Returns the name of a subject in a sentence about one arm: `rank 16`, or the name between backticks."""
    found = data.find_subject(subject)
    return found.subject.label if found and found.subject.key else f"`{subject}`"


def capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def describe_unit(answer: Answer, data: SweepData) -> str:
    """Returns what the values of an answer's rows are, with the margin, in one phrase for all; empty without rows."""
    if not answer.rows or answer.name == "setting":
        return ""
    names = dict.fromkeys(row.reference for row in answer.rows)
    against = f" against {name_value(next(iter(names)), data)}" if len(names) == 1 else ""
    if all(row.is_share for row in answer.rows):
        is_against_full = answer.name == "as_good_as_full"
        gain = data.evidence.scale.gain_name
        unit = f"share of {gain}" if is_against_full else f"difference{against} as a share of {gain}"
        return f"{unit}, margin {format_share(data.evidence.scale.margin.value)}"
    retained = next((row for row in data.record.retained if row.name == answer.arm), None)
    metric, margin = (data.shown_metric, data.evidence.margin)
    if retained and answer.name == "retained":
        metric, margin = (retained.metric, data.record.retain_margin)
    limit = "" if margin is None else f", margin {format_score(margin)}"
    return f"difference{against} in {format_metric(metric.name)}, {metric.better_scores} is better{limit}"


def list_cells(answer: Answer, data: SweepData) -> list[tuple[str, str, str]]:
    """Returns the row of each value of an answer: its name, its value with the interval, and its verdict.

    All values have the same number of decimals.
    """
    if answer.name == "setting":
        return [("an untried setting", _describe_regret(row, data), row.verdict) for row in answer.rows]
    unit_margin = data.record.retain_margin if answer.name == "retained" else data.evidence.margin or 0.0
    decimals = _count_share_decimals([row.interval for row in answer.rows if row.is_share], data)
    differences = [row.interval for row in answer.rows if not row.is_share]
    digits = count_decimals(differences, critical=(0.0, unit_margin, -unit_margin))
    several = len({row.reference for row in answer.rows}) > 1
    cells: list[tuple[str, str, str]] = []
    for row in answer.rows:
        value, interval = row.value, row.interval
        if row.is_share and row.name != "as_good_as_full" and value is not None:
            # against another reference, the tested quantity is 1 plus the difference as a share of the gain
            value, interval = value - 1, interval and (interval[0] - 1, interval[1] - 1)
        form = format_share_estimate if row.is_share else format_estimate
        text = form(value, interval, decimals=decimals if row.is_share else digits)
        against = f" against {name_value(row.reference, data)}" if several else ""
        waits = row.blocker == "another value"
        verdict = f"{row.verdict}: {BLOCKERS['another value']}" if waits else row.verdict
        cells.append((name_value(row.subject, data).strip("`"), text + against, verdict))
    return cells


def _count_share_decimals(intervals: Sequence[Interval | None], data: SweepData) -> int:
    margin = data.evidence.scale.margin.value if data.evidence.scale.margin.is_share_of_gain else 0.0
    return count_percent_decimals(intervals, critical=(1.0, 1.0 - margin, 1.0 + margin))


def _describe_regret(row: AnswerRow, data: SweepData) -> str:
    if row.value is None:
        return UNKNOWN
    metric = format_metric(data.record.search_metric.name)
    gain = data.evidence.scale.gain_name
    amount = f"{format_share(row.value)} of {gain}" if row.is_share else f"{format_score(row.value)} {metric}"
    return f"expected to be better by {amount} on validation data"


def build_entry(row: AnswerRow) -> dict[str, Any]:
    """Returns a row as files have it. The name of `smallest` ends in the key's last part: `smallest_rank`."""
    return {
        "name": f"{row.name}_{short_key(row.key)}" if row.name == "smallest" and row.key else row.name,
        **{field: getattr(row, field) for field in ("subject", "reference", "verdict", "value", "interval")},
        "open_because": BLOCKERS[row.blocker] if row.blocker else None,
    }


def describe_step(step: NextStep) -> str:
    """Returns what the command of a next step does, or what a new sweep needs, without the command."""
    if step.name == "none":
        needs = join_words([NEEDS[blocker] for blocker in step.needs if blocker in NEEDS], last="or")
        tried = f", not even {step.number} seeds" if step.number else ""
        return f"No command settles this{tried}. A new sweep may, with {needs}."
    time = f"about {format_seconds(step.seconds)}" if step.seconds else ""
    parts = [STEPS[step.name].format(step.number), time]
    return f"Next ({', '.join(filter(None, parts))})" + ("" if step.command else ".")


def describe_setting(one: SubjectResult) -> str:
    """Returns a subject's best settings as text, without the value in its name. Says if they are predicted."""
    if one.best is None:
        return "no complete trial"
    settings = format_settings({key: value for key, value in one.best.params.items() if key != one.subject.key})
    return f"{settings} (predicted)" if one.best.is_predicted else settings


def describe_full_setting(one: SubjectResult | None, *, is_asked: bool = False) -> str:
    """Returns rank, α, learning rate and the other swept settings of a subject, swept or not.

    With `is_asked` it says whether α was not searched, for the answer on α.
    """
    if one is None or one.best is None:
        return "no complete trial"
    named = {"rank": RANK, "α": ALPHA, "learning rate": LR}
    others = {short_key(key): value for key, value in one.best.params.items() if key not in named.values()}
    values = {name: one.best.get_number(key) for name, key in named.items()} | others
    shown = {name: format_setting(value) for name, value in values.items() if value is not None}
    if is_asked and "α" in shown and ALPHA not in one.row.space:
        shown["α"] += " (not searched)"
    settings = ", ".join(f"{name} {value}" for name, value in shown.items())
    return f"{settings} (predicted)" if one.best.is_predicted else settings


def name_settings(one: Recommendation) -> dict[str, str]:
    """Returns the recommended settings by name."""
    setting, method = one.setting, one.subject.row.method
    # without its rule, α could be read as α of another rule
    scaling = [SCALING] if setting.get(SCALING) not in (None, LoraConfig.scaling) else []
    keys = dict.fromkeys([*SETTING_NAMES, *scaling, *setting.params])
    known = {key: setting.get(key) for key in keys if method == "lora" or key not in (RANK, ALPHA)}
    known["method.name"] = METHOD_NAMES.get(method, method)
    return {SETTING_NAMES.get(key, short_key(key)): format_setting(v) for key, v in known.items() if v is not None}


def describe_evidence(one: SubjectResult, data: SweepData) -> str:
    """Returns in a few words how well a subject is known to do, for a comment in a file of another tool."""
    if not data.evidence.means:
        return f"the best of {len(one.trials)} trials on validation data; {MISSING['not confirmed']}"
    names: tuple[QuestionName, ...] = ("as_good_as_full", "smallest", "pair")
    answers = [data.evidence.find_answer(name, one.arm) for name in names]
    found = ((answer, row) for answer in answers for row in answer.rows if row.subject == one.name)
    answer, row = next(found, (None, None))
    if answer is None or row is None:
        return "confirmed on test data, and compared with no other arm"
    name, value, verdict = list_cells(answer, data)[answer.rows.index(row)]
    choice = choose_subject(data, one.arm)
    may_be_smaller = choice is not None and choice.subject is one and row.is_settled and not choice.is_settled
    more = "; not settled: a smaller value may be enough" if may_be_smaller else ""
    return f"{name}: {value}, {describe_unit(answer, data)} ({verdict}{more})"


def describe_runs(data: SweepData) -> str:
    """Returns the steps, epochs and precision of the longest run, which a sweep in little time cuts; empty before."""
    if (run := data.longest_run) is None:
        return ""
    epochs = "" if run.epochs is None else f" ({run.epochs:.2g} epochs of {run.num_train:,} training examples)"
    where = [run.platform[name] for name in ("precision", "device") if run.platform.get(name)]
    return f"Runs of {run.steps_planned:,} steps{epochs}{', in ' if where else ''}{' on '.join(where)}."


def describe_failure(findings: Findings) -> tuple[str | None, str | None]:
    """Returns the headline and the remedy if nothing is shown to be learned."""
    learning, data = findings.learning, findings.data
    if not learning.has_failed:
        return None, None
    if learning.state == "not shown":
        metric = format_metric(data.shown_metric.name)
        headline = "Nothing is shown to be learned: on test data no method is shown to be better than "
        return f"{headline}{learning.baseline}, by {metric}.", "No settings are recommended."
    so_far = "" if data.record.status == "complete" else " so far"
    headline = f"Nothing learned{so_far}: no trial is better than {_describe_baseline(findings)}."
    return headline, " ".join(["No settings are recommended.", *_list_causes(findings)])


def _list_causes(findings: Findings) -> Iterator[str]:
    """Yields what to change if nothing was learned, the most likely first."""
    run = findings.data.longest_run
    train = run.data.get("train", {}) if run else {}
    cut, examples = train.get("truncated") or 0, train.get("examples") or 0
    if run and run.epochs and run.epochs < 1:
        yield f"The runs saw {format_share(run.epochs)} of the training data: train longer."
    if cut > MAX_HARMLESS_CUT * examples:
        yield f"`data.max_length` cut off {cut:,} of {examples:,} training examples: raise it."
    check = "the data" if findings.learning.base else "that the labels belong to the texts"
    yield f"Check {check}, and try other learning rates."


def _describe_baseline(findings: Findings) -> str:
    learning = findings.learning  # the table has the score of the base
    return f"{learning.baseline}{'' if learning.base else f' ({format_score(learning.score)})'}"


def list_warnings(findings: Findings) -> list[str]:
    """Returns reasons to doubt the numbers, such as subjects that learned nothing."""
    learning, baseline = findings.learning, _describe_baseline(findings)
    warnings = [f"`{name}` learned nothing: no trial is better than {baseline}." for name in learning.failed]
    unlearned = [f"`{name}`" for name in learning.unlearned if name not in learning.failed]
    if unlearned and not learning.has_failed:
        warnings.append(f"Not shown to beat {learning.baseline} on test data: {join_words(unlearned)}.")
    if moved := findings.hardly_moved:
        losses = join_words([f"{format_score(loss)} for `{name}`" for name, loss in moved.items()])
        warnings.append(
            f"Hardly trained: the test loss is {losses}, and {format_score(math.log(2))} without training. Higher "
            "learning rates or more steps are needed; until then the accuracy is that of tiny differences."
        )
    if findings.longer_answers:
        split, (accuracy, chosen, rejected) = findings.longer_answers
        warnings.append(
            f"Always choosing the longer answer has preference accuracy {format_score(accuracy)} on {split} data: "
            f"chosen answers have {chosen:.0f} scored tokens on average, rejected ones {rejected:.0f}. A method that "
            "scores no higher may have learned lengths alone."
        )
    warnings += _describe_cut_off(findings) if findings.has_many_cut_off else []
    if grown := findings.data.record.late_growth:
        warnings.append(
            f"The sweep got more {join_words(grown)} after test scores were known. Settings are still chosen on "
            "validation data alone, but if you resumed because of test scores, the chance of a false verdict is higher "
            "than 5 %."
        )
    return [*warnings, *(describe_fault(fault) for fault in findings.faults if fault.key in (LR, ""))]


def describe_fault(fault: Fault) -> str:
    """Returns a sentence on why settings may not be the best."""
    names, values = [f"`{name}`" for name in fault.values], [*fault.values.values()]
    if fault.name == "regret":
        above = join_words([f"{value:.1f} margins for {name}" for name, value in zip(names, values, strict=True)])
        return f"On validation data an untried setting is expected to be better by {above}; luck may decide."
    arms = join_words([f"{name} ({format_setting(value)})" for name, value in zip(names, values, strict=True)])
    end, better = ("lower", "lower") if fault.name == "lower end" else ("upper", "higher")
    return f"The best `{fault.key}` of {arms} lies at the {end} end of its range, so {better} values may be better."


def _describe_cut_off(findings: Findings) -> list[str]:
    cut_off, examples = (sum(findings.count_generated(name)) for name in ("cut_off", "examples"))
    counts = f"{cut_off:,} of {examples:,} generated answers"
    said = f"{counts} were cut off at `data.answers.max_new_tokens`, so their scores may be too low. Raise it."
    return [said] if cut_off else []


def list_notes(findings: Findings) -> Iterator[str]:
    """Yields the sentences that are neither an answer nor a warning, the most important first."""
    data, record, evidence = findings.data, findings.data.record, findings.data.evidence
    yield from [] if findings.has_many_cut_off else _describe_cut_off(findings)
    if evidence.means and data.other_metric:
        verdict, other = format_metric(data.shown_metric.name), format_metric(data.other_metric.name)
        yield f"Verdicts are about {verdict} (`confirm.metric`); {other} on the same test data decides nothing."
        if left_out := max(findings.count_generated("left_out"), default=0):
            too_long = "because prompt and reference are longer than `data.max_length`"
            yield f"{left_out:,} test examples are not answered, {too_long}."
    saved, planned = data.steps_saved, sum(run.steps_planned for run in data.run_records)
    saving = f"; stopping runs saved {format_share(saved / planned)} of the planned steps" if saved > 0 else ""
    counts = {"trial": data.trials, "confirm run": data.confirm_runs}
    runs = [f"{len(rows):,} {name}{'' if len(rows) == 1 else 's'}" for name, rows in counts.items() if rows]
    spent = f"{format_seconds(record.makespan_s)}, {format_count(data.tokens_trained)} tokens trained"
    yield f"{join_words(runs) or 'No run'} in {spent}{saving}. {describe_runs(data)}".rstrip()
    if record.status != "complete":
        yield f"The sweep is {record.status}: {sum(row.trials for row in record.arms)} trials were asked for."
    yield from (describe_fault(fault) for fault in findings.faults if fault.key not in (LR, ""))
    for setting in [recommended.setting for recommended in findings.recommended]:
        alpha, lr = setting.get_number(ALPHA), setting.get_number(LR)
        if alpha and lr and setting.follows_rate_law:
            yield f"At another α: lr = u/√α with u = {lr * math.sqrt(alpha):.3g}."
    if evidence.answers:
        looks, used = join_words([str(look) for look in record.looks]), max(row.num_seeds for row in evidence.answers)
        is_early = bool(record.looks_done) and record.looks_done[-1].is_last and used < max(record.looks)
        ended = "; more had nothing to settle" if is_early else ""
        limit = "is at most 5 % over all questions and looks"
        limit = "was at most 5 % before the sweep grew" if record.late_growth else limit
        yield (
            f"The questions are stated in the sweep and tested at {looks} seed{'' if looks == '1' else 's'} ({used} "
            f"were used{ended}). The chance of any false verdict {limit}. The intervals beside verdicts have "
            f"{100 * evidence.confidence:.3g} % confidence."
        )
        others = {answer.name for answer in findings.answers if answer.rows}
        yield from (OUTSIDE[name] for name in OUTSIDE if name in others)
        yield _describe_margin(data)
    if evidence.means and not evidence.scores.num_examples:
        yield "Single test examples have no scores, so intervals are over seeds alone: other test data may differ more."
    if evidence.means and record.verdict_metric.name != record.search_metric.name:
        yield "The search chose settings by another metric than that of the verdicts, which no interval includes."
    yield from (*evidence.scores.problems, *record.warnings, *record.notes)


def _describe_margin(data: SweepData) -> str:
    """Returns a sentence about the smallest difference that matters, or why none is known."""
    setting, margin = data.record.margin, data.evidence.margin
    whose = "full fine-tuning's" if data.evidence.scale.full else "the best subject's"
    share = f"{setting} of {whose} gain over the frozen base"
    if margin is None:
        return (
            f"No margin: {share} is not known, because that needs test scores of both and a gain. So nothing can be "
            "shown to be equivalent, and no rank enough. Set `confirm.margin` to a number in the metric's unit."
        )
    # the gain is uncertain too, and each test counts the error of both
    meaning = f": {share}, whose error counts in each test" if parse_margin(setting).is_share_of_gain else ""
    metric = format_metric(data.shown_metric.name)
    return f"The margin, the smallest difference that matters, is {format_score(margin)} {metric}{meaning}."


def format_means(means: Mapping[str, tuple[float | None, Interval | None]]) -> dict[str, str]:
    """Returns mean scores with their intervals by name, all with the same number of decimals."""
    decimals = count_decimals(interval for _, interval in means.values())
    return {name: format_estimate(*found, decimals=decimals) for name, found in means.items()}


def list_columns(data: SweepData) -> dict[str, list[str]]:
    """Returns the columns of the table of subjects by title, with one cell for each subject."""
    rows = list_subject_rows(data)
    scores = [row["search_score"] for row in rows]
    decimals = _count_share_decimals([row["share_interval"] for row in rows], data)
    columns, tested = {}, {"test score": "test"}
    if data.other_metric:
        tested[format_metric(data.other_metric.name)] = "other_test"
    for title, kind in tested.items():
        found = {row["name"]: (row[f"{kind}_score"], row[f"{kind}_interval"]) for row in rows}
        if any(score is not None for score, _ in found.values()):
            columns[title] = [*format_means(found).values()]
    shares = [(row["share_of_full_gain"], row["share_interval"]) for row in rows]
    columns["search score"] = [format_score(score, beside=scores) for score in scores]
    if data.best_score("full") is not None:
        columns["of full's gain"] = [format_share_estimate(*share, decimals=decimals) for share in shares]
    return columns | {
        "trained": [format_count(row["trainable_params"]) for row in rows],
        "adapter": [format_bytes(row["adapter_bytes"]) for row in rows],
        "memory": [format_bytes(row["peak_memory_bytes"]) for row in rows],
        "time": [format_seconds(row["wall_s"]) for row in rows],
    }
