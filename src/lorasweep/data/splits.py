"""A data set's splits as a model gets them, made once per worker and shared by all its runs.

Comes after `sources` (rows), `blocks` and `examples` (splits of them), and before `batching` and `loaders` (batches).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorasweep.config.data import (
    ChatConfig,
    DataConfig,
    OwnDataConfig,
    StdlibConfig,
    TableConfig,
    TextConfig,
    resolve_data,
)
from lorasweep.config.model import ModelKind
from lorasweep.data.blocks import build_block_split
from lorasweep.data.examples import CompletionSplit, LabelledSplit, SequenceSplit
from lorasweep.data.own import OwnSplit
from lorasweep.data.source import Conversations, DataSource, Documents, LabelledExamples, OwnExamples, Rows
from lorasweep.data.split import Split
from lorasweep.data.tasks import Classification, LanguageModelling, MultiLabel, Regression, Task, check_metric
from lorasweep.data.tokenise import describe_cut, tokenise_chats, tokenise_labelled, tokenise_sequences
from lorasweep.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSplits:
    """The splits of a data set, and what is to be learned from them."""

    train: Split
    validation: Split
    task: Task
    metric: str
    """What runs are scored by: `data.metric`, or what `auto` means here."""
    test: Callable[[], Split]
    """Reads the test split at its first call and returns the same one afterwards; nothing of it is read before."""
    notes: tuple[str, ...] = ()
    """Sentences on how the splits were made, for whoever trains on them."""

    def task_of(self, split: Split) -> Task:
        """Returns the task by which a split is scored: bits per byte count the bytes of that split's own text."""
        if isinstance(self.task, LanguageModelling):
            return replace(self.task, bytes_per_token=split.bytes_per_token)  # type: ignore[attr-defined]
        return self.task


@dataclass(frozen=True, kw_only=True, eq=False)
class _Maker:
    """Makes splits of the rows of one source."""

    config: StdlibConfig | TextConfig | TableConfig | ChatConfig
    source: DataSource
    tokenizer: PreTrainedTokenizerBase
    model_kind: ModelKind
    start_token: int | None

    def make(self, rows: Rows) -> Split:
        if isinstance(rows, Documents):
            return self._blocks(rows)
        assert not isinstance(rows, OwnExamples)
        split = self._labelled(rows) if isinstance(rows, LabelledExamples) else self._chats(rows)
        if not len(split):
            raise ConfigError(
                f"the {rows.name} split of `data={self.config.name}` must have a row with something to predict, but "
                "has none. Raise `data.max_length`, or use other data."
            )
        return split

    def _blocks(self, rows: Documents) -> Split:
        assert isinstance(self.config, StdlibConfig | TextConfig)
        limits = {"validation": self.config.max_validation_blocks, "test": self.config.max_test_blocks}
        return build_block_split(
            rows,
            data=self.config.name,
            tokenizer=self.tokenizer,
            block_length=self.config.block_length,
            max_blocks=limits.get(rows.name),
            separate=self.config.separate_documents,
        )

    def _labelled(self, rows: LabelledExamples) -> LabelledSplit:
        assert isinstance(self.config, TableConfig)
        made = tokenise_labelled(
            rows.texts,
            rows.pairs,
            tokenizer=self.tokenizer,
            max_length=self.config.max_length,
            fingerprint=rows.fingerprint,
        )
        texts = [*rows.texts, *(rows.pairs or [])]
        return LabelledSplit(
            name=rows.name,
            notes=rows.notes,
            fingerprint=rows.fingerprint,
            tokens=made["input_ids"],
            token_types=made.get("token_type_ids"),
            pad_token=pad_token(self.tokenizer),
            bytes=sum(len(text.encode()) for text in texts),
            truncated=describe_cut(made, max_length=self.config.max_length),
            labels=label_tensor(rows, self.source),
            class_weights=self._class_weights() if rows.name == "train" else None,
            facts={"labels": count_labels(rows, self.source.label_names)},
        )

    def _class_weights(self) -> Tensor | None:
        assert isinstance(self.config, TableConfig)
        if self.config.class_weights == "none" or self.source.kind != "single_label":
            return None
        assert isinstance(self.source.train, LabelledExamples)
        counts = torch.bincount(torch.tensor(self.source.train.labels), minlength=len(self.source.label_names))
        return len(self.source.train) / (len(counts) * counts.clamp(min=1).float())

    def _chats(self, rows: Conversations) -> CompletionSplit | SequenceSplit:
        assert isinstance(self.config, ChatConfig)
        shared: dict[str, Any] = {
            "tokenizer": self.tokenizer,
            "separator": self.config.separator,
            "max_length": self.config.max_length,
            "fingerprint": rows.fingerprint,
        }
        if self.model_kind == "seq2seq":
            made = tokenise_sequences(rows.conversations, **shared)
        else:
            made = tokenise_chats(rows.conversations, template=self.config.template, **shared)
        facts: dict[str, Any] = {
            "name": rows.name,
            "notes": rows.notes,
            "fingerprint": rows.fingerprint,
            "pad_token": pad_token(self.tokenizer),
            "bytes": sum(len(message.content.encode()) for row in rows.conversations for message in row),
            "truncated": describe_cut(made, max_length=self.config.max_length),
        }
        if self.model_kind == "seq2seq":
            assert self.start_token is not None
            return SequenceSplit(
                tokens=made["input_ids"],
                targets=made["targets"],
                start_token=self.start_token,
                scored_bytes=int(made["scored_bytes"].values.sum()),
                **facts,
            )
        whole = CompletionSplit(
            tokens=made["input_ids"],
            targets=made["targets"],
            scored_bytes=int(made["scored_bytes"].values.sum()),
            packing=self.config.packing,
            **facts,
        )
        return whole.without_unscored()


