"""A fingerprint moves with everything that a run would see differently, and with nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasweep.data.source import assign_splits, collect_examples, content_key
from lorasweep.errors import ConfigError
from lorasweep.tasks.chat.read import Conversation, Message
from lorasweep.tasks.table.read import LabelledText
from lorasweep.tasks.text.read import Document


def fingerprint(items):
    return collect_examples("train", list(items)).fingerprint


HI, HELLO = Message("user", "hi"), Message("assistant", "hello")
VARIANTS = [
    [LabelledText("a", None, 0), LabelledText("b", None, 1)],
    [LabelledText("b", None, 1), LabelledText("a", None, 0)],
    [LabelledText("a", None, 1), LabelledText("b", None, 0)],
    [LabelledText("a", None, 0.0), LabelledText("b", None, 1.0)],
    [LabelledText("a", "", 0), LabelledText("b", "x", 1)],
    [LabelledText("ab", None, 0), LabelledText("", None, 1)],  # the same characters, cut elsewhere
    [Conversation([HI, HELLO])],
    [Conversation([HI]), Conversation([HELLO])],
    [Conversation([HELLO, HI])],
    [Conversation([HI, Message("assistant", "hell")])],
    [Conversation([Message("system", "hi"), HELLO])],
]


def test_fingerprint_moves_with_every_text_label_role_end_and_order():
    assert len(set(map(fingerprint, VARIANTS))) == len(VARIANTS)
    assert fingerprint(VARIANTS[0]) == fingerprint(list(VARIANTS[0]))
    assert fingerprint([Document("one", "añb"), Document("two", "")]) == "1f8cabf312d16b81"


KEYS = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5), min_size=3, max_size=60)
MISSING = st.sampled_from([{"validation": 10}, {"test": 50}, {"validation": 10, "test": 1}])


def test_key_of_a_content_is_fixed_and_ignores_case_and_white_space_alone():
    assert content_key(["so, and so"]) == 17866808434946027321
    assert content_key(["A  Text\n"]) == content_key(["a text"])
    assert content_key(["a text"]) != content_key(["a text."])
    assert content_key(["a", "b"]) != content_key(["ab", ""]) != content_key(["a b"])


@given(keys=KEYS, missing=MISSING)
def test_splits_are_disjoint_whole_and_hold_equal_examples_together(keys, missing):
    if len(set(keys)) <= len(missing):
        with pytest.raises(ConfigError, match=f"must have at least {len(missing) + 1} different examples"):
            assign_splits(keys, missing=missing)
        return
    splits = assign_splits(keys, missing=missing)
    assert sorted(index for indices in splits.values() for index in indices) == list(range(len(keys)))
    assert all(splits.values())
    assert all(indices == sorted(indices) for indices in splits.values())
    sets = [{keys[index] for index in indices} for indices in splits.values()]
    assert sum(map(len, sets)) == len(set(keys))


def test_a_larger_test_split_comes_from_train_alone_and_keeps_the_examples_of_a_smaller_one():
    keys = range(1000)  # ten in each bucket
    small, large = (assign_splits(keys, missing={"validation": 10, "test": percent}) for percent in (10, 25))
    assert [len(split) for split in large.values()] == [650, 100, 250]
    assert large["validation"] == small["validation"]
    assert set(small["test"]) < set(large["test"])
