"""Tokenises the splits of a data set, and chooses the task (loss and metrics) for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lorasweep.config.data import (
    ChatConfig,
    DataConfig,
    MetricComponent,
    RowSettings,
    ScoreMetric,
    StdlibConfig,
    TableConfig,
    TextConfig,
    get_built_in_metric,
)
from lorasweep.config.run import ModelKind
from lorasweep.data.batching import choose_part
from lorasweep.data.scored_tokens import can_score_by_chunk
from lorasweep.data.source import Conversation, DataSource, Document, Examples, LabelledText
from lorasweep.data.split import (
    IGNORED,
    BlockSplit,
    CompletionSplit,
    ExampleSplit,
    LabelledSplit,
    Ragged,
    Split,
    choose_evenly,
    cut_blocks,
)
from lorasweep.data.tasks import Classification, LabelTask, LanguageModelling, Regression, Task, build_own_metric
from lorasweep.data.tokenise import describe_chat_format, tokenise_chats, tokenise_documents, tokenise_labelled
from lorasweep.errors import ConfigError
from lorasweep.wording import join_words

MODEL_KINDS: Mapping[str, ModelKind] = {
    **dict.fromkeys(("documents", "conversations"), "causal_lm"),
    **dict.fromkeys(("single_label", "regression"), "classifier"),
}
"""For each kind of data: the kind of model that can learn from it."""
ALL_LOGITS_NOTE = (
    "The logits of all tokens are computed, which needs more memory, because this model does not compute the logits of "
    "a token from its last hidden state alone."
)
"""Note about a causal model for which `can_score_by_chunk` is False."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSplits:
    """The tokenised splits of a data set, with the task and the metric."""

    train: Split
    validation: Split
    task: Task
    metric: str
    """Name of the metric that scores a run: `data.metric`, or the task's first metric for `auto`."""
    test: Callable[[], Split]
    """Returns the test split. The first call reads and tokenises it, and later calls return the same object."""
    notes: tuple[str, ...] = ()
    """Notes for the user on how the splits were built."""

    @property
    def score_metric(self) -> ScoreMetric:
        own_metric = self.task.own_metric
        return get_built_in_metric(self.metric) if own_metric is None else own_metric.score

    def get_task(self, split: Split) -> Task:
        """Returns the task that scores a split. Its bits per byte use the bytes per token of this split's text."""
        if isinstance(self.task, LanguageModelling):
            return replace(self.task, bytes_per_token=split.bytes_per_token)  # type: ignore[attr-defined]
        return self.task

    def describe(self, split: Split) -> dict[str, Any]:
        """Returns the entry of a scored split in a run record: with `constant_answer` if it has labels."""
        scores = self.score_constant_answer(split)
        return split.describe() | ({"constant_answer": scores} if scores else {})

    def fit_constant_answer(self) -> Tensor | None:
        """Returns the logits of the constant answer, (outputs,); None for text and own data modules."""
        has_labels = isinstance(self.train, LabelledSplit) and isinstance(self.task, LabelTask)
        return self.task.fit_constant(self.train.labels) if has_labels else None  # type: ignore[attr-defined]

    def score_constant_answer(self, split: Split, *, fraction: float = 1.0) -> dict[str, float]:
        """Returns every metric if each example gets the same answer; empty for text and own data modules.

        With a `fraction`, only the examples of `choose_part` count, as in a run's evaluations.

        The answer needs no training. It is the most frequent class of the training split (the first of equally frequent
        classes), or the mean of its numbers. For the loss, the predicted probabilities are the shares of the classes.
        """
        constant, task = self.fit_constant_answer(), self.task
        if constant is None or not isinstance(task, LabelTask) or not isinstance(split, LabelledSplit):
            return {}
        labels = split.labels[torch.tensor(choose_part(len(split), fraction))]
        scores = task.compute(task.score_logits(constant.expand(len(labels), -1), {"targets": labels}))
        return {name: float(value) for name, value in scores.items()}


