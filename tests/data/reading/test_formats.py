"""Each format gives its rows and their places, and what is broken is named by line and column, never by a traceback."""

from __future__ import annotations

import contextlib
import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorasweep.data.reading.formats import READERS
from lorasweep.data.reading.tables import require_column
from lorasweep.errors import ConfigError


def read(path, columns=("text", "label")):
    def choose(names, place):
        return [require_column(name, names, key=f"data.{name}", place=place) for name in columns]

    records = READERS[path.suffix](path, choose)
    return [(number, *values) for number, values in records.records]


@pytest.fixture
def write(folder):
    def write_file(name, content):
        path = (folder / name).relative_to(folder)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def test_csv_has_quotes_line_breaks_and_blank_lines(write):
    path = write("a.csv", 'id,label,text\r\n1,x,"so, and\nso"\r\n\r\n2,y,"a ""b"""\r\n')
    assert read(path) == [(2, "so, and\nso", "x"), (5, 'a "b"', "y")]


def test_texts_that_look_missing_or_like_numbers_stay_texts(write):
    assert read(write("a.csv", "text,label\nNA,01\nnull,1.0\n")) == [(2, "NA", "01"), (3, "null", "1.0")]


def test_quotes_of_a_tsv_are_ordinary_characters(write):
    path = write("a.tsv", 'text\tlabel\n"open\tx\nsays "so"\ty\n')
    assert read(path) == [(2, '"open', "x"), (3, 'says "so"', "y")]


def test_names_of_columns_lose_white_space_around_them(write):
    assert read(write("a.csv", "text , label\na,x\n")) == [(2, "a", "x")]


def test_field_longer_than_python_would_take_is_read(write):
    before = csv.field_size_limit()
    assert len(read(write("a.csv", f"text,label\n{'x' * 300_000},y\n"))[0][1]) == 300_000
    assert csv.field_size_limit() == before


def test_jsonl_has_types_and_null_for_a_missing_key(write):
    path = write("a.jsonl", '{"text": "a", "label": 1}\n\n{"label": ["x"], "text": "b", "more": 0}\n{"text": "c"}\n')
    assert read(path) == [(1, "a", 1), (3, "b", ["x"]), (4, "c", None)]


@pytest.mark.parametrize(
    "content", ['[{"text": "a", "label": 1},\n{"text": "b"}]', ' \n[{"text":"a","label":1},{"text":"b"}]']
)
def test_json_may_be_one_array(write, content):
    assert read(write("a.json", content)) == [(1, "a", 1), (2, "b", None)]


def test_json_may_be_lines(write):
    assert read(write("a.json", '{"text": "a", "label": 1}\n')) == [(1, "a", 1)]


