"""The tables of sentences that benchmarks train on."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "sentences.py"))
load_sentences, split_by_review, write_sentences = (
    SCRIPT[name] for name in ("load_sentences", "split_by_review", "write_sentences")
)


def test_a_review_is_in_one_split_without_neutral_and_repeated_sentences():
    rows = [(str(review), rating, f"{review} {rating}") for review in range(40) for rating in (-2.0, 0.4, 0.5, 0.5)]
    splits = split_by_review(rows)
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 64, "validation": 8, "test": 8}
    reviews = {split: {text.split()[0] for text, _ in pairs} for split, pairs in splits.items()}
    assert sum(map(len, reviews.values())) == len(set.union(*reviews.values())) == 40
    assert {(text.split()[1], label) for pairs in splits.values() for text, label in pairs} == {
        ("-2.0", "negative"),
        ("0.5", "positive"),
    }


def test_a_folder_of_tables_is_cut_to_evenly_spaced_rows(tmp_path):
    for split in ("train", "validation", "test"):
        lines = [f'"{n}" quoted\t{n % 2}\n' for n in range(10)]
        (tmp_path / f"{split}.tsv").write_text("text\tlabel\n" + "".join(lines))
    sizes = {"train": 4, "validation": 99, "test": 3}
    paths = write_sentences(load_sentences(str(tmp_path)), tmp_path / "cut", sizes=sizes)
    rows = {split: [json.loads(line) for line in path.read_text().splitlines()] for split, path in paths.items()}
    assert [row["text"] for row in rows["train"]] == [f'"{n}" quoted' for n in (0, 2, 5, 7)]
    assert len(rows["validation"]) == 10


def test_a_missing_table_names_what_would_help(tmp_path):
    with pytest.raises(SystemExit, match=r"movie_snippets.*train\.tsv"):
        load_sentences(str(tmp_path))
