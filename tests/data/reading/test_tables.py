"""Tables of every kind keep their values, and rows know their place."""

import csv
import functools
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.data.conftest import make_data

from lorasweep.data.reading.files import find_files
from lorasweep.data.reading.tables import choose_columns, open_tables, parse_rows
from lorasweep.errors import ConfigError

CHOOSE = functools.partial(choose_columns, [("text", "text"), ("label", "label")])


def open_table(path, *, choose=CHOOSE, **rules):
    return open_tables(make_data("table", train=str(path), **rules), choose)["train"]


def read(path, **rules):
    return parse_rows(open_table(path, **rules), lambda *values, group: values)[0]


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.csv", 'id,label,text\r\n1,x,"so,\nso"\r\n\r\n2,y,"a ""b"""\r\n', [("so,\nso", "x"), ('a "b"', "y")]),
        ("a.csv", "text,label\nNA,01\nnull,1.0\n", [("NA", "01"), ("null", "1.0")]),
        ("a.csv", "\ufefftext , label\né,x\n", [("é", "x")]),
        ("a.csv", '\ufeff"text","label"\n"é","x"\n', [("é", "x")]),
        ("a.csv", f"text,label\n{'x' * 200_000},y\n", [("x" * 200_000, "y")]),
        ("a.csv", "text,,label,\na,,x,\nb,,y,\n", [("a", "x"), ("b", "y")]),
        ("a.tsv", 'text\tlabel\n"open\tx\nsays "so"\ty\n', [('"open', "x"), ('says "so"', "y")]),
        ("a.txt", "\ufefflabel\ttext\r\n1\tso, and so\r\n\t \r\n", [("so, and so", "1"), (" ", "")]),
        ("a.jsonl", '{"text": "a\u2028", "label": 1}\n{"label": ["x"], "text": "b"}\n', [("a\u2028", 1), ("b", ["x"])]),
        ("a.jsonl", '\ufeff{"text": "2020-01-01", "label": 1}\n{"text": "b"}', [("2020-01-01", 1), ("b", None)]),
        (
            "a.jsonl",
            '{"text": "2020-01-01 00:00:00", "label": "1"}\n{"text": "b", "label": 0.1234567890123456}\n',
            [("2020-01-01 00:00:00", "1"), ("b", 0.1234567890123456)],
        ),
        ("a.json", '[{"text": "a", "label": 1},\n{"text": "b"}]', [("a", 1), ("b", None)]),
        ("a.json", '{"text": "a", "label": 1}\n{"text": "b"}', [("a", 1), ("b", None)]),
        ("A.CSV", "text,label\na,b\n", [("a", "b")]),
    ],
)
@pytest.mark.parametrize("is_compressed", [False, True])
def test_values_are_read_as_they_are_written(write, name, content, rows, is_compressed):
    path = write(f"{name}.gz", gzip.compress(content.encode())) if is_compressed else write(name, content)
    assert read(path) == rows


def test_parquet_reads_only_the_wanted_columns(folder):
    labels = pyarrow.array(["x", "y"]).dictionary_encode()
    dates = pyarrow.array([10**9, 5], pyarrow.int32()).cast(pyarrow.date32())  # the first is out of Python's range
    table = pyarrow.table({"text": ["a", None], "date": dates, "label": labels})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    assert read("a.parquet") == [("a", "x"), (None, "y")]
    with pytest.raises(ConfigError, match=r"'a\.parquet' must be a parquet file"):
        read("a.parquet", choose=lambda names, source: ["date"])


def test_names_of_classes_that_datasets_writes_into_parquet_are_read(folder):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = {"text": ["a", None, "b"], "label": [1, -1, None]}
    Dataset.from_dict(rows, features=features).to_parquet(folder / "a.parquet")
    assert read("a.parquet") == [("a", "yes"), (None, None), ("b", None)]


@pytest.mark.parametrize(
    ("name", "content", "rules"),
    [
        ("news.csv", '"x","A title","so, and so"\n"01","","NA"\n', {}),
        ("news.csv", "\ufeffx;A title;so, and so\n01;;NA\n", {"delimiter": "semicolon"}),
        ("news.csv", "x|A title|so, and so\n01||NA\n", {"delimiter": "pipe"}),
        ("news.tsv", "x\tA title\tso, and so\n01\t\tNA\n", {}),
        ("news.txt", 'x,A title,"so, and so"\n01,,NA\n', {"delimiter": "comma"}),
    ],
)
def test_files_without_a_header_are_read_by_the_given_columns(write, name, content, rules):
    path = write(name, content)
    assert read(path, columns=["label", "title", "text"], **rules) == [("so, and so", "x"), ("NA", "01")]


def test_a_csv_file_without_commas_in_its_first_line_has_semicolons(write):
    assert read(write("news.csv", "label;text\n1,5;a, b\n")) == [("a, b", "1,5")]
    assert read(write("news.csv", 'label,text\nx,"a; b"\n')) == [("a; b", "x")]


def test_row_is_named_by_its_file_and_number(write):
    def refuse(word, text, label, group):
        if text == word:
            raise ValueError(f"must not be {word}")

    write("a.csv", 'text,label,,\n"two\nlines",x,,\n\nthree,x,more,\n')
    write("b.csv", "text,label,\n\nfour,x,\n")
    assert read("*.csv") == [("two\nlines", "x"), ("three", "x"), ("four", "x")]
    for word, place in (("three", "row 2 of 'a"), ("four", "row 1 of 'b")):
        with pytest.raises(ConfigError, match=rf"^{place}\.csv' must not be {word}"):
            parse_rows(open_table("*.csv"), functools.partial(refuse, word))


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
def test_what_python_writes_is_read_back(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("written")
    with (folder / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    assert read(folder / "a.csv") == rows
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t, "label": x}) + "\n" for t, x in rows))
    assert read(folder / "a.jsonl") == rows


def test_path_glob_home_and_odd_name_are_found(write, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    for name in ("b.csv", "a.csv", "c.tsv", "odd[1].csv"):
        write(name, "text,label\na,b\n")
    (folder / "sub.csv").mkdir()
    assert [path.name for path in find_files("*.csv", key="data.train")] == ["a.csv", "b.csv", "odd[1].csv"]
    assert find_files("~/a.csv", key="data.train") == [folder / "a.csv"]
    assert read("odd[1].csv") == [("a", "b")]
