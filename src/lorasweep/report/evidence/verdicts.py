"""What the tests of a sweep's questions show, as values: an answer on each question, with a row for each subject.

`report.text` puts them into words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorasweep.record import QuestionName
from lorasweep.report.evidence.estimates import Interval

Verdict = Literal["better", "equivalent", "not worse", "worse", "sufficient", "insufficient", "settled", "open"]
"""The words of every output: terminal, page, CSV, JSON and TensorBoard. `not worse`: not by more than the margin."""
POSITIVE_VERDICTS: tuple[Verdict, ...] = ("better", "equivalent", "not worse", "sufficient", "settled")
NEGATIVE_VERDICTS: tuple[Verdict, ...] = ("worse", "insufficient")
AnswerName = QuestionName | Literal["setting", "present", "retained"]
"""`setting`: α and learning rate. `present`: fixed settings beside those that the sweep found. `retained`: what was
forgotten of a data set. The sweep does not state these three, and they have no part in the chance of 5 %."""
CHAINS: tuple[AnswerName, ...] = ("as_good_as_full", "smallest")
"""Questions on values of one arm, where the answer on one value follows from those on others."""
AnswerState = Literal["settled", "open", "not asked"]
Blocker = Literal[
    "another value",
    "no scores",
    "no margin",
    "no gain",
    "one seed",
    "few seeds",
    "few examples",
    "few trials",
]
"""Why a row is open. `another value`: its own test would settle it, but another value is tested first.
`few ...`: the part of the evidence with the largest error."""
Missing = Literal[
    "no LoRA arm", "no full arm", "no rank", "not stated", "not confirmed", "no trial", "not learned", "no score"
]
"""Why an answer has no rows. It is open for the last four, and not asked for the others."""
OPEN_REASONS: tuple[Missing, ...] = ("not confirmed", "no trial", "not learned", "no score")
StepName = Literal["wait", "complete", "confirm", "longer", "arm", "seeds", "trials", "none"]


@dataclass(frozen=True, kw_only=True)
class NextStep:
    """The one command that may settle an answer, or what a new sweep needs."""

    name: StepName
    command: str | None = None
    number: int | None = None
    """The steps of a run, or the seeds or trials in all, after the command. Without one: seeds that settle nothing."""
    seconds: float | None = None
    """The time that it takes, at the pace of the sweep; None if it is not known."""
    needs: tuple[Blocker, ...] = ()
    """Why the answer is open, if there is no command: a new sweep must change one of these."""


@dataclass(frozen=True, kw_only=True)
class AnswerRow:
    """The answer on one subject of a question."""

    name: AnswerName
    arm: str
    key: str | None = None
    """The `confirm_each` key of the arm, if it has one."""
    subject: str
    reference: str | None
    """For `smallest`: the larger value that refutes the subject, or else the value that is nearest to doing so."""
    compared_with: tuple[str, ...] = ()
    """All subjects that it is compared with."""
    verdict: Verdict
    value: float | None
    """The tested quantity. If `is_share`: 1 + (advantage over reference) / (the gain over the base). With
    `full` as the reference, this is the subject's share of the gain. Else `subject - reference`, in the metric."""
    interval: Interval | None = None
    """The interval that the tests of this look use. A verdict never contradicts it."""
    is_share: bool = False
    num_seeds: int = 0
    blocker: Blocker | None = None
    """None if it is settled."""
    may_settle: bool = False
    """Whether it is open and the seeds of later looks may settle it."""

    @property
    def is_settled(self) -> bool:
        return self.verdict != "open"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The rows of one question on all values of an arm, which show where values begin to be good enough.

    Good enough is a value that is as good as full fine-tuning, or that is sufficient. The order of the tests puts all
    good values above all others.
    """

    name: AnswerName
    arm: str = ""
    """The arm that is asked about; for `retained` the data set."""
    rows: tuple[AnswerRow, ...] = ()
    """The smallest value first."""
    missing: Missing | None = None
    """Why there are no rows."""
    next: NextStep | None = None
    """What to do if it is open; None if an earlier answer has the same step, or if no step probably helps."""
    needs: tuple[Blocker, ...] = ()
    """What a new sweep needs, also if an earlier answer has the same step."""

    @property
    def good(self) -> AnswerRow | None:
        """The row of the smallest value that is good enough."""
        return next((row for row in self.rows if row.verdict in POSITIVE_VERDICTS), None)

    @property
    def below(self) -> AnswerRow | None:
        """The row of the next smaller value, or of the largest if none is good enough."""
        return next((row for row in self.rows[::-1] if row.verdict not in POSITIVE_VERDICTS), None)

    @property
    def largest(self) -> str:
        """The subject with the largest value, about which `smallest` does not ask."""
        last = self.rows[-1]
        return last.compared_with[-1] if last.name == "smallest" else last.subject

    @property
    def state(self) -> AnswerState:
        if not self.rows:
            return "open" if self.missing in OPEN_REASONS else "not asked"
        is_chain = self.name in CHAINS
        is_settled = not self.below or self.below.is_settled if is_chain else all(row.is_settled for row in self.rows)
        return "settled" if is_settled else "open"

    @property
    def blocking(self) -> AnswerRow | None:
        """The row of the largest value whose own test is open, which must be settled first; None if all are."""
        own = (row for row in self.rows[::-1] if row.blocker not in (None, "another value"))
        return next(own, self.below) if self.state == "open" else None
