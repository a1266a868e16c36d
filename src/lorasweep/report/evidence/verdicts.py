"""What the tests of a sweep's questions show, as values: an answer on each subject, and the outcome of each chain.

`report.answers` puts them into words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorasweep.record import Question, QuestionName
from lorasweep.report.evidence.estimates import Interval

Verdict = Literal["better", "equivalent", "not worse", "worse", "sufficient", "insufficient", "open"]
"""The words of every output: terminal, page, CSV, JSON and TensorBoard. `not worse`: not by more than the margin."""
POSITIVE_VERDICTS: tuple[Verdict, ...] = ("better", "equivalent", "not worse", "sufficient")
NEGATIVE_VERDICTS: tuple[Verdict, ...] = ("worse", "insufficient")
AnswerName = QuestionName | Literal["retained"]
"""`retained`: what was forgotten of a data set; no question of the sweep asks it."""
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
"""Why an answer is open. `another value`: its own test would settle it, but another value is tested first.
`few ...`: the part of the evidence with the largest error."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer on one subject of a question."""

    name: AnswerName
    arm: str
    key: str | None
    """The `confirm_each` key of the arm, if it has one."""
    subject: str
    reference: str
    """For `smallest`: the larger value that refutes the subject, or else the value that is nearest to doing so."""
    compared_with: tuple[str, ...]
    """All subjects that it is compared with."""
    verdict: Verdict
    value: float | None
    """The tested quantity. If the margin is a share of full fine-tuning's gain: 1 + advantage over reference / gain.
    With `full` as the reference, this is the subject's share of the gain. Else `subject - reference` in the metric's
    unit."""
    interval: Interval | None
    """The interval that the tests of this look use. A verdict never contradicts it."""
    is_share: bool
    num_seeds: int
    has_groups: bool
    """Whether several test examples form a group, such as a document."""
    blocker: Blocker | None = None
    """None if it is settled."""
    may_settle: bool = False
    """Whether it is open and the seeds of later looks may settle it."""
    awaits: tuple[str, ...] = ()
    """The other subjects whose further seeds may settle it: references, and those of the gain."""

    @property
    def is_settled(self) -> bool:
        return self.verdict != "open"

    def answers(self, question: Question) -> bool:
        """Returns whether this is the answer on a subject of a question."""
        is_reference = question.reference in (None, self.reference)
        return (self.name, self.arm) == (question.name, question.arm) and is_reference


@dataclass(frozen=True, kw_only=True)
class ChainOutcome:
    """The answers on all values of one arm: where values begin to be good enough, and whether that is settled.

    Good enough is a value that is as good as full fine-tuning, or that is sufficient. The order of the tests puts all
    good values above all others.
    """

    arm: str
    answers: tuple[Answer, ...]
    """The smallest value first; empty if the sweep does not ask."""

    @property
    def good(self) -> Answer | None:
        """The answer on the smallest value that is good enough."""
        return next((answer for answer in self.answers if answer.verdict in POSITIVE_VERDICTS), None)

    @property
    def below(self) -> Answer | None:
        """The answer on the next smaller value, or on the largest if none is good enough."""
        return next((answer for answer in self.answers[::-1] if answer.verdict not in POSITIVE_VERDICTS), None)

    @property
    def bad(self) -> list[Answer]:
        """The answers on the values that are shown not to be good enough."""
        return [answer for answer in self.answers if answer.verdict in NEGATIVE_VERDICTS]

    @property
    def largest(self) -> str:
        """The subject with the largest value, about which `smallest` does not ask."""
        last = self.answers[-1]
        return last.compared_with[-1] if last.name == "smallest" else last.subject

    @property
    def state(self) -> AnswerState:
        if not self.answers:
            return "not asked"
        return "settled" if self.below is None or self.below.is_settled else "open"

    @property
    def blocking(self) -> Answer | None:
        """The answer that must be settled first: that on the largest value whose own test is open; None if settled."""
        own = (answer for answer in self.answers[::-1] if answer.blocker not in (None, "another value"))
        return next(own, self.below) if self.state == "open" else None
