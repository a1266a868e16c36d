"""Reads pairs of an anchor and a positive, perhaps with negatives, in the columns that sentence-transformers reads."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorasweep.data.reading.tables import choose_columns, open_tables, parse_rows, require_text
from lorasweep.data.source import DataSource, ReadExamples, build_source, content_key
from lorasweep.errors import ConfigError
from lorasweep.tasks.embeddings.settings import EmbeddingsConfig
from lorasweep.tasks.task import GivenTable, Recognised
from lorasweep.wording import join_words, shorten

ANCHOR_COLUMNS = ("anchor", "query", "question", "sentence1")
"""Usual names of the column of anchors, in the order in which they are tried."""
POSITIVE_COLUMNS = ("positive", "answer", "sentence2")
"""Usual names of the column of positives, in the order in which they are tried."""
NEGATIVE_COLUMN = re.compile(r"negative(_?\d+)?")
"""Usual names of the columns of negatives."""


class Pair(NamedTuple):
    """An anchor with its passages: the positive, then the negatives."""

    anchor: str
    passages: tuple[str, ...]
    group: str | None = None
    """Pairs of a group share an anchor, a positive or a value of `data.group`, directly or through other pairs."""

    def list_texts(self) -> Iterator[str]:
        yield from (self.anchor, *self.passages)


def read_pairs(config: EmbeddingsConfig) -> DataSource:
    """Returns the pairs of a table. All pairs of a group are in one split.

    Raises ConfigError if a row can't be read, a column is missing, or all positives of training are equal.
    """
    tables = open_tables(config, functools.partial(_choose_columns, config))
    parents: dict[int, int] = {}

    def read(split: str) -> ReadExamples[Pair]:
        table = tables.pop(split)
        pairs, notes = parse_rows(table, _parse_pair)
        if split == "train" and len({pair.passages[0] for pair in pairs}) < 2:
            raise ConfigError(
                f"`data.train` must have two or more different positives, because those of other rows are the "
                f"negatives, but `{table.columns[1]}` has {shorten(pairs[0].passages[0], 80)} alone in "
                f"{len(pairs)} rows. Add rows."
            )
        return _join_groups(pairs, parents), [f"Pairs of {split} are read from {join_words(table.columns)}.", *notes]

    train = read("train")
    return build_source(
        train,
        read,
        missing=config.choose_split_percents(len(train[0])),
        key=lambda pair: int(str(pair.group)),
        describe=lambda train, _: [
            f"train has {len(train)} pairs in {len(groups := Counter(pair.group for pair in train))} groups that share "
            f"no anchor and no positive; the largest has {max(groups.values())}."
        ],
        shared="anchor or positive",
        max_examples=config.max_examples,
    )


def _choose_columns(config: EmbeddingsConfig, names: Sequence[str], source: str) -> list[str]:
    found = _find_columns(config.anchor, config.positive, names)
    if found is None:
        raise ConfigError(
            f"`data.anchor` and `data.positive` must name a column of anchors and one of positives, but {source} has "
            f"the columns {shorten(list(names), 400)}. Name yours: `data.anchor=COLUMN data.positive=COLUMN`."
        )
    negatives = config.negatives
    if negatives is None:
        negatives = tuple(name for name in names if NEGATIVE_COLUMN.fullmatch(name) and name not in found)
    wanted = [*zip(("anchor", "positive"), found, strict=True), *(("negatives", name) for name in negatives)]
    return choose_columns(wanted, names, source)


def _find_columns(anchor: str | None, positive: str | None, names: Sequence[str]) -> tuple[str, str] | None:
    """Returns the columns of anchors and positives: as named, by usual names, or the first two; None without such."""
    usual = [next((name for name in known if name in names), None) for known in (ANCHOR_COLUMNS, POSITIVE_COLUMNS)]
    anchor, positive = anchor or usual[0], positive or usual[1]
    if anchor is None and positive is None and len(names) > 1:
        anchor, positive = names[:2]
    return None if anchor is None or positive is None else (anchor, positive)


def _parse_pair(*texts: Any, group: str | None) -> Pair:
    anchor, positive, *negatives = (require_text(text) for text in texts)
    keys = [content_key([text]) for text in texts]
    if keys[0] == keys[1]:
        raise ValueError("must have two different texts, but the anchor is its own positive")
    if set(keys[:2]) & set(keys[2:]):
        raise ValueError("must have negatives that differ from anchor and positive, but one is equal")
    return Pair(anchor, (positive, *negatives), group)


def _join_groups(pairs: list[Pair], parents: dict[int, int]) -> list[Pair]:
    """Returns the pairs with their group, the smallest key in it.

    `parents` is a forest over the keys of anchors, positives and values of `data.group`, which all splits share, so
    that a pair of a later split gets the group of training to which it is linked.
    """

    def find(key: int) -> int:
        while parents.setdefault(key, key) != key:
            parents[key] = parents[parents[key]]  # shortens the path
            key = parents[key]
        return key

    def list_keys(pair: Pair) -> Iterator[int]:
        yield from (content_key([pair.anchor]), content_key(pair.passages[:1]))
        if pair.group is not None:
            yield content_key(["group", pair.group])  # two lines, which no text has

    for pair in pairs:
        first, *others = sorted({find(key) for key in list_keys(pair)})
        parents.update(dict.fromkeys(others, first))
    return [pair._replace(group=str(find(content_key([pair.anchor])))) for pair in pairs]


def recognise_pairs(table: GivenTable) -> Recognised | None:
    """Returns the columns of pairs; None if they may as well be of another task, and the user asks for no embedder."""
    names, settings = list(table.columns), table.settings
    found = _find_columns(settings.get("data.anchor"), settings.get("data.positive"), names)
    if found is None:
        return None
    negatives = settings.get("data.negatives") or [name for name in names if NEGATIVE_COLUMN.fullmatch(name)]
    is_asked = settings.get("model") == "embedder" or settings.keys() & {"data.anchor", "data.positive"}
    # a folder of sentence-transformers is often the base of a classifier, but neither of two texts is its label
    is_embedder = (Path(str(settings.get("model.path"))) / "modules.json").is_file()
    if is_embedder and {*found, *negatives} == {*names}:
        is_asked = is_asked or all(table.has_different_texts(name) for name in found)
    is_usual = found[0] in ANCHOR_COLUMNS and found[1] in POSITIVE_COLUMNS
    # a question with an answer may be a chat, and two sentences with a label are a table
    is_clear = found[1] == "positive" or found[0] in ("anchor", "query") or {*found, *negatives} == {*names}
    if not is_asked and not (is_usual and is_clear and found != ("question", "answer")):
        return None
    return Recognised(columns=[*found, *negatives, settings.get("data.group")])
