"""Files of every kind are read as tables without a loss, and what is broken is named with its file and place."""

from __future__ import annotations

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorasweep.data.reading.tables import Table, choose_columns, find_files, find_tables, parse_rows, read_files
from lorasweep.errors import ConfigError


def read(*paths, columns=("text", "label")):
    wanted = [(name, name) for name in columns]
    return read_files(paths, choose=lambda names, place: choose_columns(wanted, names, place))


@pytest.fixture
def write(folder):
    def write_file(name, content):
        path = (folder / name).relative_to(folder)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        (
            "a.csv",
            'id,label,text\r\n1,x,"so, and\nso"\r\n\r\n2,y,"a ""b"""\r\n',
            [("so, and\nso", "x"), ('a "b"', "y")],
        ),
        ("a.csv", "text,label\nNA,01\nnull,1.0\n", [("NA", "01"), ("null", "1.0")]),
        ("a.csv", "\ufefftext , label\né,x\n", [("é", "x")]),
        ("a.csv", f"text,label\n{'x' * 200_000},y\n", [("x" * 200_000, "y")]),
        ("a.tsv", 'text\tlabel\n"open\tx\nsays "so"\ty\n', [('"open', "x"), ('says "so"', "y")]),
        (
            "a.jsonl",
            '{"text": "a\u2028", "label": 1}\n\n{"label": ["x"], "text": "b"}\n',
            [("a\u2028", 1), ("b", ["x"])],
        ),
        ("a.jsonl", '{"text": "2020-01-01", "label": 1}\n{"text": "b"}', [("2020-01-01", 1), ("b", None)]),
        ("a.json", ' [{"text": "a", "label": 1},\n{"text": "b"}]', [("a", 1), ("b", None)]),
        ("A.CSV", "text,label\na,b\n", [("a", "b")]),
    ],
)
def test_values_are_read_as_they_are_written(write, name, content, rows):
    assert list(zip(*read(write(name, content)).columns.values(), strict=True)) == rows


def test_parquet_reads_the_wanted_columns(folder):
    labels = pyarrow.array(["x", "y"]).dictionary_encode()
    table = pyarrow.table({"text": ["a", None], "other": [1, 2], "label": labels})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    assert read(folder / "a.parquet").columns == {"text": ["a", None], "label": ["x", "y"]}


def test_rows_of_several_files_know_their_place(write):
    write("a.csv", "text\none\ntwo\n")
    write("b.csv", "text\n\nthree\n")
    table = read(*find_tables("*.csv", key="data.train"), columns=["text"])
    assert table.columns == {"text": ["one", "two", "three"]}
    assert [table.locate(row) for row in range(3)] == ["row 1 of 'a.csv'", "row 2 of 'a.csv'", "row 1 of 'b.csv'"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "text,label\n", ["'a.csv'", "none"]),
        ("a.jsonl", "\n", ["'a.jsonl'", "none"]),
        ("a.json", "[1]", ["'a.json'", "objects"]),
        ("a.csv", "text,label\na,x\nb,x,z\n", ["line 3 of 'a.csv'", "2 columns", "quotes"]),
        ("a.csv", "text,label\na\n", ["line 2 of 'a.csv'", "2 columns"]),
        ("a.csv", 'text,label\n"b,x\nc,y\n', ["'a.csv'", "unexpected end"]),
        ("a.csv", "txt,label\na,b\n", ["`data.text`", "'a.csv'", "Did you mean `txt`?"]),
        ("a.csv", b"text,label\n\xff,b\n", ["'a.csv'", "utf-8"]),
        ("a.json", "[1", ["'a.json'", "JSON"]),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text"}\n', ["line 2 of 'a.jsonl'", "JSON", "column 8"]),
        ("a.jsonl", b"\xff", ["'a.jsonl'", "UTF-8"]),
        ("a.parquet", "PAR1 but not really", ["'a.parquet'", "parquet"]),
    ],
)
def test_what_is_broken_is_named(write, name, content, words):
    with pytest.raises(ConfigError) as raised:
        read(write(name, content))
    assert [word for word in words if word.lower() not in str(raised.value).lower()] == []


def test_a_column_that_one_file_lacks_is_named(write):
    with pytest.raises(ConfigError, match=r"'b\.csv'"):
        read(write("a.csv", "text\none\n"), write("b.csv", "other\ntwo\n"), columns=["text"])


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
def test_what_python_writes_is_read_back(tmp_path, rows):
    columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
    path = tmp_path / "written.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    assert read(path).columns == columns
    path = tmp_path / "written.jsonl"
    path.write_text("".join(json.dumps({"text": t, "label": x}) + "\n" for t, x in rows))
    assert read(path).columns == columns


@pytest.mark.parametrize("given_name", [".", "a.xlsx", "*.*", "[bc].*"])
def test_what_is_no_table_is_refused_by_its_name(write, given_name):
    for name in ("a.xlsx", "b.csv", "c.tsv"):
        write(name, "")
    with pytest.raises(ConfigError) as raised:
        find_tables(given_name, key="data.test")
    assert "`data.test`" in str(raised.value)
    assert repr(given_name) in str(raised.value)


def test_path_glob_home_and_odd_name_are_found(write, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    for name in ("b.csv", "a.csv", "c.tsv", "odd[1].csv"):
        write(name, "")
    (folder / "sub.csv").mkdir()
    assert [path.name for path in find_files("*.csv", key="data.train")] == ["a.csv", "b.csv", "odd[1].csv"]
    assert [path.name for path in find_files("odd[1].csv", key="data.train")] == ["odd[1].csv"]
    assert find_files("~/a.csv", key="data.train") == [folder / "a.csv"]


@pytest.mark.parametrize(("name", "near"), [("reviws.csv", "reviews.csv"), ("*.parquet", None), ("no/a.csv", None)])
def test_file_that_does_not_exist_is_named_with_the_nearest(write, name, near):
    write("reviews.csv", "")
    with pytest.raises(ConfigError) as raised:
        find_files(name, key="data.train")
    assert "`data.train`" in str(raised.value)
    assert ("Did you mean" in str(raised.value)) is (near is not None)
    assert near is None or near in str(raised.value)


def refuse_b(text, group):
    if text == "b":
        raise ValueError("must not be b")
    return text


def test_unusable_rows_are_errors_of_a_file_and_skipped_in_a_hub_data_set():
    table = Table(columns={"text": ["a", "b", "b"]}, sources=[(0, "x")])
    with pytest.raises(ConfigError, match=r"^row 2 of 'x' must not be b.* 2 rows"):
        parse_rows(table, refuse_b)
    parsed, notes = parse_rows(Table(columns=table.columns, sources=table.sources, can_skip_rows=True), refuse_b)
    assert parsed == ["a"]
    assert notes == ["2 of 3 rows of 'x' are skipped. The first problem: row 2 of 'x' must not be b."]
