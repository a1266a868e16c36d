"""A data set's splits as a model gets them, made once per worker and shared by all its runs.

Comes after `read_source`, `blocks` and `examples`, and before `batching` and `loaders`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorasweep.config.data import (
    ChatConfig,
    CustomDataConfig,
    DataConfig,
    ExampleSettings,
    GlueConfig,
    StdlibConfig,
    TableConfig,
    TextConfig,
    glue_as_table,
)
from lorasweep.config.model import ModelKind
from lorasweep.data.blocks import build_block_split
from lorasweep.data.examples import CompletionSplit, LabelledSplit, Ragged, SequenceSplit
from lorasweep.data.own import OwnSplit
from lorasweep.data.source import Conversation, DataSource, Examples, LabelledText
from lorasweep.data.split import Split
from lorasweep.data.tasks import Classification, LanguageModelling, MultiLabel, Regression, Task, check_metric
from lorasweep.data.tokenise import tokenise_chats, tokenise_labelled, tokenise_sequences
from lorasweep.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSplits:
    """The splits of a data set, and what is to be learned from them."""

    train: Split
    validation: Split
    task: Task
    metric: str
    """Metric that runs are scored by: `data.metric`, or the metric that `auto` selects for this data set."""
    test: Callable[[], Split]
    """Reads the test split at its first call and returns the same one afterwards; nothing of it is read before."""
    notes: tuple[str, ...] = ()
    """Sentences on how the splits were made, for whoever trains on them."""

    def task_of(self, split: Split) -> Task:
        """Returns the task by which a split is scored: bits per byte count the bytes of that split's own text."""
        if isinstance(self.task, LanguageModelling):
            return replace(self.task, bytes_per_token=split.bytes_per_token)  # type: ignore[attr-defined]
        return self.task


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
        source: Its examples.
        tokenizer: The model's.
        model_kind: What the model predicts.
        start_token: The token that an encoder-decoder's decoder starts with.

    Raises:
        ConfigError: The model can't learn from such examples; a split has nothing to learn, or the tokenizer has no
            token that ends a text (for the test split, when it is called for); the metric is not one of the task's.
    """
    check_model_kind(source, model_kind, data=config.name)
    settings = glue_as_table(config) if isinstance(config, GlueConfig) else config

    def build(examples: Any) -> Split:
        if isinstance(settings, CustomDataConfig):
            return OwnSplit(name=examples.name, fingerprint=examples.fingerprint, examples=examples, task=settings.task)
        if tokenizer is None:
            raise ConfigError("`model.factory` must return a tokenizer for this data. Return it, or set `model.path`.")
        if isinstance(settings, StdlibConfig | TextConfig):
            return build_block_split(examples, config=settings, tokenizer=tokenizer)
        split: Split
        if isinstance(settings, TableConfig):
            split = _build_labelled(examples, config=settings, source=source, tokenizer=tokenizer)
        elif model_kind == "seq2seq":
            split = _build_sequences(examples, config=settings, tokenizer=tokenizer, start_token=start_token)
        else:
            split = _build_completions(examples, config=settings, tokenizer=tokenizer)
        if not len(split):
            raise ConfigError(
                f"the {split.name} split of `data={config.name}` must have an example with something to predict, but "
                "has none. Raise `data.max_length`, or use other data."
            )
        return split

    validation = build(source.validation)
    task = make_task(source, settings, validation)
    metric = task.metrics[0] if settings.metric == "auto" else settings.metric
    check_metric(metric, task.metrics)
    return DataSplits(
        train=build(source.train),
        validation=validation,
        task=task,
        metric=metric,
        test=functools.cache(lambda: build(source.test())),
        notes=source.notes,
    )


def _build_labelled(
    examples: Examples[LabelledText], *, config: TableConfig, source: DataSource, tokenizer: PreTrainedTokenizerBase
) -> LabelledSplit:
    made = tokenise_labelled(
        examples.items, tokenizer=tokenizer, max_length=config.max_length, fingerprint=examples.fingerprint
    )
    labels = label_tensor([example.label for example in examples.items], source)
    counts = count_labels(labels, source)
    class_weights = None
    if config.class_weights == "balanced" and examples.name == "train":  # checked to be classes by the config
        class_weights = len(examples) / (len(counts) * torch.tensor(counts).clamp(min=1).float())
    texts = [text for example in examples.items for text in (example.text, example.pair or "")]
    return LabelledSplit(
        **_describe_examples(examples, made, texts=texts, config=config, tokenizer=tokenizer),
        token_types=made.get("token_type_ids"),
        labels=labels,
        class_weights=class_weights,
        facts={"labels": dict(zip(source.label_names, counts, strict=True))},
    )


def _build_completions(
    examples: Examples[Conversation], *, config: ChatConfig, tokenizer: PreTrainedTokenizerBase
) -> CompletionSplit:
    made = tokenise_chats(
        examples.items,
        tokenizer=tokenizer,
        template=config.template,
        separator=config.separator,
        max_length=config.max_length,
        fingerprint=examples.fingerprint,
    )
    texts = [message.content for conversation in examples.items for message in conversation]
    split = CompletionSplit(
        **_describe_examples(examples, made, texts=texts, config=config, tokenizer=tokenizer),
        targets=made["targets"],
        scored_bytes=int(made["scored_bytes"].values.sum()),
        packing=config.packing,
    )
    return split.drop_unscored()


def _build_sequences(
    examples: Examples[Conversation],
    *,
    config: ChatConfig,
    tokenizer: PreTrainedTokenizerBase,
    start_token: int | None,
) -> SequenceSplit:
    assert start_token is not None
    made = tokenise_sequences(
        examples.items,
        tokenizer=tokenizer,
        separator=config.separator,
        max_length=config.max_length,
        fingerprint=examples.fingerprint,
    )
    texts = [message.content for conversation in examples.items for message in conversation]
    return SequenceSplit(
        **_describe_examples(examples, made, texts=texts, config=config, tokenizer=tokenizer),
        targets=made["targets"],
        start_token=start_token,
        scored_bytes=int(made["scored_bytes"].values.sum()),
    )


def _describe_examples(
    examples: Examples[Any],
    made: Mapping[str, Ragged],
    *,
    texts: Sequence[str],
    config: ExampleSettings,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Returns the fields that every kind of `ExampleSplit` has."""
    return {
        "name": examples.name,
        "notes": examples.notes,
        "fingerprint": examples.fingerprint,
        "tokens": made["input_ids"],
        "pad_token": pad_token(tokenizer),
        "bytes": sum(len(text.encode()) for text in texts),
        "truncated": int((made["full_length"].values > config.max_length).sum()),
    }


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
            f"`model.kind` must be {' or '.join(kinds)} for `data={data}`, but got {model_kind!r}. "
            f"Use `model={kinds[0]}`, or other data."
        )


