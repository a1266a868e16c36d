"""Settings of data: sources, columns, maximum lengths and metrics.

Each file in `conf/data/` sets the fields of a class `...Config`. The classes `...Settings` are bases of these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import field
from datetime import date
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from lorasweep.config.build import AtLeastTwo, Positive, Settings
from lorasweep.config.components import Component
from lorasweep.errors import ConfigError

Direction = Literal["minimize", "maximize"]
"""Whether a lower or a higher score is better."""
TextMetric = Literal["bits_per_byte", "loss", "perplexity"]
"""Scores of predicted text, per token or byte; lower is better for each."""
LabelMetric = Literal["auto", "accuracy", "f1", "matthews", "pearson", "spearman", "mse", "loss"]
"""Scores of predicted labels. `auto`: accuracy of classes, Pearson's correlation of numbers."""
PreferenceMetric = Literal["auto", "preference_accuracy", "reward_margin", "loss"]
"""Scores of pairs of answers. `auto`: the accuracy, which is 0.5 for the base."""
AnswerMetric = Literal["exact_match", "last_number"]
"""Scores of a generated answer: 1 if its whole text, or the last number in it, is right, else 0."""
LabelTask = Literal["single_label", "regression"]
Delimiter = Literal["auto", "comma", "semicolon", "tab", "pipe"]
Quoting = Literal["auto", "csv", "none"]

DEFAULT_SPLIT_PERCENT = 10
"""Percentage of the training data that a split gets if neither its source nor its share is set."""
METRIC_RANGES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("accuracy", "f1", "preference_accuracy", *get_args(AnswerMetric)), (0.0, 1.0)),
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
    """Maximum number of examples of a split that are answered, spread evenly over groups; null answers all."""

    @property
    def metric(self) -> ScoreMetric:
        """The mean of `score`, which must not be null."""
        if isinstance(self.score, AnswerScore):
            return ScoreMetric(name=self.score.name, direction=self.score.direction)
        return ScoreMetric(name=str(self.score), direction="maximize")


class DataSettings(Settings):
    """Settings of data."""

    has_text: ClassVar[bool] = True
    """Whether the examples are texts that can be shown."""

    @property
    def generated(self) -> AnswersConfig | None:
        """Settings of the answers that a model must generate; None if it must generate none."""
        return None

    @property
    def groups_by_length(self) -> bool:
        """Whether a training batch has rows of similar lengths. Blocks of running text have one length."""
        return False


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
    """Share of `train` that becomes the test split if `test` is null, rounded to whole percents; null is a tenth."""
    group: str | None
    """Column with equal values for examples that depend on each other. The report treats groups as independent."""

    @property
    def sources(self) -> dict[str, str]:
        """The source of each split that is set: files, or the name of a split of `path`."""
        names = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: name for split, name in names.items() if name is not None}

    @property
    def split_percents(self) -> dict[str, int]:
        """The percentage of `train` that is split off for each split that is not set."""
        percents = {"validation": DEFAULT_SPLIT_PERCENT, "test": DEFAULT_SPLIT_PERCENT}
        if self.test_fraction is not None:
            percents["test"] = round(100 * self.test_fraction)
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

    columns: tuple[str, ...] | None
    """Names of all columns of csv, tsv and txt files without a header; null takes the names from the first line."""
    delimiter: Delimiter
    """Character between two fields. `auto`: a comma in csv files, a tab in tsv and txt files."""
    quoting: Quoting
    """`csv`: a field may stand in quotes (RFC 4180); `none`: a quote is a character like others. `auto`: `none` for tsv
    and txt files, unless each quote there stands around a whole field; else `csv`."""
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
class BlockSettings(DataSettings):
    """How running text is cut into blocks."""

    block_length: AtLeastTwo
    """Tokens per training and evaluation sequence, >= 2."""
    max_train_documents: Positive | None
    """Maximum number of training documents, evenly spaced; null uses all."""
    max_validation_blocks: Positive | None
    """Maximum number of validation blocks, evenly spaced; null uses all."""
    max_test_blocks: Positive | None
    """Maximum number of test blocks, evenly spaced; null uses all."""
    metric: TextMetric | MetricComponent
    """Metric that is the run's score. Lower is better, except for a `_target_` that says otherwise."""


@dataclass(frozen=True, kw_only=True)
class StdlibConfig(BlockSettings):
    """Text that every Python installation has: `stdlib_docs` and `stdlib_code`."""

    name: Literal["stdlib_docs", "stdlib_code"]


