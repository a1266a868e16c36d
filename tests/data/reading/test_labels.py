"""Labels become indices or numbers by rules that are said, and one that fits no rule is named with its place."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasweep.data.reading.labels import is_missing, learn_labels
from lorasweep.errors import ConfigError


def learn(values, *, task="auto", class_names=()):
    return learn_labels(values, task=task, class_names=class_names, key="`data.label=label`")


def encode(code, values):
    return [code.encode(value) for value in values]


@pytest.mark.parametrize(
    ("values", "task", "names"),
    [
        (["pos", " neg", "pos "], "single_label", ("neg", "pos")),
        (["10", "9", "9"], "single_label", ("9", "10")),
        ([10, 9.0, "9"], "single_label", ("9", "10")),
        (["-1", "1"], "single_label", ("-1", "1")),
        (["007", "7"], "single_label", ("007", "7")),
        ([True, False], "single_label", ("false", "true")),
        (["b", "1"], "single_label", ("1", "b")),
        (["1", "0.5"], "regression", ()),
        ([1, 0.5], "regression", ()),
        (["1e-3", "5"], "regression", ()),
        ([["b"], ["a", "b"], []], "multi_label", ("a", "b")),
        ([[2], [10, 2]], "multi_label", ("2", "10")),
    ],
)
def test_task_is_seen_from_the_labels_and_names_are_sorted(values, task, names):
    code = learn(values)
    assert (code.task, code.names) == (task, names)


def test_names_that_the_data_set_states_keep_its_order():
    code = learn(["not_entailment", "entailment"], class_names=("entailment", "not_entailment", "unclear"))
    assert encode(code, ["entailment", "not_entailment"]) == [0, 1]
    assert "as the data set orders them" in code.reason
    assert "no example of ['unclear']" in code.reason


def test_labels_may_have_other_names_in_their_sorted_order(read):
    file = {"train.csv": "text,label\n" + "".join(f"text {n},{9 + n % 2}\n" for n in range(40))}
    source = read("table", file, labels=["nine", "ten"])
    assert source.label_names == ("nine", "ten")
    assert [item.label for item in source.train.items] == [item.label for item in read("table", file).train.items]
    with pytest.raises(ConfigError, match=r"`data.labels` must name each of the 2 classes of training, \('9', '10'\)"):
        read("table", file, labels=["a", "b", "c"])


@pytest.mark.parametrize(
    ("values", "encoded"),
    [
        (["a|b", "b", ""], [[0, 1], [1], []]),
        (["a;b", "b", ""], [[0, 1], [1], []]),
        (["b, a", "b"], [[0, 1], [1]]),
        (["a,b|c", "c"], [[0, 1], [1]]),
        ([["b", "a", "b"], ["b"]], [[0, 1], [1]]),
        (["a", ["b"]], [[0], [1]]),
    ],
)
def test_several_labels_may_be_one_text_or_a_list(values, encoded):
    assert encode(learn(values, task="multi_label"), values) == encoded


@pytest.mark.parametrize(
    ("values", "task", "words"),
    [
        (["1", "good"], "regression", ["finite number", "'good'"]),
        (["1", "1e999"], "regression", ["finite number", "'1e999'"]),
        ([1, True], "regression", ["finite number", "True"]),
        (["a", "a"], "auto", ["two different labels", "['a']"]),
        ([[], []], "auto", ["two different labels", "[]"]),
        (["2.5", "2.5"], "auto", ["two different labels", "2.5"]),
        ([str(n) for n in range(30)], "auto", ["30 different values", "`data.task`"]),
    ],
)
def test_labels_that_do_not_fit_are_named(values, task, words):
    with pytest.raises(ConfigError) as raised:
        learn(values, task=task)
    assert [word for word in ("`data.label=label`", *words) if word not in str(raised.value)] == []


def test_missing_is_null_nan_and_the_empty_text():
    for value in (None, math.nan, "", " "):
        assert is_missing(value, task="auto")
    for value in ("none", "null", "NA", 0, False, [], "0"):
        assert not is_missing(value, task="auto")
    assert not is_missing("", task="multi_label")
    assert is_missing(None, task="multi_label")


@given(
    values=st.lists(
        st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text()), min_size=1, max_size=8
    ),
    task=st.sampled_from(["auto", "single_label", "multi_label", "regression"]),
)
def test_any_labels_are_encoded_or_refused(values, task):
    try:
        code = learn(values, task=task)
    except ConfigError:
        return
    encoded = encode(code, values)
    if code.task == "single_label":
        assert set(encoded) == set(range(len(code.names)))
    elif code.task == "multi_label":
        assert {index for indices in encoded for index in indices} == set(range(len(code.names)))
    else:
        assert all(math.isfinite(number) for number in encoded)
