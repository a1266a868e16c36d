"""Files that no reader would end with in time are refused where they break a limit."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from tests.data.conftest import make_data

import lorasweep.data.reading.files as files
from lorasweep.data.reading.local import read_file
from lorasweep.errors import ConfigError


def read(path):
    """Reads all columns of a file."""
    return read_file(path, make_data("table", train="x"), lambda names, source: names)


def csv_of(columns):
    return ",".join(f"c{number}" for number in range(columns)) + "\n" + ",".join("1" * columns) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("wide.csv", csv_of(10_001), "at most 10,000 columns"),
        ("wide.jsonl", json.dumps(dict.fromkeys(map(str, range(10_001)))) + "\n", "at most 10,000 columns"),
        ("new.jsonl", "".join(f'{{"{row}": 1}}\n' for row in range(10_001)), "at most 10,000 columns"),
        ("long.csv", "a,b\n1," + "x" * 11 * 2**20 + "\n", "lines of at most 10 MiB"),
        ("long.txt", "x " * 6 * 2**20, "lines of at most 10 MiB"),
        ("nul.jsonl", "\0" * 100, "a NUL character"),
    ],
)
def test_a_file_beyond_a_limit_is_refused(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        read(path)
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(content.encode()))
    with pytest.raises(ConfigError, match=words):
        read(packed)


def test_what_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MIN_UNPACKED_BYTES", 2**16)
    packed, table = tmp_path / "bomb.jsonl.gz", tmp_path / "bomb.parquet"
    packed.write_bytes(gzip.compress(b'{"a": 1}\n' * 2**20))
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x" * 100] * 2**16}), table, use_dictionary=False)
    wide = tmp_path / "wide.parquet"
    pyarrow.parquet.write_table(pyarrow.table({str(n): [1] for n in range(10_001)}), wide)
    repeated = tmp_path / "repeated.parquet"  # its metadata counts the text once
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x" * 2**10] * 2**12}), repeated)
    assert repeated.stat().st_size < 2**13
    for path in (packed, table, repeated):
        with pytest.raises(ConfigError, match="must unpack to at most"):
            read(path)
    with pytest.raises(ConfigError, match="at most 10,000 columns"):
        read(wide)


def test_what_is_large_but_usual_is_read(tmp_path):
    path = tmp_path / "usual.json"
    path.write_text(json.dumps([{"text": "x" * 1000}] * 11_000))  # one line of 11 MB
    assert len(read(path).columns["text"]) == 11_000
    path = tmp_path / "usual.csv"
    path.write_text(csv_of(10_000) * 3)
    assert len(read(path).columns) == 10_000
    path.write_text("a,b\n1,2\n", encoding="utf-16")
    with pytest.raises(ConfigError, match=r"line 1 is not. Convert it, perhaps by `iconv -f utf-16"):
        read(path)
