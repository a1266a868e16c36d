"""Lines come out as they are, and a file that is no text is named with the place, in little memory."""

from __future__ import annotations

import codecs
import resource

import pytest

from lorasweep.data.reading import files as files_room
from lorasweep.data.reading.files import find_files, read_lines
from lorasweep.errors import ConfigError


def write(folder, content, name="file.txt"):
    path = folder / name
    path.write_bytes(content)
    return path


def test_lines_keep_their_ends(tmp_path):
    assert list(read_lines(write(tmp_path, b"one\r\ntwo\n\nlast"))) == ["one\r\n", "two\n", "\n", "last"]


def test_byte_order_mark_of_utf8_is_left_out(tmp_path):
    assert list(read_lines(write(tmp_path, codecs.BOM_UTF8 + "é\n".encode()))) == ["é\n"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_other_unicode_is_named(tmp_path, encoding):
    with pytest.raises(ConfigError, match=f"must be text in UTF-8, but is {encoding.upper()}. Save the file as UTF-8."):
        list(read_lines(write(tmp_path, "text".encode(encoding))))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"fine\nbr\xf6ken\n", r"line 2 of '.*file.txt' must be text in UTF-8, but its byte 3 is 0xf6."),
        (b"fine\n\n\xff", r"line 3 of '.*file.txt' must be text in UTF-8, but its byte 1 is 0xff."),
        (b"cut \xe2\x82\n", r"line 1 of .* its byte 5 is 0xe2."),
        (b"\n\0\n", r"line 2 of '.*file.txt' must be text in UTF-8, but has a NUL byte."),
    ],
)
def test_broken_text_is_named_by_line_and_byte(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        list(read_lines(write(tmp_path, content)))


def test_line_of_absurd_length_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "huge.txt"
    with path.open("wb") as file:
        file.write(b"fine\n")
        file.truncate(2 * 2**30)  # a hole of 2 GB, which takes no disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=r"line 2 of '.*huge.txt' must have at most 64 MB, but has more."):
        list(read_lines(path))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300 * 2**10  # KB: the 64 MB that were read, twice while they grow, and what the process rounds up


def test_longest_line_that_is_allowed_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files_room, "MAX_LINE_BYTES", 4)
    assert list(read_lines(write(tmp_path, b"abc\nabcd"))) == ["abc\n", "abcd"]
    with pytest.raises(ConfigError, match="line 1"):
        list(read_lines(write(tmp_path, b"abcd\n")))


def test_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="must be a file, but is a folder or something else"):
        list(read_lines(tmp_path))


def test_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = write(tmp_path, b"text")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)  # chmod does not keep root out
    with pytest.raises(ConfigError, match=r"must be a file that can be read, but: Permission denied."):
        list(read_lines(path))


def test_path_glob_and_odd_name_are_found(folder):
    for name in ("b.csv", "a.csv", "c.tsv", "odd[1].csv"):
        (folder / name).touch()
    (folder / "sub.csv").mkdir()
    assert [path.name for path in find_files("*.csv", key="data.train")] == ["a.csv", "b.csv", "odd[1].csv"]
    assert [path.name for path in find_files("odd[1].csv", key="data.train")] == ["odd[1].csv"]
    assert [path.name for path in find_files("a.csv", key="data.train")] == ["a.csv"]


def test_home_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    (folder / "a.csv").touch()
    assert find_files("~/a.csv", key="data.train") == [folder / "a.csv"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "reviws.csv",
            r"`data.train` must name a file that is there, but got 'reviws.csv'. Did you mean `reviews.csv`?",
        ),
        ("nothing", r"`data.train` must name a file that is there, but got 'nothing'.$"),
        ("*.parquet", r"must name a file that is there, but got '\*.parquet'.$"),
        ("no/reviews.csv", r"but got 'no/reviews.csv'. There is no folder 'no'."),
        ("a\0b", "`data.train` must name a file"),
        ("x" * 5000, "`data.train` must name a file"),
    ],
)
def test_file_that_is_not_there_is_named_with_the_nearest(folder, given, message):
    (folder / "reviews.csv").touch()
    with pytest.raises(ConfigError, match=message):
        find_files(given, key="data.train")