def load_splits(
    config: DataConfig,
    *,
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase | None,
    model_kind: ModelKind,
    start_token: int | None = None,
) -> DataSplits:
    """Tokenises the training and validation splits; the test split waits until it is called for.

    Args:
        config: Settings of the data.
        source: Its rows.
        tokenizer: The model's.
        model_kind: What the model predicts.
        start_token: What an encoder-decoder's decoder starts with.

    Raises:
        ConfigError: The model can't learn from such rows; a split is empty or shorter than one block, or the tokenizer
            has no token that ends a text (for the test split, when it is called for); the metric is not one of the
            task's.
    """
    form = resolve_data(config)
    check_model_kind(source, model_kind, data=config.name)
    if isinstance(form, OwnDataConfig):
        return _own_splits(form, source)
    if tokenizer is None:
        raise ConfigError("`model.factory` must bring a tokenizer, but brings none. Return it, or set `model.path`.")
    maker = _Maker(config=form, source=source, tokenizer=tokenizer, model_kind=model_kind, start_token=start_token)
    validation = maker.make(source.validation)
    task = make_task(source, form, validation)
    metric = task.metrics[0] if form.metric == "auto" else form.metric
    check_metric(metric, task.metrics)
    return DataSplits(
        train=maker.make(source.train),
        validation=validation,
        task=task,
        metric=metric,
        test=functools.cache(lambda: maker.make(source.test())),
        notes=source.notes,
    )


def _own_splits(config: OwnDataConfig, source: DataSource) -> DataSplits:
    def make(rows: Rows) -> OwnSplit:
        assert isinstance(rows, OwnExamples)
        return OwnSplit(name=rows.name, fingerprint=rows.fingerprint, rows=rows, task=config.task)

    validation = make(source.validation)
    task = make_task(source, config, validation)
    return DataSplits(
        train=make(source.train),
        validation=validation,
        task=task,
        metric=task.metrics[0] if config.metric == "auto" else config.metric,
        test=functools.cache(lambda: make(source.test())),
        notes=source.notes,
    )


def check_model_kind(source: DataSource, model_kind: ModelKind, *, data: str) -> None:
    """Refuses data from which a model of this kind can't learn.

    Raises:
        ConfigError: It can't; the message says which models can.
    """
    fitting: dict[str, tuple[ModelKind, ...]] = {
        "documents": ("causal_lm",),
        "conversations": ("causal_lm", "seq2seq"),
    }
    kinds = fitting.get(source.kind, ("classifier",))
    if model_kind not in kinds:
        raise ConfigError(
            f"`model.kind` must be {' or '.join(kinds)} for the rows of `data={data}`, but got {model_kind!r}. "
            f"Use `model={kinds[0]}`, or other data."
        )


def make_task(source: DataSource, config: DataConfig, validation: Split) -> Task:
    """Returns what is learned from the rows of a source."""
    if source.kind == "single_label":
        smoothing = config.label_smoothing if isinstance(config, TableConfig) else 0.0
        return Classification(num_classes=len(source.label_names), label_smoothing=smoothing)
    if source.kind == "multi_label":
        return MultiLabel(num_labels=len(source.label_names))
    if source.kind == "regression":
        return Regression()
    if isinstance(config, OwnDataConfig):
        return LanguageModelling(bytes_per_token=None, metrics=("loss", "perplexity"))
    return LanguageModelling(bytes_per_token=validation.bytes_per_token)  # type: ignore[attr-defined]


def label_tensor(rows: LabelledExamples, source: DataSource) -> Tensor:
    """Returns the labels as `LabelledSplit` holds them."""
    if source.kind == "single_label":
        return torch.tensor(rows.labels, dtype=torch.int64)
    if source.kind == "regression":
        return torch.tensor(rows.labels, dtype=torch.float32)
    labels = torch.zeros(len(rows), len(source.label_names))
    for row, found in enumerate(rows.labels):
        assert isinstance(found, list)
        labels[row, torch.tensor(found, dtype=torch.int64)] = 1.0
    return labels


def count_labels(rows: LabelledExamples, names: Sequence[str]) -> dict[str, int]:
    """Returns how many rows have each label; empty for numbers."""
    found = [label for labels in rows.labels for label in (labels if isinstance(labels, list) else [labels])]
    return {name: found.count(index) for index, name in enumerate(names)}


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token that fills rows up: the tokenizer's, else that which ends a text, else 0. It is masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0
