"""The record of a sweep, `sweep.json`: its definition, its trials, and the confirm stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from lorasweep.config.data import ScoreMetric
from lorasweep.config.method import FrozenConfig
from lorasweep.config.sweep import MAX_ARMS, MAX_CHOICES, MAX_CONFIRM_SEEDS
from lorasweep.errors import RecordError
from lorasweep.record.json_file import VERSION, Count, Finite, FolderName, Number, read_json
from lorasweep.record.trial import Stage, Subject, Trial
from lorasweep.wording import join_words, shorten

SWEEP_FILE = "sweep.json"
JOURNAL_FILE = "journal.log"
"""The Optuna studies of a sweep."""
MAX_LOOKS = 20
SweepState = Literal["running", "complete", "interrupted"]
NumSeeds = Annotated[int, Field(ge=1, le=MAX_CONFIRM_SEEDS)]
QuestionName = Literal["as_good_as_full", "smallest", "pair"]


@dataclass(kw_only=True)
class Question:
    """A question that the sweep states before it starts. `report.evidence.questions` answers it."""

    name: QuestionName
    arm: str
    key: str | None
    """The `confirm_each` key of the arm, if it has one."""
    subjects: Annotated[list[str], Field(max_length=MAX_CHOICES)]
    """The subjects that are asked about, from the smallest value to the largest."""
    reference: str | None
    """The subject that they are compared with; None for `smallest`, whose references are the larger values."""


@dataclass(kw_only=True)
class SettingRow:
    """The setting that the confirm stage trains for one subject."""

    subject: FolderName
    """The subject's name."""
    arm: FolderName
    setting: Count
    """Number of the setting in its arm's confirm stage."""
    params: dict[str, Any]
    """Swept keys (dotted) and their values."""
    trial: Count | None
    """The complete trial of the search that has this setting; null if it was not tried."""
    score: Finite | None
    """The score on validation data: that of the trial, or the predicted one."""
    regret: Finite | None = None
    """How much better the best setting in the space is expected to be, by the search's model, in the metric's unit."""


@dataclass(kw_only=True)
class LookRow:
    """A look of the confirm stage: the questions were tested with this number of seeds."""

    seeds: NumSeeds
    open: list[str]
    """The subjects of the questions that were still open."""
    is_last: bool
    """Whether the stage ended: all planned looks are done, or further seeds may settle no open question."""


@dataclass(kw_only=True)
class RetainedRow:
    """A data set of `retain.data`, on which the confirm stage shows what was forgotten."""

    name: FolderName
    metric: ScoreMetric


@dataclass(kw_only=True)
class ArmRow:
    """One arm of a sweep."""

    name: FolderName
    method: str
    trials: Count
    """Number of trials that the user asked for."""
    steps: Count = 0
    """Optimizer steps of a complete run, unless `trainer.max_steps` is swept."""
    settings: dict[str, Any]
    """Dotted keys and values that differ from the defaults."""
    space: dict[str, Any]
    """Swept keys: a list of choices or a mapping `low`, `high`, and `log` or `step`."""
    has_fixed_score: bool = False
    """Whether the arm has the same score with every seed, so one confirm run is enough."""
    subjects: Annotated[list[Subject], Field(max_length=MAX_CHOICES)] = field(default_factory=list)
    """The arm itself, or each value of its `confirm_each` key, from the smallest to the largest."""

    def __post_init__(self) -> None:
        self.subjects = self.subjects or [Subject(arm=self.name)]

    @property
    def key(self) -> str | None:
        """The `confirm_each` key, whose values are confirmed one by one."""
        return self.subjects[0].key

    @property
    def is_base(self) -> bool:
        """Whether the arm is the frozen base, which trains nothing."""
        return self.method == FrozenConfig.name


@dataclass(kw_only=True)
class SweepChange:
    """A change of a sweep by `--resume`."""

    at: str
    """UTC, ISO 8601."""
    stage: Stage
    """The last stage that had begun."""
    settings: dict[str, Any]
    """The overrides that were typed."""
    trials: dict[str, Count]
    """New number of trials of each arm that got more trials."""

    @property
    def grows(self) -> list[str]:
        """The parts of the sweep that grew, such as "trials of `lora`" or `seeds`."""
        return [
            *(f"trials of `{name}`" for name in self.trials),
            *(["seeds"] if "confirm.seeds" in self.settings else []),
        ]


