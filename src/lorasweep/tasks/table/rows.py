"""Tokenises texts with labels: a row is a text, or a pair of texts, and its target is the label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from lorasweep.data.rows import Ragged, Rows
from lorasweep.data.source import DataSource, Examples
from lorasweep.data.tokenise import Columns, cache_key, find_pad_token, map_cached
from lorasweep.errors import ConfigError
from lorasweep.tasks.table.read import LabelledText
from lorasweep.tasks.table.settings import TableConfig


def build_labelled(
    examples: Examples[LabelledText], *, config: TableConfig, source: DataSource, tokenizer: PreTrainedTokenizerBase
) -> Rows:
    """Returns the rows of one split. Raises ConfigError if numbers shall have weights of classes."""
    sequences = tokenise_labelled(examples, tokenizer=tokenizer, max_length=config.max_length)
    full_lengths = sequences.pop("full_length").values
    is_number = source.label_kind == "regression"
    dtype = torch.float32 if is_number else torch.int64
    labels = torch.tensor([example.label for example in examples.items], dtype=dtype)
    if is_number and config.class_weights != "none":
        raise ConfigError(
            f"`data.class_weights` must be none unless each example has one class, but got {config.class_weights!r}."
        )
    counts = [] if is_number else labels.bincount(minlength=len(source.label_names)).tolist()
    columns = {"targets": labels}
    if config.class_weights == "balanced" and examples.name == "train":
        # n / (classes · count), as scikit-learn balances them. A class without examples counts as one example.
        columns["weights"] = (len(examples) / (len(counts) * torch.tensor(counts).clamp(min=1).float()))[labels]
    texts = [text for example in examples.items for text in (example.text, example.pair or "")]
    return Rows(
        name=examples.name,
        fingerprint=examples.fingerprint,
        notes=examples.notes,
        groups=tuple(str(row) if item.group is None else item.group for row, item in enumerate(examples.items)),
        sequences=sequences,
        columns=columns,
        weights=columns.get("weights", torch.ones(len(labels))),
        pad_token=find_pad_token(tokenizer),
        facts={
            "examples": len(examples),
            "bytes": sum(len(text.encode()) for text in texts),
            "truncated": int((full_lengths > config.max_length).sum()),
            "fingerprint": examples.fingerprint,
            "labels": dict(zip(source.label_names, counts, strict=True)),
        },
    )


def tokenise_labelled(
    examples: Examples[LabelledText], *, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Ragged]:
    """Returns `input_ids`, and `full_length`: the number of tokens of each example before truncation.

    For pairs of texts, also returns `token_type_ids` if the model uses them.
    """
    has_pairs = any(example.pair is not None for example in examples.items)
    has_types = has_pairs and "token_type_ids" in tokenizer.model_input_names

    def tokenise(rows: Sequence[LabelledText]) -> Columns:
        texts = [[row.text for row in rows], *([[row.pair for row in rows]] if has_pairs else [])]
        full = tokenizer(*texts, return_attention_mask=False, verbose=False)["input_ids"]
        cut = tokenizer(*texts, truncation=True, max_length=max_length, return_token_type_ids=has_types)
        result = {"input_ids": cut["input_ids"], "full_length": [[len(ids)] for ids in full]}
        return {**result, "token_type_ids": cut["token_type_ids"]} if has_types else result

    key = cache_key(tokenizer, examples.fingerprint, form="labelled", max_length=max_length)
    return map_cached(examples, tokenise, key=key)
