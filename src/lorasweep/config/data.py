"""Settings of data: sources, columns, maximum lengths and metrics.

Each file in `conf/data/` sets the fields of a class of `lorasweep.tasks.DATA`. The classes here are bases of these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from lorasweep.config.build import AtLeastTwo, ChosenByName, Positive, Settings
from lorasweep.config.components import Component
from lorasweep.errors import ConfigError

ModelKind = Literal["causal_lm", "classifier", "embedder"]
Direction = Literal["minimize", "maximize"]
"""Whether a lower or a higher score is better."""
AnswerMetric = Literal["exact_match", "last_number"]
"""Scores of a generated answer: 1 if its whole text, or the last number in it, is right, else 0."""
LabelKind = Literal["single_label", "regression"]
"""Whether a label is one of several classes, or a number."""
Delimiter = Literal["auto", "comma", "semicolon", "tab", "pipe"]

DEFAULT_SPLIT_PERCENT = 10
"""Percentage of the training data that a split gets if neither its source nor its share is set."""
FEW_ROWS, FEW_ROWS_TEST_PERCENT = 5000, 20
"""Below this number of rows the test split gets this percentage, because a tenth leaves most verdicts open."""
SCORE_ROUNDING = 1e-6
"""Relative difference up to which two scores are equal.

Both are computed in fp32 (eps = 1.2e-7), perhaps on different devices, which may add in different orders."""
METRIC_RANGES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("accuracy", "f1", "preference_accuracy", *get_args(AnswerMetric)), (0.0, 1.0)),
    **dict.fromkeys(("ndcg_at_10", "mrr_at_10", "accuracy_at_1"), (0.0, 1.0)),
    **dict.fromkeys(("matthews", "pearson", "spearman"), (-1.0, 1.0)),
    **dict.fromkeys(("bits_per_byte", "loss", "mse"), (0.0, math.inf)),
    "perplexity": (1.0, math.inf),
}
"""Lowest and highest possible value of each metric; a user's own has no limits."""


@dataclass(frozen=True, kw_only=True)
class MetricComponent(Component):
    """A torchmetrics metric by `_target_`. All keys beside `direction` are arguments of the class."""

    direction: Literal["auto", Direction] = "auto"
    """Whether a lower or a higher value is better. `auto` reads `higher_is_better` of the class."""


@dataclass(frozen=True, kw_only=True)
class ScoreMetric:
    """The metric that scores runs."""

    name: str
    direction: Direction

    @property
    def sign(self) -> Literal[1, -1]:
        """1 if lower scores are better, else -1, so that a lower `sign * score` is always better."""
        return 1 if self.direction == "minimize" else -1

    @property
    def better_scores(self) -> str:
        return "lower" if self.direction == "minimize" else "higher"

    def is_better(self, score: float, other: float) -> bool:
        """Returns whether a score is better than another by more than rounding."""
        return self.sign * (other - score) > SCORE_ROUNDING * abs(other)

    def best(self, scores: Iterable[float]) -> float | None:
        """Returns the best score; None if there are none."""
        return min(scores, key=lambda score: self.sign * score, default=None)


@dataclass(frozen=True, kw_only=True)
class AnswerScore(Component):
    """A function by `_target_` that scores a generated answer.

    It gets the answer, the reference, and the example: the row of the table by column. It returns a number. All keys
    beside `direction` are further arguments.
    """

    direction: Direction = "maximize"


@dataclass(frozen=True, kw_only=True)
class AnswersConfig(Settings):
    """Generated answers, whose score is measured on test data beside that of the loss."""

    score: AnswerMetric | AnswerScore | None = None
    """Score of the answers that a model generates to prompts of the test data; null generates nothing."""
    max_new_tokens: Positive = 64
    """Maximum number of tokens of an answer; longer ones are cut off and counted."""
    on_validation: bool = False
    """Whether the best weights of each run also answer examples of validation."""
    max_examples: Positive | None = 200
    """Maximum number of examples of a split that are answered, evenly spaced over the groups; null answers all."""

    @property
    def metric(self) -> ScoreMetric:
        """The mean of `score`, which must not be null."""
        if isinstance(self.score, AnswerScore):
            return ScoreMetric(name=self.score.name, direction=self.score.direction)
        return ScoreMetric(name=str(self.score), direction="maximize")


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """Settings of data."""

    task_path: ClassVar[str | None] = None
    """Import path of the `lorasweep.tasks.task.Task` that reads the data; None for data of the user's own module."""
    model_kind: ClassVar[ModelKind] = "causal_lm"
    """The kind of model that learns from the examples."""
    limit_keys: ClassVar[tuple[str, ...]] = ()
    """Settings that limit the number of scored examples: of validation, then of test."""
    cuts_examples: ClassVar[bool] = False
    """Whether the examples have lengths of their own, which `data.max_length` cuts."""
    needs_whole_batch: ClassVar[bool] = False
    """Whether the loss of an example depends on the others of its batch, so that nothing may cut a batch."""
    is_built_in: ClassVar[bool] = False
    """Whether every installation has the data, so that a run needs no whole epoch of them."""

    name: str
    metric: str | MetricComponent

    @property
    def max_tokens(self) -> int | None:
        """Maximum number of tokens of a row; None if it is not known before the data is read."""
        return None

    @property
    def generated(self) -> AnswersConfig | None:
        """Settings of the answers that a model must generate; None if it must generate none."""
        return None

    @property
    def groups_by_length(self) -> bool:
        """Whether a training batch has rows of similar lengths."""
        return False

    @property
    def template_file(self) -> str | None:
        """The user's own chat template; None if there is none."""
        return None