@dataclass(kw_only=True)
class SweepRecord:
    """The definition of one sweep and the state of each trial."""

    format: Literal["lorasweep.sweep"] = "lorasweep.sweep"
    version: Literal[1] = VERSION
    status: SweepState
    name: str
    description: str = ""
    search_metric: ScoreMetric
    """The metric on validation data by which the search chooses."""
    constant_answer: dict[str, Number] = field(default_factory=dict)
    """Scores on validation data, by metric, of the answer that needs no training (`DataSplits.score_constant_answer`).

    Empty without such an answer, or if it has other scores in other trials. A trial that is no better at half of its
    steps is stopped."""
    definition: dict[str, Any]
    """Content of the sweep file (`file`) and `overrides`, which `--resume` composes again."""
    changes: list[SweepChange] = field(default_factory=list)
    """The change of each `--resume`, in order."""
    source: str | None = None
    """Path of the sweep file."""
    planned_s: list[Number] = field(default_factory=list)
    """Planned seconds up to each look, if the trainings were measured within a day; else empty."""
    source_sha256: str | None = None
    """SHA-256 of the sweep file when the sweep began."""
    fingerprints: dict[str, dict[str, str]] = field(default_factory=dict)
    """Digests of everything that the runs of each arm read (`sweep.fingerprints`). They stay when the sweep resumes."""
    arms: Annotated[list[ArmRow], Field(min_length=1, max_length=MAX_ARMS)]
    trials: list[Trial] = field(default_factory=list)
    """The trials of the search, by arm and number."""
    questions: Annotated[list[Question], Field(max_length=2 * MAX_ARMS)] = field(default_factory=list)
    """The questions, as they were stated before the first trial."""
    looks: Annotated[list[NumSeeds], Field(max_length=MAX_LOOKS)] = field(default_factory=list)
    """Numbers of seeds at which the questions are tested, as planned beforehand; empty without a confirm stage."""
    confirm_seeds: Annotated[list[Count], Field(max_length=MAX_CONFIRM_SEEDS)] = field(default_factory=list)
    """The seeds of all planned looks."""
    settings: list[SettingRow] = field(default_factory=list)
    """The setting that the confirm stage trains for each subject; empty before the stage."""
    looks_done: Annotated[list[LookRow], Field(max_length=MAX_LOOKS)] = field(default_factory=list)
    confirm: list[Trial] = field(default_factory=list)
    """The runs of the confirm stage, by arm and number. A sweep that grew may also have runs of former settings."""
    margin: float | str
    """`confirm.margin` as it was stated before the first trial."""
    test_metrics: list[ScoreMetric] = field(default_factory=list)
    """The metrics on test data of a sweep that generates answers; the first is that of the verdicts. Empty in all other
    sweeps, whose only metric is `search_metric`."""
    retained: list[RetainedRow] = field(default_factory=list)
    """The data sets of `retain.data`."""
    retain_margin: Finite = 0.01
    """`retain.margin` as it was stated before the first trial."""
    notes: list[str] = field(default_factory=list)
    """Sentences on the data (splits, duplicates, the majority class and its score) and on packs."""
    warnings: list[str] = field(default_factory=list)
    """Sentences on settings and results that may mislead a reader."""
    started_at: str = ""
    ended_at: str | None = None
    makespan_s: Number = 0.0
    """Seconds from start to end, summed over the sessions of a resumed sweep."""
    device: str = ""
    """Device of the last trials: `cpu`, `cuda:0`, ..."""
    threads: Count = 0
    """Number of CPU threads of one operation."""
    workers: Count = 0
    """Number of workers for which packs are planned."""

    def find_state(self, *, is_running: bool) -> SweepState:
        """Returns the sweep's state. The record of a killed sweep still has the status `running`."""
        return self.status if self.status == "complete" else "running" if is_running else "interrupted"

    @property
    def verdict_metric(self) -> ScoreMetric:
        """The metric on test data that the verdicts are about."""
        return self.test_metrics[0] if self.test_metrics else self.search_metric

    @property
    def confirm_runs(self) -> list[Trial]:
        """The runs of the settings that are confirmed now. `confirm` may also have runs of former settings."""
        current = {(row.subject, row.setting) for row in self.settings}
        return [run for run in self.confirm if (run.subject, run.setting_number) in current]

    @property
    def late_growth(self) -> list[str]:
        """The parts of the sweep that grew when test scores were known, such as `seeds`, each once."""
        late = [grown for change in self.changes if change.stage == "confirm" for grown in change.grows]
        return list(dict.fromkeys(late))

    def find_run_score(self, run: Trial) -> float | None:
        """Returns the score by which a run is judged: in the search on validation data, then on test data."""
        return run.search_score if run.stage == "search" else run.test_scores.get(self.verdict_metric.name)


