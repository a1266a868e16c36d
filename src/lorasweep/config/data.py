"""Settings of data: where rows come from, which columns count, how long they get. One class per file in `conf/data/`.

Downstream of reading only three forms are left, `text`, `table` and `chat`: `resolve_data` gives them for `glue` and
`hub`. `lorasweep.data.read_source` reads what is described here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args

from lorasweep.config.limits import check_function_name, require_at_least, require_fraction
from lorasweep.errors import ConfigError

T = TypeVar("T")

Direction = Literal["minimize", "maximize"]
"""Whether a lower or a higher score is better."""
TextMetric = Literal["bits_per_byte", "loss", "perplexity"]
"""Scores of predicted text, per token or byte; lower is better for each."""
LabelMetric = Literal["auto", "accuracy", "f1", "matthews", "pearson", "spearman", "mse", "loss"]
"""Scores of predicted labels. `auto`: accuracy of one label, F1 of several, Pearson's correlation of numbers."""
HubMetric = Literal[
    "auto", "accuracy", "f1", "matthews", "pearson", "spearman", "mse", "loss", "bits_per_byte", "perplexity"
]
"""All of them."""
LabelTask = Literal["single_label", "multi_label", "regression"]
OwnTask = Literal["single_label", "multi_label", "regression", "text"]
GlueTask = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]

METRICS_OF_TASK: Mapping[LabelTask, tuple[LabelMetric, ...]] = {
    "single_label": ("accuracy", "f1", "matthews", "loss"),
    "multi_label": ("f1", "accuracy", "loss"),
    "regression": ("pearson", "spearman", "mse", "loss"),
}
"""What each task can be scored by; the first is what `auto` takes."""

