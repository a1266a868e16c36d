"""The split of the standard library: fixed by names, disjoint, with nothing of a held-out module in pre-training."""

import pytest
from tests.data.conftest import make_data

from lorasweep.tasks.task import read_source
from lorasweep.tasks.text.stdlib import assign_bucket, get_module_key, read_code, read_docs
from lorasweep.training.inputs import load_inputs


def test_bucket_of_a_key_is_fixed_and_module_twin_and_tests_are_split_together():
    assert [assign_bucket(key) for key in ("json", "asyncio", "lambda", "yield")] == [19, 45, 74, 74]
    paths = ["json/decoder.py", "test/test_json/test_dump.py", "_json.py", "json.py", "_pyjson.py"]
    assert {get_module_key(path) for path in paths} == {"json"}


@pytest.mark.parametrize("read", [read_docs, read_code])
def test_parts_are_disjoint_and_not_empty(read):
    splits = [{document.name for document in read(split)} for split in ("train", "validation", "test")]
    assert all(splits)
    assert len(set.union(*splits)) == sum(map(len, splits))


def test_tests_of_held_out_modules_are_not_pretrained_on():
    pretrained = {get_module_key(document.name) for document in read_code("pretraining")}
    held_out = {get_module_key(found.name) for split in ("train", "validation", "test") for found in read_code(split)}
    assert pretrained.isdisjoint(held_out)


def test_embedded_text_comes_as_documents_in_its_own_splits():
    source = read_source(make_data("stdlib_docs"))
    assert (source.label_kind, source.label_names, source.notes) == (None, (), ())
    assert source.train.items == list(read_docs("train"))
    assert source.test().items == list(read_docs("test"))
    assert source.test() is source.test()


def test_a_share_of_the_training_documents_is_whole_and_contains_every_smaller_share(make_config):
    def list_documents(limit):
        splits = load_inputs(make_config({"data": "stdlib_docs", "data.max_train_documents": limit})).splits
        return splits, {*splits.train.groups}

    (whole, everything), (half, some), (quarter, few) = map(list_documents, (None, 8, 4))
    assert few < some < everything
    assert (len(few), half.train.facts["documents"], quarter.train.facts["documents"]) == (4, 8, 4)
    assert len({one.train.fingerprint for one in (whole, half, quarter)}) == 3
    assert whole.validation.fingerprint == quarter.validation.fingerprint
    assert whole.test().groups == quarter.test().groups
