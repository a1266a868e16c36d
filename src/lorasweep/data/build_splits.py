"""Tokenises the splits of a data set, and defines what is learnt from them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
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
from lorasweep.data.custom_module import CustomSplit
from lorasweep.data.examples import CompletionSplit, ExampleSplit, LabelledSplit, Ragged, SequenceSplit, TextSplit
from lorasweep.data.source import Conversation, DataSource, Examples, LabelledText
from lorasweep.data.split import Split
from lorasweep.data.tasks import Classification, LanguageModelling, MultiLabel, Regression, Task
from lorasweep.data.tokenise import tokenise_chats, tokenise_labelled, tokenise_sequences
from lorasweep.errors import ConfigError

MODEL_KINDS: Mapping[str, tuple[ModelKind, ...]] = {
    "documents": ("causal_lm",),
    "conversations": ("causal_lm", "seq2seq"),
    **dict.fromkeys(("single_label", "multi_label", "regression"), ("classifier",)),
}
"""The kinds of models that can learn from each kind of examples."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSplits:
    """The splits of a data set, and what is to be learnt from them."""

    train: Split
    validation: Split
    task: Task
    metric: str
    """Metric that runs are scored by: `data.metric`, or the metric that `auto` selects for this data set."""
    test: Callable[[], Split]
    """Reads the test split at its first call and returns the same one afterwards; nothing of it is read before."""
    notes: tuple[str, ...] = ()
    """Notes for the user on how the splits were built."""

    def task_of(self, split: Split) -> Task:
        """Returns the task that scores a split: bits per byte count the bytes of that split's own text."""
        if isinstance(self.task, LanguageModelling):
            return replace(self.task, bytes_per_token=split.bytes_per_token)  # type: ignore[attr-defined]
        return self.task


def build_splits(
    config: DataConfig,
    *,
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase | None,
    model_kind: ModelKind,
    start_token: int | None = None,
) -> DataSplits:
    """Tokenises the training and validation splits. The test split is tokenised at its first use.

    Args:
        config: Settings of the data.
        source: The examples of the data.
        tokenizer: The tokenizer of the model; None if it has none.
        model_kind: What the model predicts.
        start_token: The first token of an encoder-decoder's decoder.

    Raises:
        ConfigError: The model can't learn from such examples, a split has nothing to predict, or the tokenizer has no
            token that ends a text. Errors in the test split are raised at its first use.
    """
    if model_kind not in MODEL_KINDS[source.kind]:
        kinds = MODEL_KINDS[source.kind]
        raise ConfigError(
            f"`model.kind` must be {' or '.join(kinds)} for `data={config.name}`, but got {model_kind!r}. "
            f"Use `model={kinds[0]}`, or other data."
        )
    settings = glue_as_table(config) if isinstance(config, GlueConfig) else config

    def build(examples: Any) -> Split:
        if isinstance(examples, CustomSplit):
            return examples
        if tokenizer is None:
            raise ConfigError("`model.factory` must return a tokenizer for this data. Return it, or set `model.path`.")
        if isinstance(settings, StdlibConfig | TextConfig):
            return build_block_split(examples, config=settings, tokenizer=tokenizer)
        split: ExampleSplit
        if isinstance(settings, TableConfig):
            split = _build_labelled(examples, config=settings, source=source, tokenizer=tokenizer)
        else:
            assert isinstance(settings, ChatConfig)
            split = _build_chats(
                examples, config=settings, tokenizer=tokenizer, model_kind=model_kind, start_token=start_token
            )
        if not len(split):
            raise ConfigError(
                f"the {split.name} split of `data={config.name}` must have an example with something to predict, but "
                "has none. Raise `data.max_length`, or use other data."
            )
        return split

    validation = build(source.validation)
    task = _build_task(source, settings, validation)
    return DataSplits(
        train=build(source.train),
        validation=validation,
        task=task,
        metric=task.metrics[0] if settings.metric == "auto" else settings.metric,
        test=functools.cache(lambda: build(source.test())),
        notes=source.notes,
    )


def _build_task(source: DataSource, config: DataConfig, validation: Split) -> Task:
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


def _build_labelled(
    examples: Examples[LabelledText], *, config: TableConfig, source: DataSource, tokenizer: PreTrainedTokenizerBase
) -> LabelledSplit:
    columns = tokenise_labelled(examples, tokenizer=tokenizer, max_length=config.max_length)
    labels, counts = _encode_labels(examples, source)
    class_weights = None
    if config.class_weights == "balanced" and examples.name == "train":  # the config allows this only with classes
        class_weights = len(examples) / (len(counts) * torch.tensor(counts).clamp(min=1).float())
    texts = [text for example in examples.items for text in (example.text, example.pair or "")]
    return LabelledSplit(
        **_shared_fields(examples, columns, texts=texts, config=config, tokenizer=tokenizer),
        token_types=columns.get("token_type_ids"),
        labels=labels,
        class_weights=class_weights,
        facts={"labels": dict(zip(source.label_names, counts, strict=True))},
    )


def _encode_labels(examples: Examples[LabelledText], source: DataSource) -> tuple[Tensor, list[int]]:
    """Returns the labels as `LabelledSplit` holds them, and the number of examples of each class."""
    labels: list[Any] = [example.label for example in examples.items]
    if source.kind == "regression":
        return torch.tensor(labels, dtype=torch.float32), []
    if source.kind == "single_label":
        classes = torch.tensor(labels, dtype=torch.int64)
        return classes, classes.bincount(minlength=len(source.label_names)).tolist()
    is_set = torch.zeros(len(labels), len(source.label_names))
    for row, indices in enumerate(labels):
        is_set[row, torch.tensor(indices, dtype=torch.int64)] = 1.0
    return is_set, [int(count) for count in is_set.sum(0)]


def _build_chats(
    examples: Examples[Conversation],
    *,
    config: ChatConfig,
    tokenizer: PreTrainedTokenizerBase,
    model_kind: ModelKind,
    start_token: int | None,
) -> TextSplit:
    is_seq2seq = model_kind == "seq2seq"
    columns = (tokenise_sequences if is_seq2seq else tokenise_chats)(examples, config=config, tokenizer=tokenizer)
    texts = [message.content for conversation in examples.items for message in conversation.messages]
    fields = {
        **_shared_fields(examples, columns, texts=texts, config=config, tokenizer=tokenizer),
        "targets": columns["targets"],
        "scored_bytes": int(columns["scored_bytes"].values.sum()),
    }
    if is_seq2seq:
        assert start_token is not None
        return SequenceSplit(**fields, start_token=start_token)
    return CompletionSplit(**fields, packing=config.packing).drop_unscored()


def _shared_fields(
    examples: Examples[Any],
    columns: Mapping[str, Ragged],
    *,
    texts: list[str],
    config: ExampleSettings,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Returns the fields that every kind of `ExampleSplit` has."""
    pad_tokens = [token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(token, int)]
    return {
        "name": examples.name,
        "notes": examples.notes,
        "groups": tuple(str(row) if item.group is None else item.group for row, item in enumerate(examples.items)),
        "fingerprint": examples.fingerprint,
        "tokens": columns["input_ids"],
        "pad_token": pad_tokens[0] if pad_tokens else 0,  # any token will do, because padded positions are masked
        "bytes": sum(len(text.encode()) for text in texts),
        "truncated": int((columns["full_length"].values > config.max_length).sum()),
    }
