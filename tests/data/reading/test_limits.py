"""Files that no reader would end with in time are refused before they are read."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

import lorasweep.data.reading.limits as limits
from lorasweep.data.reading.limits import check_content
from lorasweep.errors import ConfigError


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
        check_content(path, suffix=path.suffix, separator="," if path.suffix == ".csv" else "")
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(content.encode()))
    with pytest.raises(ConfigError, match=words):
        check_content(packed, suffix=path.suffix, separator="," if path.suffix == ".csv" else "")


def test_what_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MIN_UNPACKED_BYTES", 2**16)
    packed, table = tmp_path / "bomb.jsonl.gz", tmp_path / "bomb.parquet"
    packed.write_bytes(gzip.compress(b'{"a": 1}\n' * 2**20))
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x" * 100] * 2**16}), table, use_dictionary=False)
    wide = tmp_path / "wide.parquet"
    pyarrow.parquet.write_table(pyarrow.table({str(n): [1] for n in range(10_001)}), wide)
    repeated = tmp_path / "repeated.parquet"  # its metadata counts the text once
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x" * 2**10] * 2**12}), repeated)
    assert repeated.stat().st_size < 2**13
    for path, suffix in ((packed, ".jsonl"), (table, ".parquet"), (repeated, ".parquet")):
        with pytest.raises(ConfigError, match="must unpack to at most"):
            check_content(path, suffix=suffix)
    with pytest.raises(ConfigError, match="at most 10,000 columns"):
        check_content(wide, suffix=".parquet")


def test_what_is_large_but_usual_is_read(tmp_path):
    path = tmp_path / "usual.json"
    path.write_text(json.dumps([{"text": "x" * 1000}] * 11_000))  # one line of 11 MB
    check_content(path, suffix=".json")
    path = tmp_path / "usual.csv"
    path.write_text(csv_of(10_000) * 3)
    check_content(path, suffix=".csv", separator=",")
    path.write_text("a,b\n1,2\n", encoding="utf-16")  # the reader says how to convert it
    check_content(path, suffix=".csv", separator=",")