def read_sweep(folder: Path) -> SweepRecord:
    """Reads a sweep's record. Raises RecordError if it is missing, damaged or contradicts itself."""
    record = read_json(SweepRecord, folder / SWEEP_FILE)
    arms = [row.name for row in record.arms]
    subjects = [subject.name for row in record.arms for subject in row.subjects]
    runs = [(run.arm, run.subject or run.arm) for run in (*record.trials, *record.confirm)]
    named = {*runs, *((row.arm, row.subject) for row in record.settings)}
    unknown = {arm for arm, _ in named}.difference(arms) or {name for _, name in named}.difference(subjects, arms)
    problem = None
    if len(set(arms)) < len(arms) or len(set(subjects)) < len(subjects):
        problem = "two of `arms` or of their `subjects` have the same name"
    elif unknown:
        problem = f"{shorten(unknown.pop())} is not one of `arms` or of their `subjects`"
    elif record.looks != sorted(set(record.looks)):
        problem = "`looks` must be ascending numbers of seeds"
    elif any(question.reference is None and question.name != "smallest" for question in record.questions):
        problem = "each of `questions` but `smallest` must have a `reference`"
    if problem is not None:
        raise RecordError(f"{str(folder / SWEEP_FILE)!r} must be a whole record, but {problem}. Restore the file.")
    return record


def get_run_folder(sweep: Path, run: str) -> Path:
    """Returns the folder of a run in a sweep. Raises RecordError if the path in the record leads out of the sweep."""
    try:
        is_inside = (sweep / run).resolve().is_relative_to(sweep.resolve())
    except ValueError:  # no file system has such a name
        is_inside = False
    if not is_inside:
        raise RecordError(f"a trial's run must be inside the sweep's folder, but {run!r} is not. Restore sweep.json.")
    return sweep / run


def find_winner(trials: Iterable[Trial], *, record: SweepRecord) -> Trial | None:
    """Returns the best complete trial of an arm's search, the first of equal ones; None if no trial is complete."""
    return min(
        (trial for trial in trials if trial.is_complete),
        key=lambda trial: (record.search_metric.sign * (trial.search_score or 0.0), trial.number),
        default=None,
    )


def count_seeds_due(looks: Sequence[int], looks_done: Sequence[LookRow]) -> int:
    """Returns the number of seeds up to which all subjects train now: that of the next look, or of the last one."""
    if looks_done and looks_done[-1].is_last:
        return looks_done[-1].seeds
    return looks[len(looks_done)] if looks else 0


def list_confirm_runs(subjects: Sequence[str], *, seeds: int, is_fixed: bool) -> list[tuple[str, int]]:
    """Returns the confirm runs of an arm up to a number of seeds, each by its subject and the index of its seed.

    An arm whose score does not depend on the seed (`is_fixed`) trains once.
    """
    runs = [(subject, index) for index in range(seeds) for subject in subjects]
    return runs[:1] if is_fixed else runs


def describe_confirmation(looks: Sequence[int]) -> str:
    """Returns a phrase that says what the confirm stage does, from the numbers of seeds at its looks."""
    seeds = join_words([str(look) for look in looks], last="or")
    until = ", until the questions are settled" if len(looks) > 1 else ""
    noun = "seed" if tuple(looks) == (1,) else "seeds"
    return f"the chosen settings again on {seeds} fresh {noun}, scored once on test data{until}"