def build_splits(
    config: DataConfig,
    *,
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    model_kind: ModelKind,
    model: nn.Module | None = None,
) -> DataSplits:
    """Returns the splits with their task. The test split is tokenised at its first use, the others at once.

    With a causal `model`, the task computes the logits of scored tokens only, if the model can.

    Raises ConfigError if the model can't learn from this kind of data, the metric does not fit it, a split has nothing
    to predict, or the tokenizer has no end-of-text token; for the test split at its first use.
    """
    if model_kind != (wanted := MODEL_KINDS[source.kind]):
        raise ConfigError(
            f"`model.kind` must be {wanted} for `data={config.name}`, but got {model_kind!r}. Use `model={wanted}`, or "
            "other data."
        )

    def build(examples: Any) -> Split:
        if isinstance(config, TableConfig):
            return _build_labelled(examples, config=config, source=source, tokenizer=tokenizer)
        if isinstance(config, ChatConfig):
            return _build_chats(examples, config=config, tokenizer=tokenizer)
        assert isinstance(config, StdlibConfig | TextConfig)
        return build_block_split(examples, config=config, tokenizer=tokenizer)

    def build_test() -> Split:
        split = build(source.test())
        return replace(split, notes=(*split.notes, *describe_cut(split)))

    validation = build(source.validation)
    task: Task
    if source.kind == "single_label":
        task = Classification(num_classes=len(source.label_names))
    elif source.kind == "regression":
        task = Regression()
    else:
        task = LanguageModelling(bytes_per_token=validation.bytes_per_token)  # type: ignore[attr-defined]
    metric = task.metrics[0] if config.metric == "auto" else config.metric
    if isinstance(metric, str) and metric not in task.metrics:
        raise ConfigError(
            f"`data.metric` must be one of auto, {', '.join(task.metrics)} for data of the kind {source.kind}, but got "
            f"{metric!r}."
        )
    if isinstance(metric, MetricComponent):
        own_metric = build_own_metric(metric)
        task, metric = replace(task, own_metric=own_metric), own_metric.score.name
    notes = source.notes
    if isinstance(task, LanguageModelling) and model is not None:
        task = replace(task, by_chunk=can_score_by_chunk(model))
        notes = notes if task.by_chunk else (*notes, ALL_LOGITS_NOTE)
    splits = DataSplits(
        train=build(source.train),
        validation=validation,
        task=task,
        metric=metric,
        test=functools.cache(build_test),
        notes=notes,
    )
    cut = (*describe_cut(splits.train), *describe_cut(validation))
    more = (*cut, *describe_template(splits.train), *describe_constant_answer(splits, source.label_names))
    return replace(splits, notes=notes + more)


def describe_cut(split: Split) -> list[str]:
    """Returns a sentence on examples that were cut off; none if there are none."""
    if not isinstance(split, ExampleSplit) or not split.truncated:
        return []
    left_out = split.facts.get("left_out", 0)
    cut = f"{split.truncated} examples of {split.name} are longer than `data.max_length`, so their end is cut off"
    return [cut + (f"; {left_out} have no answer left and are not used." if left_out else ".")]


def describe_template(split: Split) -> list[str]:
    """Returns sentences on how a chat template changed conversations."""
    if not isinstance(split, ExampleSplit):
        return []
    facts = {"conversations": len(split), "without_reasoning": 0, **split.facts}
    rewritten = (
        f"{facts['conversations']} conversations of {split.name} are {len(split)} examples, because the chat template "
        "rewrites earlier turns: each answer follows the prompt that a server gives."
    )
    without = f"{facts['without_reasoning']} examples of {split.name} lack reasoning: the template leaves it out."
    chosen = {rewritten: len(split) > facts["conversations"], without: facts["without_reasoning"]}
    return [note for note, applies in chosen.items() if applies]


def describe_constant_answer(splits: DataSplits, label_names: Sequence[str]) -> list[str]:
    """Returns a sentence with the answer that needs no training and its metrics on the validation split."""
    scores, logits = splits.score_constant_answer(splits.validation), splits.fit_constant_answer()
    if not scores or logits is None:
        return []
    if isinstance(splits.task, Regression):
        answer = f"{float(logits):.4g}, the mean of train"
    else:
        answer = f"{label_names[int(logits.argmax())]!r}, the most frequent label of train"
    values = [f"{name} {value:.4f}" for name, value in scores.items() if name != "loss"]
    return [f"Always answering {answer}, has {join_words(values)} on validation."]


