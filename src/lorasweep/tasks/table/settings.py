"""Settings of texts with labels."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from lorasweep.config.data import LabelKind, MetricComponent, RowSettings
from lorasweep.errors import ConfigError

LabelMetric = Literal["auto", "accuracy", "f1", "matthews", "pearson", "spearman", "mse", "loss"]
"""Scores of predicted labels. `auto`: accuracy of classes, Pearson's correlation of numbers."""


@dataclass(frozen=True, kw_only=True)
class TableConfig(RowSettings):
    """Texts or pairs of texts with labels, from csv, tsv, txt, jsonl, json or parquet files, or from the hub."""

    task_path = "lorasweep.tasks.table.task.TASK"
    model_kind = "classifier"
    found_columns = ("text", "label")

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
    task: Literal["auto", LabelKind]
    """Kind of prediction. `auto` decides from the labels and prints its choice."""
    class_weights: Literal["none", "balanced"]
    """`balanced` weighs a class by examples / (classes · its examples) of the training split."""
    metric: LabelMetric | MetricComponent
    """Metric that is the score of the run. `auto`: accuracy of a label, Pearson's correlation of numbers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len({self.label, self.text, self.text_pair}) < 3:
            raise ConfigError(
                "`data.label`, `data.text` and `data.text_pair` must be different columns, but are "
                f"{self.label!r}, {self.text!r} and {self.text_pair!r}."
            )
        if self.labels is not None and len(set(self.labels)) < max(2, len(self.labels)):
            raise ConfigError(f"`data.labels` must be two or more different names, but got {list(self.labels)}.")
