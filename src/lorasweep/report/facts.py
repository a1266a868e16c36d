"""What a sweep found, as values: answers, judgements and the recommended settings. `report.text` writes them.

`read_findings` reads a sweep's folder once. Terminal, page, Markdown, JSON and the Python API show the same findings.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorasweep.config.run import RANK
from lorasweep.record import COST_FIELDS, STATES, QuestionName, SweepRecord, is_number
from lorasweep.report.caveats import Fault, Learning, judge_learning, list_faults
from lorasweep.report.evidence.evidence import compare_settings
from lorasweep.report.evidence.verdicts import Answer, AnswerRow, Missing
from lorasweep.report.next_step import find_next_step
from lorasweep.report.recommend import Recommendation, choose_arm, pair_fixed_settings, recommend
from lorasweep.report.sweep_data import SubjectResult, SweepData, load_sweep_data

DPO_METRIC = "chosen_shift"
"""A metric that compares a model with its base, which DPO alone does."""
MIN_MOVED_SHARE = 0.95
"""A loss of DPO above this share of ln 2 is that of a model that hardly changed."""
MAX_CUT_OFF_SHARE = 0.1
"""Above this share of generated answers that were cut off, their scores are doubted beside the answers."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a sweep found: its records with the evidence on its questions, and the judgements on them."""

    data: SweepData
    answers: tuple[Answer, ...]
    """The three questions first, which every output begins with."""
    learning: Learning
    """Whether the trials are better than an answer that needs no training."""
    faults: tuple[Fault, ...]
    """Why settings may not be the best; none if nothing was learned."""
    recommended: tuple[Recommendation, ...]
    """The settings to use; a second entry has those for LoRA if another method is recommended. Empty if nothing was
    learned."""

    def count_generated(self, name: str) -> list[int]:
        """Returns a number of each confirm run with generated answers: `examples`, `cut_off` or `left_out`."""
        found = [run.record.answers.get("test", {}) for run in self.data.confirm_runs if run.record]
        return [one[name] for one in found if is_number(one.get(name))]

    @property
    def has_many_cut_off(self) -> bool:
        return sum(self.count_generated("cut_off")) > MAX_CUT_OFF_SHARE * sum(self.count_generated("examples"))

    @property
    def hardly_moved(self) -> dict[str, float]:
        """The test loss of each subject that DPO trained and that hardly left the base, whose loss is ln 2.

        The accuracy of pairs counts the sign of a difference, however small.
        """
        losses = {
            one.name: statistics.fmean(run.test_scores["loss"] for run in runs)
            for one in self.data.subjects
            if not one.row.is_base and (runs := [run for run in one.confirm_runs if DPO_METRIC in run.test_scores])
        }
        return {name: loss for name, loss in losses.items() if loss > MIN_MOVED_SHARE * math.log(2)}

    @property
    def longer_answers(self) -> tuple[str, list[float]] | None:
        """A split, with the accuracy of always choosing the longer answer, and the tokens of chosen and rejected ones.

        None for data without preferred answers.
        """
        records = {"test": [run.record for run in self.data.confirm_runs], "validation": self.data.run_records}
        for split, found in records.items():
            for facts in (record.data.get(split, {}) for record in found if record):
                values = [facts.get(key) for key in ("longer_accuracy", "chosen_tokens", "rejected_tokens")]
                if len(known := [value for value in values if is_number(value)]) == len(values):
                    return split, known
        return None


def read_findings(folder: Path, record: SweepRecord | None = None) -> Findings:
    """Reads a sweep's folder, or only its runs if its record is given, and returns the findings.

    Raises:
        RecordError: The folder is not a sweep, or its record is damaged.
    """
    data = load_sweep_data(folder, record)
    learning = judge_learning(data)
    answers: list[Answer] = []
    for answer in _list_answers(data, learning):
        if learning.has_failed and answer.rows and answer.name != "retained":
            answer = replace(answer, missing="not learned")  # equal failures are equivalent, and that is no answer
        step = find_next_step(answer, data, learning)
        is_known = any(other.next == step for other in answers)  # a step is said once
        answers.append(replace(answer, next=None if is_known else step, needs=step.needs if step else ()))
    return Findings(
        data=data,
        answers=tuple(answers),
        learning=learning,
        faults=() if learning.state == "nothing" else tuple(list_faults(data)),
        recommended=tuple(recommend(data, learning)),
    )


