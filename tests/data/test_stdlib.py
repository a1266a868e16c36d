"""The split of the standard library: fixed by names, disjoint, with nothing of a held-out module in pre-training."""

import pytest

from lorasweep.data.stdlib import (
    assign_bucket,
    get_module_key,
    join_docstrings,
    read_code,
    read_docs,
    read_standard_library,
)


def test_bucket_of_a_key_is_fixed():
    # Stored values: were they to move, the embedded model would have been pre-trained on what it is tested on.
    assert [assign_bucket(key) for key in ("json", "asyncio", "lambda", "yield")] == [19, 45, 74, 74]


@pytest.mark.parametrize(
    "path", ["json/decoder.py", "test/test_json/test_dump.py", "_json.py", "json.py", "_pyjson.py"]
)
def test_module_twin_and_tests_are_split_together(path):
    assert get_module_key(path) == "json"


@pytest.mark.parametrize("read", [read_docs, read_code])
def test_parts_are_disjoint_and_not_empty(read):
    splits = [{document.name for document in read(split)} for split in ("train", "validation", "test")]
    assert all(splits)
    assert len(set.union(*splits)) == sum(map(len, splits))


def test_docs_parts_hold_every_topic():
    names = {document.name for split in ("train", "validation", "test") for document in read_docs(split)}
    assert {"assert", "lambda", "yield"} <= names


def test_tests_of_held_out_modules_are_not_pretrained_on():
    pretrained = {get_module_key(document.name) for document in read_code("pretraining")}
    held_out = {
        get_module_key(document.name) for split in ("train", "validation", "test") for document in read_code(split)
    }
    assert pretrained.isdisjoint(held_out)


def test_documents_have_text_and_come_in_order():
    documents = list(read_standard_library(with_tests=False))
    assert all(document.text for document in documents)
    assert not any("/tests/" in document.name or document.name.startswith("test/") for document in documents)
    assert [document.name for document in documents] == [
        document.name for document in read_standard_library(with_tests=False)
    ]


def test_docstrings_are_in_the_split_of_their_file():
    for split in ("train", "validation", "test"):
        files = {document.name for document in read_code(split)}
        assert {document.name for document in read_docs(split) if document.name.endswith(".py")} <= files


def test_docstrings_come_in_the_order_of_the_file():
    code = '"""Module."""\nclass A:\n    """Class."""\n    def f(self):\n        """Method."""\n'
    assert join_docstrings(code) == "Module.\n\nClass.\n\nMethod."
    assert join_docstrings("def broken(:") == ""
