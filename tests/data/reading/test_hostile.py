"""Hostile and damaged data files are read or refused in one sentence, in time and without filling the memory."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import gzip
import json
import os
import socket

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.conftest import make_data
from tests.fuzzing import FUZZ, NESTED, damage_bytes, damage_json, refusal_allowed

from lorasweep.data.read_source import read_source
from lorasweep.data.reading import bounded
from lorasweep.data.reading.tables import open_files
from lorasweep.errors import ConfigError

MEGABYTE = "x" * 1_000_000


def read(path, *names):
    return open_files([path]).read(names or ("text", "label"))


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, store_schema=False, compression="zstd")
    return path


def repeat(value, count):
    """An Arrow array that stores a text once and has it `count` times."""
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), pyarrow.array([value]))


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("data", ["table", "text"])
def test_a_pipe_a_socket_or_a_device_is_refused_unopened(folder, kind, data):
    if kind == "pipe":
        os.mkfifo(folder / "train.csv")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("train.csv")
    else:
        (folder / "train.csv").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=r"`data\.train` must name a file or folder, but 'train\.csv' is a pipe"):
        read_source(make_data(data, train="train.csv"))


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-has-this-name/a.csv", "a\0b.csv"])
def test_a_name_that_no_file_can_have_is_refused(folder, name):
    with pytest.raises(ConfigError, match=r"`data\.train` must name an existing file"):
        read_source(make_data("table", train=name))


@pytest.mark.parametrize("column", ["text", "list", "struct", "map"])
def test_a_parquet_file_whose_texts_expand_to_gigabytes_is_refused_before_they_do(folder, column):
    texts = repeat(MEGABYTE, 4000)
    columns = {
        "text": texts,
        "list": pyarrow.ListArray.from_arrays([0, 4000], texts),
        "struct": pyarrow.StructArray.from_arrays([texts], ["content"]),
        "map": pyarrow.MapArray.from_arrays([0, 4000], pyarrow.array(["a"] * 4000), texts),
    }
    path = write_parquet(folder / "a.parquet", text=columns[column], label=[1] * len(columns[column]))
    assert path.stat().st_size < 100_000
    with pytest.raises(ConfigError, match=r"at most 2,147,483,648 bytes .* but has 4,000,00.* Split it"):
        read(path)
    assert read(path, "label")


def test_a_parquet_file_whose_texts_share_long_prefixes_is_refused_before_they_expand(folder, monkeypatch):
    monkeypatch.setattr(bounded, "MAX_FILE_BYTES", 2**24)
    texts = [MEGABYTE + str(number % 2) for number in range(100)]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}),
        folder / "a.parquet",
        use_dictionary=False,
        column_encoding="DELTA_BYTE_ARRAY",
        compression="zstd",
    )
    with pytest.raises(ConfigError, match="at most 16,777,216 bytes"):
        read(folder / "a.parquet", "text")


def test_a_parquet_file_of_few_bytes_and_many_rows_is_refused(folder, monkeypatch):
    monkeypatch.setattr(bounded, "MAX_FILE_VALUES", 100_000)
    zeros = pyarrow.array([0]).take(pyarrow.array([0] * 100_001))
    for name, columns in (
        ("rows", {"text": zeros, "label": zeros}),
        ("lists", {"text": pyarrow.ListArray.from_arrays([0, 100_001], zeros), "label": [1]}),
    ):
        with pytest.raises(ConfigError, match=r"at most 100,000 values, but has .* Split it"):
            read(write_parquet(folder / f"{name}.parquet", **columns))


def test_a_parquet_file_of_long_fixed_values_is_refused(folder, monkeypatch):
    monkeypatch.setattr(bounded, "MAX_FILE_BYTES", 2**24)
    values = pyarrow.array([b"x" * 2**20], pyarrow.binary(2**20)).take(pyarrow.array([0] * 17))
    with pytest.raises(ConfigError, match="at most 16,777,216 bytes"):
        read(write_parquet(folder / "a.parquet", text=values), "text")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "start", "more"),
    [
        ("a.csv", b"text,label\n", b"a,b\n"),
        ("a.csv", b"text,label\n", b"x" * 1000),
        ("a.tsv", b"text\tlabel\n", b"\n"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n', b'{"text": "a"}\n'),
        ("a.jsonl", b'{"text": "a", "label": 1}\n', b"\n"),
        ("a.json", b'[{"text": "a", "label": 1}', b",{}"),
        ("a.json", b'[{"text": "', b"x" * 1000),
    ],
)
def test_a_text_table_that_expands_too_far_is_refused(write, monkeypatch, name, start, more, suffix):
    monkeypatch.setattr(bounded, "MAX_FILE_BYTES", 2**22)
    monkeypatch.setattr(bounded, "MAX_FILE_VALUES", 100_000)
    content = start + more * 100_001
    path = write(name + suffix, gzip.compress(content, 1) if suffix else content)
    with pytest.raises(ConfigError, match=rf"'{name}{suffix}' must have at most .*Split it into several files"):
        read(path)


def test_a_text_that_expands_too_far_is_refused(write, monkeypatch):
    monkeypatch.setattr(bounded, "MAX_FILE_BYTES", 2**22)
    write("a.txt.gz", gzip.compress(b"\n" * 2**22 + b"a"))
    with pytest.raises(ConfigError, match=r"'a\.txt\.gz' must have at most 4,194,304 bytes"):
        read_source(make_data("text", train="a.txt.gz"))
    write("a.txt.gz", gzip.compress(b"a\n" * 2**21))
    assert read_source(make_data("text", train="a.txt.gz")).train


def test_a_header_of_too_many_columns_is_refused(write):
    with pytest.raises(ConfigError, match="at most 10,000 columns"):
        read(write("a.csv", "," * 10_000))


OUT_OF_RANGE = {
    "date": pyarrow.array([10**9, 5], pyarrow.int32()).cast(pyarrow.date32()),
    "timestamp": pyarrow.array([2**62, 5]).cast(pyarrow.timestamp("us")),
    "time zone": pyarrow.array([2**62, 5]).cast(pyarrow.timestamp("ms", tz="Europe/Nowhere")),
    "duration": pyarrow.array([2**62, 5]).cast(pyarrow.duration("s")),
}


@pytest.mark.parametrize("kind", OUT_OF_RANGE)
def test_a_date_out_of_range_is_refused(folder, kind):
    table = pyarrow.table({"text": ["a", "b"], "label": OUT_OF_RANGE[kind]})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    with pytest.raises(ConfigError, match=r"'.*a\.parquet' must be a parquet file, but can't be read"):
        read(folder / "a.parquet")
    assert read(folder / "a.parquet", "text").columns == {"text": ["a", "b"]}


@pytest.mark.parametrize("label", [{"a": 1}, [["a"]], [None, {}], "\ud800", ["\ud800"]])
def test_a_label_that_is_no_text_or_number_is_refused_with_its_row(read, label):
    rows = [{"text": f"a{number}", "label": "xy"[number % 2]} for number in range(9)] + [{"text": "b", "label": label}]
    with pytest.raises(ConfigError, match=r"row 10 of 'train\.jsonl' must have texts"):
        read("table", {"train.jsonl": "\n".join(map(json.dumps, rows))})


@pytest.mark.parametrize("key", ["text", "group"])
def test_a_text_in_invalid_unicode_is_refused_with_its_row(read, key):
    rows = [{"text": f"a{number}", "label": "xy"[number % 2], "group": "g"} for number in range(9)]
    rows[3][key] = "a\udfff"
    with pytest.raises(ConfigError, match=r"row 4 of 'train\.jsonl' must have texts in valid Unicode"):
        read("table", {"train.jsonl": "\n".join(map(json.dumps, rows))}, group="group")


@pytest.mark.parametrize("number", ["1e308", "-1e300", "1" * 5000])
def test_a_number_too_large_to_learn_is_refused_under_regression(read, number):
    rows = "".join(f"a{number},{number / 2}\n" for number in range(9))
    with pytest.raises(ConfigError, match=r"finite number up to 1e\+18"):
        read("table", {"train.csv": f"text,label\n{rows}b,{number}\n"}, task="regression")


def test_a_number_of_5000_digits_may_be_the_name_of_a_class(read):
    rows = "".join(f"a{number},{'12'[number % 2] * 5000}\n" for number in range(30))
    assert [len(name) for name in read("table", {"train.csv": f"text,label\n{rows}"}).label_names] == [5000, 5000]


ROWS = [{"text": f"text {number}, so", "label": number % 3, "group": f"g{number % 7}"} for number in range(30)]
CHATS = [
    {"messages": [{"role": "user", "content": f"q {number}"}, {"role": "assistant", "content": "a"}]}
    for number in range(30)
]
ARRAYS = st.sampled_from(
    [
        *OUT_OF_RANGE.values(),
        pyarrow.array([["a"], [None]]),
        pyarrow.array([{"a": [1]}, {"a": []}]),
        pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int8())),
        pyarrow.array([decimal.Decimal("1" * 70), None], pyarrow.decimal256(76)),
        pyarrow.array([datetime.date(9999, 12, 31), None]),
        pyarrow.array([datetime.time(23), None]),
        pyarrow.array([b"a", b"\xff"]),
        pyarrow.array(["a", "b"], pyarrow.string_view()),
        pyarrow.array(["a", "b"]).dictionary_encode(),
        pyarrow.array([["a"], ["b"]], pyarrow.list_(pyarrow.string(), 1)),
        pyarrow.array([1, 2], pyarrow.float16()),
        pyarrow.array([float("nan"), float("inf")]),
        pyarrow.array([2**63, 2**64 - 1], pyarrow.uint64()),
        pyarrow.array([True, None]),
        pyarrow.nulls(2),
    ]
)


def as_delimited(separator):
    lines = [["text", "label", "group"], *([f'"{row["text"]}"', str(row["label"]), row["group"]] for row in ROWS)]
    return "".join(f"{separator.join(line)}\n" for line in lines).encode()


def as_parquet(rows):
    file = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue().to_pybytes()


@st.composite
def damage_table(draw, kind, rows):
    """Draws the content of a table with damage: in its bytes, or in the values of up to three rows."""
    if kind in ("csv", "tsv", "txt"):
        content = draw(damage_bytes(as_delimited("," if kind == "csv" else "\t")))
    elif kind == "parquet" and draw(st.booleans()):
        columns = {name: draw(ARRAYS) for name in rows[0]}
        file = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.table(columns), file, store_schema=draw(st.booleans()))
        content = file.getvalue().to_pybytes()
    elif kind == "parquet":
        content = draw(damage_bytes(as_parquet(rows)))
    else:
        damaged = [draw(damage_json(row)) for row in draw(st.lists(st.sampled_from(rows), min_size=1, max_size=3))]
        damaged += draw(st.lists(st.sampled_from([NESTED, "[" * 900 + "]" * 900, "9" * 5000, "1e400"]), max_size=1))
        lines = [*map(json.dumps, rows), *damaged]
        text = "[" + ",\n".join(lines) + "]" if kind == "json" else "\n".join(lines)
        content = draw(st.one_of(st.just(text.encode()), damage_bytes(text.encode())))
    if kind != "parquet" and draw(st.booleans()):
        compressed = gzip.compress(content, mtime=0)
        return f"a.{kind}.gz", draw(st.one_of(st.just(compressed), damage_bytes(compressed)))
    return f"a.{kind}", content


@pytest.mark.slow
@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("kind", ["csv", "tsv", "txt", "jsonl", "json", "parquet"])
def test_a_damaged_table_is_read_or_refused(tmp_path, configs, kind, data):
    config = data.draw(st.sampled_from(configs["table"]))
    name, content = data.draw(damage_table(kind, ROWS))
    read_damaged(tmp_path, config, name, content)


@pytest.mark.slow
@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_damaged_file_of_conversations_is_read_or_refused(tmp_path, configs, kind, data):
    name, content = data.draw(damage_table(kind, CHATS))
    read_damaged(tmp_path, configs["chat"][0], name, content)


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_a_damaged_text_is_read_or_refused(tmp_path, configs, data):
    content = data.draw(damage_bytes("Ein Satz, größer.\r\n\n".encode() * 50))
    if data.draw(st.booleans()):
        content = data.draw(damage_bytes(gzip.compress(content)))
    read_damaged(tmp_path, configs["text"][0], data.draw(st.sampled_from(["a.txt", "a.txt.gz"])), content)


@pytest.fixture(scope="module")
def configs():
    """Settings of each kind of data, without a file."""
    return {
        "table": [make_data("table", train="x", **more) for more in ({}, {"task": "regression"}, {"group": "group"})],
        "chat": [make_data("chat", train="x")],
        "text": [make_data("text", train="x")],
    }


def read_damaged(folder, config, name, content):
    for path in folder.iterdir():
        path.unlink()
    (folder / name).write_bytes(content)
    with refusal_allowed(unchanged=folder):
        source = read_source(dataclasses.replace(config, train=str(folder / name)))
        assert source.train
        assert source.test()