@dataclass(frozen=True, kw_only=True)
class SplitSettings(DataSettings):
    """Sources of the training, validation and test splits: files, or a data set of the hub."""

    path: str | None
    """Id of a data set on the hub, such as `owner/name`, or a folder that `datasets` loads; null reads files."""
    subset: str | None
    """Configuration of the data set; null if it has only one."""
    revision: str | None
    """Commit, branch or tag on the hub."""
    train: str
    """Name of a split of `path`. Without `path`: a file, a folder of texts, or a glob such as `shards/*.parquet`."""
    validation: str | None
    """As `train`; null takes the split from `train`."""
    test: str | None
    """As `train`; null takes the split from `train`."""
    test_fraction: Annotated[float, Field(ge=0.01, le=0.5)] | None
    """Share of `train` that becomes the test split if `test` is null, rounded to whole percents. Null is a tenth, and
    a fifth below 5,000 rows."""
    group: str | None
    """Column with equal values for examples that depend on each other. The report treats groups as independent."""

    @property
    def sources(self) -> dict[str, str]:
        """The source of each split that is set: files, or the name of a split of `path`."""
        names = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: name for split, name in names.items() if name is not None}

    def choose_split_percents(self, num_rows: int | None = None) -> dict[str, int]:
        """Returns the percentage of `train` that is split off for each split that is not set.

        `num_rows` is the number of rows of `train`; None for texts, which are cut into blocks.
        """
        percents = {"validation": DEFAULT_SPLIT_PERCENT, "test": DEFAULT_SPLIT_PERCENT}
        if self.test_fraction is not None:
            percents["test"] = round(100 * self.test_fraction)
        elif num_rows is not None and num_rows < FEW_ROWS:
            percents["test"] = FEW_ROWS_TEST_PERCENT
        return {split: percent for split, percent in percents.items() if split not in self.sources}

    def __post_init__(self) -> None:
        for key, name in {**self.sources, "path": self.path}.items():
            if name is not None and not name.strip():
                raise ConfigError(f"`data.{key}` must name a file or data set, but is empty.")
        if len(set(self.sources.values())) < len(self.sources):
            raise ConfigError(
                "`data.train`, `data.validation` and `data.test` must be different, but got "
                f"{self.train!r}, {self.validation!r} and {self.test!r}. Use null to take a split from `data.train`."
            )
        if self.test is not None and self.test_fraction is not None:
            raise ConfigError(
                f"`data.test_fraction` must be null with `data.test`, but got {self.test_fraction:g}. It is the share "
                "of `data.train` that becomes the test split."
            )
        for key, value in {"subset": self.subset, "revision": self.revision}.items():
            if self.path is None and value is not None:
                raise ConfigError(f"`data.{key}` must be null without `data.path`, but got {value!r}. Set `data.path`.")


@dataclass(frozen=True, kw_only=True)
class RowSettings(SplitSettings):
    """Settings of data whose examples are rows of a table: how files are cut into fields, and maximum sizes."""

    limit_keys = ("max_validation_examples", "max_test_examples")
    cuts_examples = True
    found_columns: ClassVar[tuple[str, ...]] = ()
    """Settings of columns that a sweep finds in the data if its file and the command line do not name them."""

    columns: tuple[str, ...] | None
    """Names of all columns of csv, tsv and txt files without a header; null takes the names from the first line."""
    delimiter: Delimiter
    """Character between two fields. `auto`: a tab in tsv and txt files; in csv files a comma, or a semicolon if the
    first line has some and no comma. Fields may stand in quotes, except between tabs."""
    max_length: AtLeastTwo
    """Maximum number of tokens per example, >= 2. Longer examples are cut off."""
    max_train_examples: Positive | None
    """Maximum number of training examples, evenly spaced; null uses all."""
    max_validation_examples: Positive | None
    """As `max_train_examples`."""
    max_test_examples: Positive | None
    """As `max_train_examples`."""
    group_by_length: bool
    """Whether a training batch has rows of similar lengths, which saves padding. False: random batches."""

    @property
    def max_tokens(self) -> int:
        return self.max_length

    @property
    def groups_by_length(self) -> bool:
        return self.group_by_length

    @property
    def max_examples(self) -> dict[str, int | None]:
        return {
            "train": self.max_train_examples,
            "validation": self.max_validation_examples,
            "test": self.max_test_examples,
        }


@dataclass(frozen=True, kw_only=True)
class ModuleDataConfig(DataSettings):
    """The data of `datamodule._target_`, for the user's own LightningModule."""

    name: Literal["module"]
    metric: Literal["auto"]
    """Not used: `metric.name` is the run's score."""


DataConfig = Annotated[DataSettings, ChosenByName("lorasweep.tasks.DATA")]
"""The settings of a kind of example (`lorasweep.tasks`), or of the user's own module."""
