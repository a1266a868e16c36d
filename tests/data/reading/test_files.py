"""Files of every kind are read as tables without a loss, and what is broken is named with its file and place."""

from __future__ import annotations

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorasweep.data.reading.files import find_files, find_tables, read_text
from lorasweep.data.reading.tables import open_files
from lorasweep.errors import ConfigError


def read(*paths, wanted=("text", "label"), **rules):
    return open_files(paths, **rules).read(wanted)


def rows_of(table):
    return list(zip(*table.columns.values(), strict=True))


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
        ("a.csv", '\ufeff"text","label"\n"é","x"\n', [("é", "x")]),
        ("a.csv", f"text,label\n{'x' * 200_000},y\n", [("x" * 200_000, "y")]),
        ("a.csv", "text,label\na,x,\nb,y,\n", [("a", "x"), ("b", "y")]),
        ("a.csv", "text,,label,\na,,x,\nb,,y,\n", [("a", "x"), ("b", "y")]),
        ("a.tsv", 'text\tlabel\n"open\tx\nsays "so"\ty\n', [('"open', "x"), ('says "so"', "y")]),
        ("a.txt", "\ufefflabel\ttext\r\n1\tso, and so\r\n\t \r\n", [("so, and so", "1"), (" ", "")]),
        (
            "a.jsonl",
            '{"text": "a\u2028", "label": 1}\n\n{"label": ["x"], "text": "b"}\n',
            [("a\u2028", 1), ("b", ["x"])],
        ),
        ("a.jsonl", '\ufeff{"text": "2020-01-01", "label": 1}\n{"text": "b"}', [("2020-01-01", 1), ("b", None)]),
        ("a.json", ' [{"text": "a", "label": 1},\n{"text": "b"}]', [("a", 1), ("b", None)]),
        ("A.CSV", "text,label\na,b\n", [("a", "b")]),
    ],
)
@pytest.mark.parametrize("is_compressed", [False, True])
def test_values_are_read_as_they_are_written(write, name, content, rows, is_compressed):
    path = write(f"{name}.gz", gzip.compress(content.encode())) if is_compressed else write(name, content)
    assert rows_of(read(path)) == rows


def test_parquet_reads_the_wanted_columns(folder):
    labels = pyarrow.array(["x", "y"]).dictionary_encode()
    table = pyarrow.table({"text": ["a", None], "other": [1, 2], "label": labels})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    assert read(folder / "a.parquet").columns == {"text": ["a", None], "label": ["x", "y"]}


@pytest.mark.parametrize(
    ("name", "content", "rules"),
    [
        ("news.csv", '"x","A title","so, and so"\n"01","","NA"\n', {}),
        ("news.csv", "\ufeffx;A title;so, and so\n01;;NA\n", {"delimiter": "semicolon"}),
        ("news.csv", "x|A title|so, and so\n01||NA\n", {"delimiter": "pipe"}),
        ("news.tsv", "x\tA title\tso, and so\n01\t\tNA\n", {}),
        ("news.txt", '"x"\t"A title"\t"so, and so"\n01\t\tNA\n', {"quoting": "csv"}),
        ("news.txt", 'x,A title,"so, and so"\n01,,NA\n', {"delimiter": "comma", "quoting": "csv"}),
    ],
)
def test_files_without_a_header_are_read_by_the_given_columns(write, name, content, rules):
    table = read(write(name, content), columns=["label", "title", "text"], **rules)
    assert table.columns == {"text": ["so, and so", "NA"], "label": ["x", "01"]}
    assert table.locate(0) == f"row 1 of {name!r}"
    assert not table.notes


@pytest.mark.parametrize(
    ("content", "rules", "count"),
    [
        ('text\tlabel\n"so ""it"" goes"\ty\nplain\tx\n"well"\tx\n', {}, 2),
        ('text\tlabel\n"so" he said\ty\n"well"\tx\n', {}, 0),  # quotes of direct speech
        ('text\tlabel\n"\ty\n"well"\tx\n', {}, 0),
        ('text\tlabel\n"well"\ty\n', {"quoting": "none"}, 0),
        ('text\tlabel\n"well"\ty\n', {"quoting": "csv"}, 0),
    ],
)
def test_texts_that_look_quoted_are_counted_with_what_to_do(write, content, rules, count):
    notes = read(write("a.txt", content), **rules).notes
    assert len(notes) == (count > 0)
    for note in notes:
        assert note.startswith(f"{count} texts of 'a.txt' look quoted")
        assert "`data.quoting=csv`" in note


