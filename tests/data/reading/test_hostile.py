"""Damaged data files are read or refused in one sentence, in time and without a file left behind."""

import dataclasses
import datetime
import decimal
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.conftest import make_data
from tests.fuzzing import FUZZ, NESTED, damage_bytes, damage_json, refusal_allowed

from lorasweep.data.reading import read_source
from lorasweep.errors import ConfigError


@pytest.mark.parametrize("label", [{"a": 1}, [["a"]], [None, {}]])
def test_a_label_that_is_no_text_or_number_is_refused_with_its_row(read, label):
    rows = [{"text": f"a{number}", "label": "xy"[number % 2]} for number in range(9)] + [{"text": "b", "label": label}]
    with pytest.raises(ConfigError, match=r"row 10 of 'train\.jsonl' must have texts"):
        read("table", {"train.jsonl": "\n".join(map(json.dumps, rows))})


@pytest.mark.parametrize("number", ["1e308", "-1e300", "1" * 5000])
def test_a_number_too_large_to_learn_is_refused_under_regression(read, number):
    rows = "".join(f"a{number},{number / 2}\n" for number in range(9))
    with pytest.raises(ConfigError, match=r"finite number up to 1e\+18"):
        read("table", {"train.csv": f"text,label\n{rows}b,{number}\n"}, task="regression")


OUT_OF_RANGE = {
    "date": pyarrow.array([10**9, 5], pyarrow.int32()).cast(pyarrow.date32()),
    "timestamp": pyarrow.array([2**62, 5]).cast(pyarrow.timestamp("us")),
    "time zone": pyarrow.array([2**62, 5]).cast(pyarrow.timestamp("ms", tz="Europe/Nowhere")),
    "duration": pyarrow.array([2**62, 5]).cast(pyarrow.duration("s")),
}


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
def test_a_damaged_table_is_read_or_refused(tmp_path_factory, configs, kind, data):
    config = data.draw(st.sampled_from(configs["table"]))
    name, content = data.draw(damage_table(kind, ROWS))
    read_damaged(tmp_path_factory, config, name, content)


@pytest.mark.slow
@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_damaged_file_of_conversations_is_read_or_refused(tmp_path_factory, configs, kind, data):
    name, content = data.draw(damage_table(kind, CHATS))
    read_damaged(tmp_path_factory, configs["chat"][0], name, content)


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_a_damaged_text_is_read_or_refused(tmp_path_factory, configs, data):
    content = data.draw(damage_bytes("Ein Satz, größer.\r\n\n".encode() * 50))
    if data.draw(st.booleans()):
        content = data.draw(damage_bytes(gzip.compress(content)))
    read_damaged(tmp_path_factory, configs["text"][0], data.draw(st.sampled_from(["a.txt", "a.txt.gz"])), content)


@pytest.fixture(scope="module")
def configs():
    """Settings of each kind of data, without a file."""
    return {
        "table": [make_data("table", train="x", **more) for more in ({}, {"task": "regression"}, {"group": "group"})],
        "chat": [make_data("chat", train="x")],
        "text": [make_data("text", train="x")],
    }


def read_damaged(tmp_path_factory, config, name, content):
    folder = tmp_path_factory.mktemp("damaged")  # `datasets` knows a file by its path and time, not by its content
    (folder / name).write_bytes(content)
    with refusal_allowed(unchanged=folder):
        source = read_source(dataclasses.replace(config, train=str(folder / name)))
        assert source.train
        assert source.test()
