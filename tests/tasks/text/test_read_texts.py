"""Files and folders become documents, and the ends of few documents are split off where lines end."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasweep.tasks.text.read import Document, cut_document

LINES = [f"line {n} of a text that goes on\n" for n in range(200)]


def names_of(split):
    return [document.name for document in split.items]


def text_of(split):
    return "".join(document.text for document in split.items)


def test_folder_is_every_file_below_it_but_hidden_ones(read):
    files = {
        "books/b.txt": "b",
        "books/a/z.md": "z",
        "books/.git/x": "x",
        "books/.hidden": "x",
        "books/a.txt": "a\r\nb",
    }
    source = read("text", files, train="books", validation="books/b.txt", test="books/a")
    assert names_of(source.train) == ["a/z.md", "a.txt", "b.txt"]
    assert source.train.items[1].text == "a\nb"
    assert (names_of(source.validation), names_of(source.test())) == (["b.txt"], ["z.md"])
    source = read("text", {}, train="books/**/*.txt", validation="books/b.txt", test="books/a/z.md")
    assert names_of(source.train) == ["a.txt", "b.txt"]


def test_many_documents_are_split_by_their_content(read):
    source = read("text", {f"books/{n}": f"book {n}" for n in range(100)}, train="books")
    splits = [set(names_of(split)) for split in (source.train, source.validation, source.test())]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 100
    assert any("whose text has a hash" in note for note in source.notes)


@pytest.mark.parametrize(("fraction", "start", "middle"), [(None, 80, 90), (0.3, 60, 70)])
def test_end_of_one_document_is_split_off_where_lines_end(read, fraction, start, middle):
    source = read("text", {"train.txt": "".join(LINES)}, test_fraction=fraction)
    splits = [text_of(split) for split in (source.train, source.validation, source.test())]
    assert "".join(splits) == "".join(LINES)
    size, line = len("".join(LINES)) / 100, len(LINES[-1])
    assert [*map(len, splits)] == pytest.approx([start * size, 10 * size, (100 - middle) * size], abs=2 * line)
    assert all(text.startswith("line ") for text in splits)
    assert f"between {start} % and {middle} % of each of its 1 documents" in source.notes[0]
    assert f"between {middle} % and 100 %" in source.notes[1]


@pytest.mark.parametrize("given_split", ["validation", "test"])
def test_one_split_that_is_missing_gets_the_last_tenth(read, given_split):
    source = read("text", {"train.txt": "".join(LINES), f"{given_split}.txt": "so"})
    split_off = source.test() if given_split == "validation" else source.validation
    assert text_of(source.train) + text_of(split_off) == "".join(LINES)
    assert len(text_of(split_off)) == pytest.approx(0.1 * len("".join(LINES)), abs=2 * len(LINES[-1]))


@given(
    text=st.text(st.sampled_from("ab \n"), max_size=300), bounds=st.lists(st.integers(1, 99), unique=True, max_size=3)
)
def test_stretches_of_a_document_make_it_up(text, bounds):
    marks = [0, *sorted(bounds), 100]
    document = Document(name="x", text=text)
    pieces = [cut_document(document, low=low, high=high).text for low, high in itertools.pairwise(marks)]
    assert "".join(pieces) == text
