"""Rows know where they came from, and columns of every split are checked before any row is read."""

from __future__ import annotations

import functools

import pytest

from lorasweep.config.compose import compose_run
from lorasweep.data.reading.files import find_tables
from lorasweep.data.reading.tables import Table, choose_columns, open_files, open_tables, parse_rows
from lorasweep.errors import ConfigError


def test_rows_of_several_files_know_their_place(write):
    write("a.csv", "text\none\ntwo\n")
    write("b.csv", "text\n\nthree\n")
    table = open_files(find_tables("*.csv", key="data.train")).read(["text"])
    assert table.columns == {"text": ["one", "two", "three"]}
    assert [table.locate(row) for row in range(3)] == ["row 1 of 'a.csv'", "row 2 of 'a.csv'", "row 1 of 'b.csv'"]


@pytest.mark.parametrize(
    ("test_file", "content", "settings", "words"),
    [
        ("test.csv", "txt,label\nb,y\n", {}, ["`data.text`", "'test.csv'", "`txt`", "`data.columns`"]),
        ("test.csv", "text;label\nb;y\n", {}, ["`data.text`", "['text;label']", "`data.delimiter`"]),
        ("test.csv", "text,label\nb,y\n", {"data.group": "author"}, ["`data.group`", "'test.csv'"]),
        ("test.jsonl", '{"txt": "b", "label": 1}\n', {}, ["`data.text`", "'test.jsonl'", "`txt`"]),
        ("test.parquet", "", {}, ["'test.parquet'"]),
    ],
)
def test_columns_of_test_data_are_checked_before_it_is_read(write, test_file, content, settings, words):
    write("train.csv", "text,label,author\na,x,me\n")
    write(test_file, content)
    choose = functools.partial(choose_columns, [("text", "text"), ("label", "label")])
    settings = {"data": "table", "data.train": "train.csv", "data.test": test_file, **settings}
    with pytest.raises(ConfigError) as raised:
        open_tables(compose_run(settings).data, choose)
    assert [word for word in words if word not in str(raised.value)] == []


def refuse_b(text, group):
    if text == "b":
        raise ValueError("must not be b")
    return text


def test_unusable_rows_are_errors_of_a_file_and_skipped_in_a_hub_data_set():
    table = Table(columns={"text": ["a", "b", "b"]}, sources=[(0, "x")], notes=["said"])
    with pytest.raises(ConfigError, match=r"^row 2 of 'x' must not be b.* 2 rows"):
        parse_rows(table, refuse_b)
    columns, sources = table.columns, table.sources
    parsed, notes = parse_rows(Table(columns=columns, sources=sources, can_skip_rows=True, notes=["said"]), refuse_b)
    assert parsed == ["a"]
    assert notes == ["said", "2 of 3 rows of 'x' are skipped. The first problem: row 2 of 'x' must not be b."]