def _list_answers(data: SweepData, learning: Learning) -> Iterator[Answer]:
    record, evidence = data.record, data.evidence
    lora = [row for row in record.arms if row.method == "lora" and row.name not in data.fixed_arms]
    no_full: Missing | None = None if any(row.method == "full" for row in record.arms) else "no full arm"
    ranked = [row.name for row in lora if row.key == RANK]
    first = [
        *_answer_arms("as_good_as_full", [row.name for row in lora], data, no_full if lora else "no LoRA arm"),
        *_answer_arms("smallest", ranked, data, None if ranked else "no rank"),
    ]
    yield from first
    yield _answer_setting(data, learning)
    shown = {(row.name, row.arm) for answer in first for row in answer.rows}
    for question in record.questions if evidence.means else ():
        is_other = (question.name, question.arm) not in shown and question.arm not in data.fixed_arms
        if is_other and (answer := evidence.find_answer(question.name, question.arm)).rows:
            yield answer
    for fixed, searched in pair_fixed_settings(data) if not learning.has_failed else ():
        yield _answer_present(fixed, searched, data)
    for retained in record.retained:
        rows = data.retained.get(retained.name, ())
        missing: Missing | None = None if rows else "no score" if evidence.means else "not confirmed"
        yield Answer(name="retained", arm=retained.name, rows=rows, missing=missing)


def _answer_arms(name: QuestionName, arms: list[str], data: SweepData, missing: Missing | None) -> list[Answer]:
    """Returns the answer to a question on each arm that the sweep asks about, or one that says why there is none."""
    if missing is None and not data.evidence.means:
        missing = "not confirmed"
    asked = [answer for arm in arms if (answer := data.evidence.find_answer(name, arm)).rows]
    if missing or not asked:
        return [Answer(name=name, missing=missing or "not stated")]
    return asked


def _answer_setting(data: SweepData, learning: Learning) -> Answer:
    """Returns whether an untried setting of the best LoRA subject may be better by more than the margin."""
    choice = choose_arm(data, ["lora"])
    is_unlearned = learning.has_failed or (choice is not None and choice.subject.name in learning.unlearned)
    if is_unlearned or choice is None or choice.setting.row is None:
        missing: Missing = "no trial" if choice is None else "not confirmed"
        if is_unlearned:
            missing = "not learned"
        return Answer(name="setting", arm=choice.subject.name if choice else "", missing=missing)
    regret, margin = choice.setting.regret, data.search_margin  # both in the unit of the search's metric
    gain = data.gain if data.record.verdict_metric == data.record.search_metric else data.search_gain
    is_small = regret is not None and margin is not None and regret <= margin
    row = AnswerRow(
        name="setting",
        arm=choice.subject.arm,
        subject=choice.subject.name,
        reference=None,
        verdict="settled" if is_small else "open",
        value=regret / gain if regret is not None and gain else regret,
        is_share=gain is not None,
        blocker=None if is_small else "few trials",
    )
    return Answer(name="setting", arm=choice.subject.name, rows=(row,))


def _answer_present(fixed: Recommendation, searched: Recommendation, data: SweepData) -> Answer:
    """Returns the difference of fixed settings from those that the sweep found, and the answers that it states."""
    evidence, name = data.evidence, fixed.subject.name
    rows = compare_settings(
        "present",
        [(name, searched.subject.name)],
        evidence.scores,
        metric=data.shown_metric,
        margin=evidence.margin,
        level=evidence.level,
    )
    stated = [row for row in evidence.answers if row.arm == fixed.subject.arm]
    found = (*rows, *stated)
    return Answer(name="present", arm=name, rows=found, missing=None if found else "not confirmed")


def list_subject_rows(data: SweepData) -> list[dict[str, Any]]:
    """Returns the table of subjects, a row for each: scores with their intervals, share of full's gain, and costs."""
    return [_build_subject_row(one, data) for one in data.subjects]


def _build_subject_row(one: SubjectResult, data: SweepData) -> dict[str, Any]:
    best, mean, other = one.best, data.evidence.mean(one.name), data.other_means.get(one.name)
    share, share_interval = data.find_share(one)
    return {
        "name": one.name,
        "arm": one.arm,
        "method": one.row.method,
        "params": best.params if best else None,
        "is_predicted": best.is_predicted if best else None,
        "run": best.run.run if best and best.run else None,
        "test_score": mean.value if mean else None,
        "test_interval": mean.find_interval() if mean else None,
        "test_std": mean.std if mean else None,
        "seeds": len(mean.seeds) if mean else 0,
        "other_test_score": other.value if other else None,
        "other_test_interval": other.find_interval() if other else None,
        "search_score": one.search_score,
        "share_of_full_gain": share,
        "share_interval": share_interval,
        "trials": {state: one.count(state) for state in STATES},
        **{name: one.cost(name) for name in COST_FIELDS},
        "arm_wall_s": sum(trial.record.wall_s for trial in one.trials if trial.record),
    }