@dataclass(frozen=True, kw_only=True)
class TextConfig(SplitSettings, BlockSettings):
    """Plain text, cut into blocks that are predicted token by token."""

    name: Literal["text"]
    text: str
    """Column of the texts in a data set of the hub; files are read whole."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is None and self.group is not None:
            raise ConfigError(
                f"`data.group` must be null for files of text, which have no columns, but got {self.group!r}. "
                "Each file is a group."
            )


@dataclass(frozen=True, kw_only=True)
class TableConfig(RowSettings):
    """Texts or pairs of texts with labels, from csv, tsv, txt, jsonl, json or parquet files, or from the hub."""

    name: Literal["table"]
    text: str
    """Column of the text."""
    text_pair: str | None
    """Column of a second text that is read together with the first."""
    label: str
    """Column of the label: a name or a number."""
    labels: tuple[str, ...] | None
    """Names of the classes in the sorted order of the labels, such as `[negative, positive]` for 0 and 1; null takes
    the labels themselves."""
    task: Literal["auto", LabelTask]
    """Kind of prediction. `auto` decides from the labels and prints its choice."""
    class_weights: Literal["none", "balanced"]
    """`balanced` weighs a class by examples / (classes · its examples) of the training split."""
    metric: LabelMetric | MetricComponent
    """Metric that is the score of the run. `auto`: accuracy of a label, Pearson's correlation of numbers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels is not None and len(set(self.labels)) < max(2, len(self.labels)):
            raise ConfigError(f"`data.labels` must be two or more different names, but got {list(self.labels)}.")


@dataclass(frozen=True, kw_only=True)
class ConversationSettings(RowSettings):
    """Settings of data whose examples are conversations: how they become text, and which answers are generated."""

    template: str
    """`model`: the tokenizer's chat template; `plain`: texts with `separator` between them; `auto`: `model` if the
    tokenizer has a template, else `plain`; or a template's file, whose name ends with `.jinja`."""
    template_arguments: Mapping[str, Any] = field(hash=False)
    """Variables of the template by name, such as `{enable_thinking: false}`. Serve the model with the same."""
    template_date: str
    """The day that a template gets as today, as YEAR-MONTH-DAY, so that the data does not change from day to day."""
    separator: str
    """Text between the prompt and the answer of a `plain` template."""
    metric: TextMetric | PreferenceMetric | MetricComponent
    answers: AnswersConfig
    """Generated answers and their score."""

    @property
    def generated(self) -> AnswersConfig | None:
        return None if self.answers.score is None else self.answers

    def __post_init__(self) -> None:
        super().__post_init__()
        name, own = self.answers.metric.name, getattr(self.metric, "name", None)
        if name in (*get_args(TextMetric), *get_args(PreferenceMetric), own):
            raise ConfigError(
                f"`data.answers.score` must have another name than a metric of the loss, but got {name!r}. Rename it."
            )
        if self.template not in ("auto", "model", "plain") and not self.template.endswith(".jinja"):
            raise ConfigError(
                f"`data.template` must be auto, model, plain or the name of a .jinja file, but got {self.template!r}."
            )
        try:
            date.fromisoformat(self.template_date)
        except ValueError:
            raise ConfigError(
                f"`data.template_date` must be a day such as 2024-07-26, but got {self.template_date!r}."
            ) from None


@dataclass(frozen=True, kw_only=True)
class ChatConfig(ConversationSettings):
    """Prompts with completions, or conversations. The loss covers only the answers of the assistant."""

    name: Literal["chat"]
    prompt: str | None
    """Column of the prompt. If `completion` and `messages` are null too, the columns are found by their usual names."""
    input: str | None
    """Column of a text that follows the prompt on a new line, unless it is empty, as in Alpaca's files."""
    completion: str | None
    """Column of the answer, which the model learns."""
    messages: str | None
    """Column of a list of messages, each with `role` and `content`; instead of `prompt` and `completion`."""
    turns: Literal["all", "last"]
    """Answers of a conversation that are scored: all, or only the last."""
    metric: TextMetric | MetricComponent
    """Metric of the answers that is the run's score. Lower is better, except for a `_target_` that says otherwise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.messages is not None and (self.prompt, self.completion) != (None, None):
            raise ConfigError(
                f"`data.messages` must be null if `data.prompt` or `data.completion` is set, but got {self.messages!r}."
            )
        if (self.prompt is None) != (self.completion is None):
            raise ConfigError(
                "`data.prompt` and `data.completion` must be set together, but got "
                f"{self.prompt!r} and {self.completion!r}."
            )
        if self.input is not None and self.prompt is None:
            raise ConfigError(f"`data.input` must be null without `data.prompt`, but got {self.input!r}.")


@dataclass(frozen=True, kw_only=True)
class PreferencesConfig(ConversationSettings):
    """Pairs of answers to one prompt, of which one was preferred. The last answer of each conversation is scored."""

    turns: ClassVar[Literal["last"]] = "last"

    name: Literal["preferences"]
    prompt: str | None
    """Column of the prompt, a text or a list of messages; null finds it by its usual names. Without such a column, the
    prompt is what both answers begin with."""
    chosen: str
    """Column of the preferred answer: a text, a message, or a list of messages."""
    rejected: str
    """Column of the other answer, in the same form."""
    metric: PreferenceMetric | MetricComponent
    """Metric of the pairs that is the run's score. `auto`: the accuracy."""


@dataclass(frozen=True, kw_only=True)
class ModuleDataConfig(DataSettings):
    """The data of `datamodule._target_`, for the user's own LightningModule."""

    has_text: ClassVar[bool] = False

    name: Literal["module"]
    metric: Literal["auto"]
    """Not used: `metric.name` is the run's score."""


DataConfig = Annotated[
    StdlibConfig | TextConfig | TableConfig | ChatConfig | PreferencesConfig | ModuleDataConfig,
    Field(discriminator="name"),
]