def test_quotes_are_removed_where_the_setting_says_so(write):
    path = write("a.tsv", 'text\tlabel\n"a ""b""\tc"\tx\n')
    assert rows_of(read(path, quoting="csv")) == [('a "b"\tc', "x")]
    path = write("a.csv", 'text,label\n"open,x\n')
    assert rows_of(read(path, quoting="none")) == [('"open', "x")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "", ["'a.csv'", "No columns"]),
        ("a.csv", "text,label\n", ["'a.csv'", "none"]),
        ("a.jsonl", "\n", ["'a.jsonl'", "none"]),
        ("a.json", "[1]", ["'a.json'", "objects"]),
        ("a.csv", "text,label\na,x\nb,x,z\n", ["'a.csv'", "line 3", "2 fields", "quotes", "`data.delimiter`"]),
        ("a.csv", "text,label\nb,x,z\nc,x,z\n", ["'a.csv'", "row 1 has more", "2 fields"]),
        ("a.csv", "text,label\nb,x,z\nc,x\n", ["'a.csv'", "row 1 has more", "2 fields"]),
        ("a.csv", 'text,label\n"b,x\nc,y\n', ["'a.csv'", "EOF inside string", "`data.quoting`"]),
        ("a.csv", "txt,label\na,b\n", ["'a.csv'", "column 'text'", "['txt', 'label']"]),
        ("a.csv", b"text,label\n\xff,b\n", ["'a.csv'", "utf-8"]),
        ("a.csv.gz", "text,label\na,b\n", ["'a.csv.gz'", "gzip"]),
        ("a.csv.gz", gzip.compress(b"text,label\na,b\n", mtime=0)[:-9], ["'a.csv.gz'", "ended"]),
        ("a.json", "[1", ["'a.json'", "json"]),
        ("a.json", "[" * 100_000, ["'a.json'", "json"]),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text"}\n', ["line 2 of 'a.jsonl'", "JSON", "column 8"]),
        ("a.jsonl", b"\xff", ["'a.jsonl'", "UTF-8"]),
        ("a.jsonl.gz", '{"text": "a"}', ["'a.jsonl.gz'", "gzip"]),
        ("a.parquet", "PAR1 but not really", ["'a.parquet'", "parquet"]),
    ],
)
def test_what_is_broken_is_named(write, name, content, words):
    with pytest.raises(ConfigError) as raised:
        read(write(name, content))
    assert [word for word in words if word.lower() not in str(raised.value).lower()] == []


@pytest.mark.parametrize(
    ("name", "content", "rules", "words"),
    [
        ("a.csv", "text,label\na,x\n", {"columns": ["text", "label"]}, ["`data.columns` must be null", "'a.csv'"]),
        ("a.csv", "a,x,1\n", {"columns": ["text", "label"]}, ["`data.columns`", "3 fields", "['a', 'x', '1']"]),
        ("a.csv", "a;x\n", {"columns": ["text", "label"]}, ["`data.columns`", "['a;x']", "`data.delimiter`"]),
        ("a.csv", "a,x\nb,x,1\n", {"columns": ["text", "label"]}, ["2 fields", "line 2"]),
        ("a.jsonl", '{"text": "a"}', {"columns": ["text", "label"]}, ["`data.columns`", "'a.jsonl'"]),
        ("a.parquet", "", {"delimiter": "tab"}, ["`data.delimiter`", "'a.parquet'"]),
    ],
)
def test_settings_that_do_not_fit_the_file_are_refused(write, name, content, rules, words):
    with pytest.raises(ConfigError) as raised:
        read(write(name, content), **rules)
    assert [word for word in words if word not in str(raised.value)] == []


def test_a_column_that_one_file_lacks_is_named(write):
    with pytest.raises(ConfigError, match=r"'b\.csv'.*'text'.*\['other'\]"):
        read(write("a.csv", "text\none\n"), write("b.csv", "other\ntwo\n"), wanted=["text"])


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


@pytest.mark.parametrize("given_name", [".", "a.xlsx", "*.*", "[bc].*", "sms"])
def test_what_is_no_table_is_refused_by_its_name(write, given_name):
    for name in ("a.xlsx", "b.csv", "c.tsv", "sms"):
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


def test_compressed_texts_are_read_with_their_line_ends(write):
    assert read_text(write("a.txt.gz", gzip.compress("\ufeffä\r\nb\n".encode()))) == "ä\r\nb\n"