def test_parquet_reads_the_wanted_columns(folder):
    table = pyarrow.table(
        {"text": ["a", None], "other": [1, 2], "label": pyarrow.array(["x", "y"]).dictionary_encode()}
    )
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    assert read(folder / "a.parquet") == [(1, "a", "x"), (2, None, "y")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", r"'a.csv' must have a first line with the names of its columns, but is empty."),
        ("a.csv", "\n\n", r"'a.csv' must have a first line with the names of its columns, but is empty."),
        (
            "a.csv",
            "text,label\na,x\nb,x,z\n",
            r"line 3 of 'a.csv' must have 2 columns as the header has, but has 3. Put",
        ),
        ("a.csv", "text,label\na\n", "line 2 of 'a.csv' must have 2 columns as the header has, but has 1."),
        ("a.tsv", "text\tlabel\na\tx\tz\n", "line 2 of 'a.tsv' must have 2 columns .* quotes mean nothing"),
        (
            "a.csv",
            'text,label\na,x\n"b,x\nc,y\n',
            "the row of line 3 of 'a.csv' does not. Write a quote inside of a text twice.",
        ),
        ("a.csv", 'text,label\n"a"b,x\n', "line 2 of 'a.csv' must be a row of a csv file, but has this: "),
        ("a.csv", "text,label\ra,x\r", "line 1 of 'a.csv' must be a row of a csv file, but has this: new-line"),
        ("a.csv", "text,label,text\n", "the columns of 'a.csv' must have different names, but 'text' is there twice."),
        (
            "a.csv",
            "txt,label\n",
            r"`data.text` must be a column of 'a.csv', but got 'text'. Did you mean `txt`\? Its col",
        ),
        ("a.jsonl", "", "'a.jsonl' must have rows, but is empty."),
        ("a.jsonl", "\n \n", "'a.jsonl' must have rows, but is empty."),
        ("a.json", "", "'a.json' must have rows, but is empty."),
        ("a.json", "[]", "'a.json' must have rows, but is empty."),
        ("a.json", "[1]", r"row 1 of 'a.json' must be a JSON object such as .*, but is 1."),
        ("a.json", "[1", r"'a.json' must be JSON, but has this: .* \(line 1, column 3 of it\)"),
        ("a.jsonl", '{"text": "a"}\n', "`data.label` must be a column of 'a.jsonl', but got 'label'. Its columns are"),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text"}\n',
            r"line 2 of 'a.jsonl' must be JSON, but has this: .* column 8",
        ),
        ("a.jsonl", '{"text": "a", "label": 1}\n[1]\n', r"line 2 of 'a.jsonl' must be a JSON object .*, but is \[1\]."),
        (
            "a.jsonl",
            '{"text": "\\ud800", "label": 1}\n',
            "line 1 of 'a.jsonl' must be valid Unicode, but has half of a surr",
        ),
        (
            "a.jsonl",
            '{"text": "\\uDC00", "label": 1}\n',
            "line 1 of 'a.jsonl' must be valid Unicode, but has half of a surr",
        ),
        ("a.jsonl", "[" * 200_000, "line 1 of 'a.jsonl' must be JSON"),
        ("a.jsonl", "1" * 5000, "line 1 of 'a.jsonl' must be JSON that Python can read"),
        ("a.parquet", "PAR1 but not really", "'a.parquet' must be a parquet file, but can't be read: "),
        ("a.parquet", "", "'a.parquet' must be a parquet file, but can't be read: "),
    ],
)
def test_what_is_broken_is_named(write, name, content, message):
    with pytest.raises(ConfigError, match=message):
        read(write(name, content))


def test_surrogates_that_are_a_pair_are_one_character(write):
    assert read(write("a.jsonl", '{"text": "\\ud83d\\ude00", "label": 1}')) == [(1, "😀", 1)]


def test_parquet_with_twice_a_column_is_named(folder):
    table = pyarrow.table([[1], [2]], names=["text", "text"])
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    with pytest.raises(ConfigError, match=r"must have different names, but 'text' is there twice."):
        read(folder / "a.parquet")


def test_parquet_with_broken_text_is_named(folder):
    broken = pyarrow.array([b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": broken, "label": ["x"]}), folder / "a.parquet")
    with pytest.raises(ConfigError, match=r"a.parquet' must be a parquet file, but can't be read: 'utf-8' codec"):
        read(folder / "a.parquet")


PIECES = st.sampled_from(
    [b"text", b"label", b",", b"\t", b'"', b"\n", b"\r", b"{", b"}", b"[", b":", b"\\ud800", b"NaN", b"1e999", b"null"]
)
GARBAGE = st.lists(st.one_of(PIECES, st.binary(max_size=4)), max_size=40).map(b"".join)
HEADERS = st.sampled_from([b"", b"text,label\n", b"text\tlabel\n", b'{"text": "a", "label": 1}\n'])


@pytest.mark.parametrize("suffix", sorted(READERS))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(header=HEADERS, garbage=GARBAGE)
def test_garbage_gives_rows_or_a_config_error(tmp_path, suffix, header, garbage):
    path = tmp_path / f"garbage{suffix}"
    path.write_bytes(header + garbage)
    with contextlib.suppress(ConfigError):
        json.dumps(read(path))  # plain Python all through


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damaged_parquet_gives_rows_or_a_config_error(tmp_path, data):
    path = tmp_path / "damaged.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": ["x", "y"]}), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    with contextlib.suppress(ConfigError):
        read(path)


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
def test_what_python_writes_is_read_back(tmp_path, rows):
    path = tmp_path / "written.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    assert [values for _, *values in read(path)] == [list(row) for row in rows]
    path = tmp_path / "written.jsonl"
    path.write_text("".join(json.dumps({"text": t, "label": x}) + "\n" for t, x in rows))
    assert [values for _, *values in read(path)] == [list(row) for row in rows]