def make_task(source: DataSource, config: DataConfig, validation: Split) -> Task:
    """Returns the task that is learned from a data source."""
    if source.kind == "single_label":
        smoothing = config.label_smoothing if isinstance(config, TableConfig) else 0.0
        return Classification(num_classes=len(source.label_names), label_smoothing=smoothing)
    if source.kind == "multi_label":
        return MultiLabel(num_labels=len(source.label_names))
    if source.kind == "regression":
        return Regression()
    if isinstance(config, CustomDataConfig):
        return LanguageModelling(bytes_per_token=None, metrics=("loss", "perplexity"))
    return LanguageModelling(bytes_per_token=validation.bytes_per_token)  # type: ignore[attr-defined]


def label_tensor(labels: Sequence[Any], source: DataSource) -> Tensor:
    """Returns labels as `LabelledSplit` holds them."""
    if source.kind == "single_label":
        return torch.tensor(labels, dtype=torch.int64)
    if source.kind == "regression":
        return torch.tensor(labels, dtype=torch.float32)
    indices = torch.zeros(len(labels), len(source.label_names))
    for row, found in enumerate(labels):
        indices[row, torch.tensor(found, dtype=torch.int64)] = 1.0
    return indices


def count_labels(labels: Tensor, source: DataSource) -> list[int]:
    """Returns the number of examples with each label; empty for numbers."""
    if source.kind == "regression":
        return []
    counts = labels.sum(0) if source.kind == "multi_label" else labels.bincount(minlength=len(source.label_names))
    return [int(count) for count in counts]


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the padding token: the tokenizer's, else its end-of-text token, else 0. Padded positions are masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0
