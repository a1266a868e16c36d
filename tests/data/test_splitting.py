"""An example's split is decided by its own content, no split is empty, and equal examples are never in two."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasweep.data.source import assign_splits, content_key
from lorasweep.errors import ConfigError

KEYS = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5), min_size=3, max_size=60)
MISSING = st.sampled_from([("validation",), ("test",), ("validation", "test")])


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
