"""Tokenises pairs: an example has a row for its anchor, one for its positive and one for each negative."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from lorasweep.data.rows import Rows
from lorasweep.data.source import DataSource, Examples, content_key
from lorasweep.data.tokenise import Columns, cache_key, find_pad_token, map_cached
from lorasweep.tasks.embeddings.read import Pair
from lorasweep.tasks.embeddings.settings import EmbeddingsConfig


def build_pairs(
    examples: Examples[Pair], *, config: EmbeddingsConfig, source: DataSource, tokenizer: PreTrainedTokenizerBase
) -> Rows:
    """Returns the rows of one split. With `data.distractors`, examples of other splits have rows of training passages.

    A row has the `text_id` of its text, which is equal for texts that differ in case or white space alone.
    """
    pairs, fingerprint = examples.items, examples.fingerprint
    prompts = config.anchor_prompt, config.passage_prompt
    row_names = ["anchor", "positive", *itertools.repeat("negative", len(pairs[0].passages) - 1)]
    if config.distractors and examples.name != "train":
        passages = {content_key([text]): text for pair in source.train.items for text in pair.passages}
        number = -(-len(passages) // len(pairs))
        # the last example may begin again with the first passages: texts with one id are one passage
        others = itertools.cycle(passages.values())
        pairs = [pair._replace(passages=(*pair.passages, *itertools.islice(others, number))) for pair in pairs]
        row_names += itertools.repeat("distractor", number)
        fingerprint += source.train.fingerprint

    def tokenise(rows: Sequence[Pair]) -> Columns:
        texts = [prompts[place > 0] + text for row in rows for place, text in enumerate(row.list_texts())]
        arguments = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        full = tokenizer(texts, **arguments)["input_ids"]
        cut = tokenizer(texts, truncation=True, max_length=config.max_length, **arguments)["input_ids"]
        return {"input_ids": cut, "full_length": [[len(ids)] for ids in full]}

    key = cache_key(tokenizer, fingerprint, form="embeddings", prompts=prompts, max_length=config.max_length)
    sequences = map_cached(replace(examples, items=pairs), tokenise, key=key)
    is_cut = (sequences.pop("full_length").values > config.max_length).view(len(pairs), -1).any(1)
    # 63 bits, because torch's integers have a sign
    ids = torch.tensor([content_key([text]) >> 1 for pair in pairs for text in pair.list_texts()])
    num_passages = len(torch.unique(ids.view(len(pairs), -1)[:, 1:]))
    ranked = f"In {examples.name} each anchor ranks {num_passages:,} passages; with more, scores are lower."
    return Rows(
        name=examples.name,
        fingerprint=examples.fingerprint,
        notes=examples.notes if examples.name == "train" else (*examples.notes, ranked),
        groups=tuple(str(pair.group) for pair in pairs),
        sequences=sequences,
        columns={"text_id": ids},
        weights=torch.ones(len(pairs)),
        row_names=tuple(row_names),
        pad_token=find_pad_token(tokenizer),
        facts={
            "examples": len(pairs),
            "bytes": sum(len(text.encode()) for pair in examples.items for text in pair.list_texts()),
            "truncated": int(is_cut.sum()),
            "fingerprint": examples.fingerprint,
            "passages": num_passages,
        },
    )
