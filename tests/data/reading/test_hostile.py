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
from tests.fuzzing import NESTED, damage_bytes, damage_json, fuzz, refusal_allowed

from lorasweep.data.reading import read_source

ROWS = [{"text": f"text {number}, so", "label": number % 3, "group": f"g{number % 7}"} for number in range(30)]
CHATS = [
    {"messages": [{"role": "user", "content": f"q {number}"}, {"role": "assistant", "content": "a"}]}
    for number in range(30)
]
PAIRS = [
    {"chosen": chat["messages"], "rejected": [chat["messages"][0], {"role": "assistant", "content": "b"}]}
    for chat in CHATS
]
ARRAYS = st.sampled_from(
    [
        pyarrow.array([10**9, 5], pyarrow.int32()).cast(pyarrow.date32()),  # this and the next three: out of range
        pyarrow.array([2**62, 5]).cast(pyarrow.timestamp("us")),
        pyarrow.array([2**62, 5]).cast(pyarrow.timestamp("ms", tz="Europe/Nowhere")),
        pyarrow.array([2**62, 5]).cast(pyarrow.duration("s")),
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


def as_parquet(table, **options):
    file = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, file, **options)
    return file.getvalue().to_pybytes()


@st.composite
def damage_table(draw, kind, rows):
    """Draws the content of a table with damage: in its bytes, or in the values of up to three rows."""
    if kind in ("csv", "tsv", "txt"):
        lines = [["text", "label", "group"], *([f'"{row["text"]}"', str(row["label"]), row["group"]] for row in rows)]
        separator = "," if kind == "csv" else "\t"
        content = draw(damage_bytes("".join(f"{separator.join(line)}\n" for line in lines).encode()))
    elif kind == "parquet" and draw(st.booleans()):
        columns = {name: draw(ARRAYS) for name in rows[0]}
        content = as_parquet(pyarrow.table(columns), store_schema=draw(st.booleans()))
    elif kind == "parquet":
        content = draw(damage_bytes(as_parquet(pyarrow.Table.from_pylist(rows))))
    else:
        damaged = [draw(damage_json(row)) for row in draw(st.lists(st.sampled_from(rows), min_size=1, max_size=3))]
        damaged += draw(st.lists(st.sampled_from([NESTED, "[" * 900 + "]" * 900, "9" * 5000, "1e400"]), max_size=1))
        lines = [*map(json.dumps, rows), *damaged]
        text = "[" + ",\n".join(lines) + "]" if kind == "json" else "\n".join(lines)
        content = draw(st.one_of(st.just(text.encode()), damage_bytes(text.encode())))
    return content if kind == "parquet" else draw(compress_or_not(content))


@st.composite
def compress_or_not(draw, content):
    compressed = gzip.compress(content, mtime=0)
    return draw(st.sampled_from([content, compressed]) | damage_bytes(compressed))


TEXT = compress_or_not("Ein Satz, größer.\r\n\n".encode() * 50).flatmap(damage_bytes)
FUZZED = {kind: ("table", damage_table(kind, ROWS)) for kind in ("csv", "tsv", "txt", "jsonl", "json", "parquet")}
FUZZED |= {
    f"{name}.{kind}": (name, damage_table(kind, rows))
    for name, rows in (("chat", CHATS), ("preferences", PAIRS))
    for kind in ("jsonl", "parquet")
}
FUZZED |= {"text.txt": ("text", TEXT)}


@pytest.fixture(scope="module")
def configs():
    """Settings of each kind of data, without a file."""
    return {
        "table": [make_data("table", train="x", **more) for more in ({}, {"task": "regression"}, {"group": "group"})],
        "chat": [make_data("chat", train="x")],
        "preferences": [make_data("preferences", train="x")],
        "text": [make_data("text", train="x")],
    }


@fuzz
@given(data=st.data())
@pytest.mark.parametrize("kind", FUZZED)
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, configs, kind, data):
    config_name, contents = FUZZED[kind]
    config, content = data.draw(st.sampled_from(configs[config_name])), data.draw(contents)
    folder = tmp_path_factory.mktemp("damaged")  # `datasets` knows a file by its path and time, not by its content
    file = folder / f"a.{kind.rpartition('.')[2]}{'.gz' if content[:1] == bytes([31]) else ''}"
    file.write_bytes(content)
    with refusal_allowed(unchanged=folder):
        source = read_source(dataclasses.replace(config, train=str(file)))
        assert source.train
        assert source.test()