GLUE_PATH = "nyu-mll/glue"
GLUE_COLUMNS: Mapping[GlueTask, tuple[str, str | None]] = {
    "cola": ("sentence", None),
    "sst2": ("sentence", None),
    "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
"""The text columns of each GLUE task on the hub."""
GLUE_METRICS: Mapping[GlueTask, LabelMetric] = {"cola": "matthews", "stsb": "pearson"}
"""What LoRA's table of GLUE reports (arXiv 2106.09685, table 2); accuracy for every other task."""


@dataclass(frozen=True, kw_only=True)
class StdlibConfig:
    """Text that every Python installation has: `stdlib_docs` and `stdlib_code`."""

    name: Literal["stdlib_docs", "stdlib_code"]
    block_length: int
    """Tokens per training and evaluation sequence, >= 2."""
    max_validation_blocks: int | None
    """Use at most so many evenly spaced validation blocks; null uses all."""
    max_test_blocks: int | None
    """The same for the test split."""
    separate_documents: bool
    """Whether no token sees an earlier document of its block."""
    metric: TextMetric
    """What is reported as the run's score; lower is better for each."""

    def __post_init__(self) -> None:
        _check_blocks(self.block_length, self.max_validation_blocks, self.max_test_blocks)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Plain text, cut into blocks that are predicted token by token."""

    name: Literal["text"]
    train: str
    """A file, a folder (every file below it) or a glob such as `books/**/*.txt`."""
    validation: str | None
    """The same; null splits it off from `train`."""
    test: str | None
    block_length: int
    """Tokens per training and evaluation sequence, >= 2."""
    max_validation_blocks: int | None
    """Use at most so many evenly spaced validation blocks; null uses all."""
    max_test_blocks: int | None
    separate_documents: bool
    """Whether no token sees an earlier document of its block."""
    metric: TextMetric

    def __post_init__(self) -> None:
        _check_splits(self.train, self.validation, self.test)
        _check_blocks(self.block_length, self.max_validation_blocks, self.max_test_blocks)


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Texts or pairs of texts with labels, from csv, tsv, jsonl, json or parquet files."""

    name: Literal["table"]
    train: str
    """A file, or a glob of files of one kind such as `shards/*.parquet`."""
    validation: str | None
    """The same; null splits it off from `train`."""
    test: str | None
    text: str
    """Column of the text."""
    text_pair: str | None
    """Column of a second text that is read together with the first."""
    label: str
    """Column of the label: a name, a number, or a list of names."""
    task: Literal["auto", "single_label", "multi_label", "regression"]
    """What is predicted; `auto` decides by the labels and says so."""
    max_length: int
    """Most tokens per row, >= 2; what is longer is cut off."""
    max_train_examples: int | None
    """Use at most so many evenly spaced rows of the training split; null uses all."""
    max_validation_examples: int | None
    max_test_examples: int | None
    label_smoothing: float
    """Share of each target that is spread evenly over all classes, 0 <= s < 1."""
    class_weights: Literal["none", "balanced"]
    """`balanced` weighs a class by rows / (classes · its rows) of the training split."""
    metric: LabelMetric

    def __post_init__(self) -> None:
        _check_splits(self.train, self.validation, self.test)
        _check_columns(text=self.text, text_pair=self.text_pair, label=self.label)
        _check_rows(self)
        require_fraction("data.label_smoothing", self.label_smoothing)
        if self.task != "auto":
            check_label_settings(self, self.task)


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Prompts with completions, or conversations; the loss is on what the assistant says."""

    name: Literal["chat"]
    train: str
    """A file, or a glob of files of one kind: jsonl, json, parquet, csv or tsv."""
    validation: str | None
    """The same; null splits it off from `train`."""
    test: str | None
    prompt: str | None
    """Column of the prompt. With `completion` and `messages` also null, the columns are found by name."""
    completion: str | None
    """Column of the text to be learnt."""
    messages: str | None
    """Column of a list of messages, each with `role` and `content`; instead of `prompt` and `completion`."""
    template: Literal["auto", "model", "plain"]
    """`model`: the tokenizer's chat template; `plain`: texts with `separator` between them; `auto`: the template
    where the tokenizer has one."""
    separator: str
    """Stands between the texts of a `plain` template."""
    max_length: int
    """Most tokens per conversation, >= 2; what is longer is cut off."""
    max_train_examples: int | None
    """Use at most so many evenly spaced rows of the training split; null uses all."""
    max_validation_examples: int | None
    max_test_examples: int | None
    packing: bool
    """Whether short conversations share one sequence, without seeing each other."""
    generate: bool
    """Whether the prompts of the test split are also answered, token by token, and scored by BLEU and ROUGE."""
    metric: TextMetric

    def __post_init__(self) -> None:
        _check_splits(self.train, self.validation, self.test)
        _check_columns(prompt=self.prompt, completion=self.completion, messages=self.messages)
        _check_rows(self)
        if self.messages is not None and (self.prompt, self.completion) != (None, None):
            raise ConfigError(
                "`data.messages` must stand instead of `data.prompt` and `data.completion`, but got both. "
                "Leave one out."
            )
        if (self.prompt is None) != (self.completion is None):
            raise ConfigError(
                "`data.prompt` and `data.completion` must be set together, but got "
                f"{self.prompt!r} and {self.completion!r}."
            )


@dataclass(frozen=True, kw_only=True)
class GlueConfig:
    """A task of the GLUE benchmark (arXiv 1804.07461), from the hub or its cache."""

    name: Literal["glue"]
    task: GlueTask
    max_length: int
    """Most tokens per row, >= 2; what is longer is cut off."""
    max_train_examples: int | None
    """Use at most so many evenly spaced rows of the training split; null uses all."""
    max_validation_examples: int | None
    max_test_examples: int | None
    label_smoothing: float
    """Share of each target that is spread evenly over all classes, 0 <= s < 1."""
    class_weights: Literal["none", "balanced"]
    """`balanced` weighs a class by rows / (classes · its rows) of the training split."""
    metric: LabelMetric
    """`auto` takes the task's own: Matthews for `cola`, Pearson for `stsb`, accuracy for the others."""

    def __post_init__(self) -> None:
        resolve_data(self)  # which checks what a table wants


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Any data set of the hub, read as a table, as conversations or as text."""

    name: Literal["hub"]
    path: str
    """Id on the hub, or a folder that `datasets` can load."""
    subset: str | None
    """Name of one of its configurations; null where it has only one."""
    revision: str | None
    """Commit, branch or tag on the hub."""
    train: str
    """Name of a split."""
    validation: str | None
    """The same; null splits it off from `train`."""
    test: str | None
    kind: Literal["table", "chat", "text"]
    """What its rows are; the keys of the other kinds have no effect."""
    text: str | None
    """Of `table` and `text`: column of the text; null is `text`."""
    text_pair: str | None
    """Of `table`: column of a second text."""
    label: str | None
    """Of `table`: column of the label; null is `label`."""
    task: Literal["auto", "single_label", "multi_label", "regression"]
    label_smoothing: float
    class_weights: Literal["none", "balanced"]
    prompt: str | None
    """Of `chat`, as the next two; all three null: found by name."""
    completion: str | None
    messages: str | None
    template: Literal["auto", "model", "plain"]
    separator: str
    packing: bool
    generate: bool
    max_length: int
    """Of `table` and `chat`: most tokens per row."""
    max_train_examples: int | None
    max_validation_examples: int | None
    max_test_examples: int | None
    block_length: int
    """Of `text`: tokens per sequence."""
    max_validation_blocks: int | None
    max_test_blocks: int | None
    separate_documents: bool
    metric: HubMetric
    """`auto`: as in `table`, or bits per byte."""

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise ConfigError("`data.path` must name a data set on the hub or a folder, but is empty.")
        own = {"table": ("text", "text_pair", "label"), "chat": ("prompt", "completion", "messages"), "text": ("text",)}
        for key in ("text", "text_pair", "label", "prompt", "completion", "messages"):
            if getattr(self, key) is not None and key not in own[self.kind]:
                raise ConfigError(
                    f"`data.{key}` must be null with `data.kind={self.kind}`, but got {getattr(self, key)!r}, "
                    "which would have no effect."
                )
        if self.kind != "table" and (self.label_smoothing, self.class_weights, self.task) != (0, "none", "auto"):
            raise ConfigError(
                "`data.label_smoothing`, `data.class_weights` and `data.task` must keep their defaults "
                f"with `data.kind={self.kind}`, but were set. They are for `data.kind=table`."
            )
        choices = get_args(LabelMetric) if self.kind == "table" else ("auto", *get_args(TextMetric))
        if self.metric not in choices:
            raise ConfigError(
                f"`data.metric` must be one of {', '.join(choices)} with `data.kind={self.kind}`, "
                f"but got {self.metric!r}."
            )
        resolve_data(self)  # which checks what its kind wants


@dataclass(frozen=True, kw_only=True)
class OwnDataConfig:
    """The rows of a LightningDataModule of the user's own."""

    name: Literal["own"]
    factory: str
    """`package.module:function` that returns it (see docs/data.md). Its code runs."""
    task: OwnTask
    """What `labels` of its rows are: one index, several 0 and 1, a number; or the tokens of a text."""
    labels: tuple[str, ...]
    """Names of the labels in the order of their indices; none for numbers and text."""
    metric: HubMetric
    """`auto`: as in `table`, or the loss of text."""

    def __post_init__(self) -> None:
        check_function_name("data.factory", self.factory)
        named = self.task in ("single_label", "multi_label")
        if named is not bool(self.labels):
            raise ConfigError(
                f"`data.labels` must {'name the labels' if named else 'be empty'} with `data.task={self.task}`, "
                f"but got {list(self.labels)}."
            )
        metrics = ("loss", "perplexity") if self.task == "text" else METRICS_OF_TASK[self.task]
        if self.metric not in ("auto", *metrics):
            raise ConfigError(
                f"`data.metric` must be one of auto, {', '.join(metrics)} with `data.task={self.task}`, "
                f"but got {self.metric!r}."
            )


DataConfig = StdlibConfig | TextConfig | TableConfig | ChatConfig | GlueConfig | HubConfig | OwnDataConfig
Form = StdlibConfig | TextConfig | TableConfig | ChatConfig | OwnDataConfig
"""What is left of them downstream of reading."""


def resolve_data(config: DataConfig) -> Form:
    """Returns the settings of the form that the rows have: of `glue` and `hub` those of a table, chat or text.

    `train`, `validation` and `test` of what comes from the hub are names of splits. `metric` is `auto` only where it
    depends on labels that have not been read.
    """
    if isinstance(config, GlueConfig):
        return _glue_as_table(config)
    if isinstance(config, HubConfig):
        return _hub_as_its_kind(config)
    return config


def longest_row(config: DataConfig) -> int:
    """Returns the most tokens that one training sequence can have."""
    form = resolve_data(config)
    if isinstance(form, OwnDataConfig):
        return 1  # not known before it is read: a row is counted as one
    return form.block_length if isinstance(form, StdlibConfig | TextConfig) else form.max_length


def check_label_settings(config: TableConfig, task: LabelTask) -> None:
    """Raises ConfigError if the metric does not fit what is predicted, or a setting of classes has no effect on it."""
    if config.metric not in ("auto", *METRICS_OF_TASK[task]):
        raise ConfigError(
            f"`data.metric` must be one of auto, {', '.join(METRICS_OF_TASK[task])} for {_WORDS[task]}, "
            f"but got {config.metric!r}."
        )
    if task != "single_label" and (config.label_smoothing, config.class_weights) != (0, "none"):
        raise ConfigError(
            f"`data.label_smoothing` must be 0 and `data.class_weights` none for {_WORDS[task]}, "
            f"but got {config.label_smoothing!r} and {config.class_weights!r}, which would have no effect."
        )


_WORDS: Mapping[LabelTask, str] = {
    "single_label": "one label per row",
    "multi_label": "several labels per row",
    "regression": "labels that are numbers",
}


def _glue_as_table(config: GlueConfig) -> TableConfig:
    text, text_pair = GLUE_COLUMNS[config.task]
    return _take_over(
        TableConfig,
        config,
        name="table",
        train="train",
        validation="validation_matched" if config.task == "mnli" else "validation",
        test=None,
        text=text,
        text_pair=text_pair,
        label="label",
        task="regression" if config.task == "stsb" else "single_label",
        metric=GLUE_METRICS.get(config.task, "accuracy") if config.metric == "auto" else config.metric,
    )


def _hub_as_its_kind(config: HubConfig) -> TextConfig | TableConfig | ChatConfig:
    if config.kind == "table":
        text, label = config.text or "text", config.label or "label"
        return _take_over(TableConfig, config, name="table", text=text, label=label)
    metric = "bits_per_byte" if config.metric == "auto" else config.metric
    if config.kind == "chat":
        return _take_over(ChatConfig, config, name="chat", metric=metric)
    return _take_over(TextConfig, config, name="text", metric=metric)


def _take_over(kind: type[T], config: DataConfig, **changes: Any) -> T:
    """Makes settings of one kind from those of another: what both have, and the changes."""
    names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    return kind(**({name: getattr(config, name) for name in names if name not in changes} | changes))


def _check_splits(train: str, validation: str | None, test: str | None) -> None:
    for key, value in (("train", train), ("validation", validation), ("test", test)):
        if value is not None and not value.strip():
            raise ConfigError(f"`data.{key}` must name where its rows are, but is empty.")
    names = [name for name in (train, validation, test) if name is not None]
    if len(set(names)) < len(names):
        raise ConfigError(
            "`data.train`, `data.validation` and `data.test` must be different, but got "
            f"{train!r}, {validation!r} and {test!r}. Use null to take a split from `data.train`."
        )


def _check_columns(**columns: str | None) -> None:
    seen: dict[str, str] = {}
    for key, column in columns.items():
        if column in seen:
            raise ConfigError(f"`data.{seen[column]}` and `data.{key}` must be two columns, but both are {column!r}.")
        if column is not None:
            seen[column] = key


def _check_blocks(block_length: int, max_validation_blocks: int | None, max_test_blocks: int | None) -> None:
    require_at_least("data.block_length", block_length, 2)
    _check_limit("max_validation_blocks", max_validation_blocks)
    _check_limit("max_test_blocks", max_test_blocks)


def _check_limit(key: str, value: int | None) -> None:
    if value is not None:
        require_at_least(f"data.{key}", value, 1)


def _check_rows(config: TableConfig | ChatConfig) -> None:
    require_at_least("data.max_length", config.max_length, 2)
    _check_limit("max_train_examples", config.max_train_examples)
    _check_limit("max_validation_examples", config.max_validation_examples)
    _check_limit("max_test_examples", config.max_test_examples)