def build_block_split(
    examples: Examples[Document], *, config: StdlibConfig | TextConfig, tokenizer: PreTrainedTokenizerBase
) -> BlockSplit:
    """Tokenises the documents of one split and cuts them into blocks. Raises ConfigError if they fill no block."""
    documents = tokenise_documents(examples, tokenizer=tokenizer)
    tokens = documents.values
    if len(tokens) <= config.block_length:
        raise ConfigError(
            f"`data.block_length` must be less than the {len(tokens)} tokens of the {examples.name} split of "
            f"`data={config.name}`, but got {config.block_length}. Use shorter blocks or more text."
        )
    blocks = cut_blocks(tokens, block_length=config.block_length)
    # A block belongs to the document of the first token that it predicts. Its own first token is not predicted.
    first_predicted = torch.arange(len(blocks)) * config.block_length + 1
    owners = torch.searchsorted(documents.ends, first_predicted, right=True)
    limit = {"validation": config.max_validation_blocks, "test": config.max_test_blocks}.get(examples.name)
    if limit is not None and limit < len(blocks):
        chosen = choose_evenly(torch.bincount(owners, minlength=len(examples)).tolist(), limit=limit)
        blocks, owners = blocks[chosen], owners[chosen]
    owning = [examples.items[index] for index in owners.tolist()]
    num_bytes = sum(len(document.text.encode()) for document in examples.items)
    return BlockSplit(
        name=examples.name,
        notes=examples.notes,
        groups=tuple(document.group or document.name for document in owning),
        tokens=blocks,
        documents=len(examples),
        bytes=num_bytes,
        bytes_per_token=num_bytes / len(tokens),
        fingerprint=examples.fingerprint,
    )


def _build_labelled(
    examples: Examples[LabelledText], *, config: TableConfig, source: DataSource, tokenizer: PreTrainedTokenizerBase
) -> LabelledSplit:
    columns = tokenise_labelled(examples, tokenizer=tokenizer, max_length=config.max_length)
    is_regression = source.kind == "regression"
    dtype = torch.float32 if is_regression else torch.int64
    labels = torch.tensor([example.label for example in examples.items], dtype=dtype)
    class_weights = None
    if is_regression and config.class_weights != "none":
        raise ConfigError(
            f"`data.class_weights` must be none unless each example has one class, but got {config.class_weights!r}."
        )
    counts = [] if is_regression else labels.bincount(minlength=len(source.label_names)).tolist()
    if config.class_weights == "balanced" and examples.name == "train":
        # n / (classes · count), as scikit-learn balances them. A class without examples counts as one example.
        class_weights = len(examples) / (len(counts) * torch.tensor(counts).clamp(min=1).float())
    texts = [text for example in examples.items for text in (example.text, example.pair or "")]
    return LabelledSplit(
        **_shared_fields(examples, columns, texts=texts, config=config, tokenizer=tokenizer),
        token_types=columns.get("token_type_ids"),
        labels=labels,
        class_weights=class_weights,
        facts={"labels": dict(zip(source.label_names, counts, strict=True))},
    )


def _build_chats(
    examples: Examples[Conversation], *, config: ChatConfig, tokenizer: PreTrainedTokenizerBase
) -> CompletionSplit:
    columns = tokenise_chats(examples, config=config, tokenizer=tokenizer)
    texts = [message.content for conversation in examples.items for message in conversation.messages]
    groups = [item.group or str(row) for row, item in enumerate(examples.items)]
    rows, targets = columns["row"].values.tolist(), columns["targets"]
    is_whole = (columns["full_length"].values <= config.max_length) & (targets.values[targets.ends - 1] != IGNORED)
    shared = _shared_fields(examples, columns, texts=texts, config=config, tokenizer=tokenizer)
    split = CompletionSplit(
        **{**shared, "groups": tuple(groups[row] for row in rows)},
        targets=targets,
        answer_starts=columns["answer_start"].values.where(is_whole, 0),
        rows=tuple(examples.items[row].row for row in rows),
        scored_bytes=int(columns["scored_bytes"].values.sum()),
        facts={
            "conversations": len(examples),
            "without_reasoning": int(columns["omits_reasoning"].values.sum()),
            **describe_chat_format(config, tokenizer),
        },
    )
    split = split.drop_unscored()
    if not len(split):
        raise ConfigError(
            f"the {split.name} split of `data={config.name}` must have a token to predict, but all its answers are "
            "cut off. Raise `data.max_length`, or use other data."
        )
    return split


def _shared_fields(
    examples: Examples[Any],
    columns: Mapping[str, Ragged],
    *,
    texts: list[str],
    config: RowSettings,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    pad_tokens = [token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(token, int)]
    return {
        "name": examples.name,
        "notes": examples.notes,
        "groups": tuple(str(row) if item.group is None else item.group for row, item in enumerate(examples.items)),
        "fingerprint": examples.fingerprint,
        "tokens": columns["input_ids"],
        "pad_token": pad_tokens[0] if pad_tokens else 0,  # 0 is as good, because padded positions are masked
        "bytes": sum(len(text.encode()) for text in texts),
        "truncated": int((columns["full_length"].values > config.max_length).sum()),
    }
