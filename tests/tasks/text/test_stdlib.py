"""The split of the standard library: fixed by names, disjoint, with nothing of a held-out module in pre-training."""

import pytest
from write_stdlib import NUM_PRETRAINING_BUCKETS, assign_bucket, get_module_key

from lorasweep.tasks.text.stdlib import read_stdlib
from lorasweep.training.inputs import load_inputs


def test_bucket_of_a_key_is_fixed_and_module_twin_and_tests_are_split_together():
    assert [assign_bucket(key) for key in ("json", "asyncio", "lambda", "yield")] == [19, 45, 74, 74]
    paths = ["json/decoder.py", "test/test_json/test_dump.py", "_json.py", "json.py", "_pyjson.py"]
    assert {get_module_key(path) for path in paths} == {"json"}


@pytest.mark.parametrize("name", ["stdlib_docs", "stdlib_code"])
def test_parts_are_disjoint_and_not_empty(name):
    source = read_stdlib(name)
    splits = [{document.name for document in split.items} for split in (source.train, source.validation, source.test())]
    assert all(splits)
    assert len(set.union(*splits)) == sum(map(len, splits))


def test_no_packaged_module_was_pretrained_on():
    source = read_stdlib("stdlib_code")
    names = [document.name for split in (source.train, source.validation, source.test()) for document in split.items]
    assert all(assign_bucket(get_module_key(name)) >= NUM_PRETRAINING_BUCKETS for name in names)


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
