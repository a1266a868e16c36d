"""Labels become indices or numbers by rules that are said, and one that fits no rule is named with its place."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasweep.data.reading.labels import is_missing, learn_labels
from lorasweep.errors import ConfigError


def place(row):
    return f"line {row + 2} of 'a.csv', column 'label',"


def learn(values, *, task="auto", class_names=()):
    return learn_labels(values, task=task, class_names=class_names, place=place, key="`data.label=label`")


@pytest.mark.parametrize(
    ("values", "task", "names"),
    [
        (["pos", " neg", "pos "], "single_label", ("neg", "pos")),
        (["10", "9", "9"], "single_label", ("9", "10")),
        ([10, 9.0, "9"], "single_label", ("9", "10")),
        (["1.0", "2"], "single_label", ("1", "2")),
        (["-1", "+1"], "single_label", ("-1", "1")),
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
    assert code.encode(["entailment", "not_entailment"], place=place) == [0, 1]
    assert "as the data set orders them" in code.reason
    assert "No training row has 'unclear'." in code.reason


def test_reason_says_what_is_predicted():
    assert learn(["b", "a"]).reason == (
        "Predicted is one label per row of 2 classes (labels are names), in sorted order: 'a', 'b'."
    )
    assert "labels are whole numbers; `data.task=regression` would" in learn(["0", "1"]).reason
    assert "(as `data.task` says)" in learn(["0", "1"], task="single_label").reason
    assert learn(["0", "1.5"]).reason == (
        "Predicted is a number (labels are numbers with fractions); in training from 0 to 1.5, mean 0.75."
    )


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
    assert learn(values, task="multi_label").encode(values, place=place) == encoded


def test_numbers_are_read_as_numbers():
    assert learn(["1", "2"], task="regression").encode(["3", 4, 0.5], place=place) == [3.0, 4.0, 0.5]


@pytest.mark.parametrize(
    ("values", "task", "message"),
    [
        (
            ["0", "0.5"],
            "single_label",
            r"line 3 of 'a.csv', column 'label', must be the name or whole number .* '0.5'. Use",
        ),
        (
            ["pos", "0.5"],
            "auto",
            "line 3 of 'a.csv', column 'label', must be the name or whole number of a class, but is",
        ),
        (
            [0, 0.5],
            "single_label",
            "must be the name or whole number of a class, but is 0.5. Use `data.task=regression`",
        ),
        ([["a"], "b"], "single_label", r"line 2 .* must be the name or number of a class, but is \['a'\]."),
        ([["a", None], ["b"]], "multi_label", "must be the name or number of a class, but is None."),
        ([["a", [1]], ["b"]], "multi_label", r"must be the name or number of a class, but is \[1\]."),
        ([{"a": 1}, "b"], "auto", "must be the name or number of a class, but is {'a': 1}."),
        ([1e400, 1], "single_label", "must be the name or whole number of a class, but is inf."),
        (["1", "good"], "regression", "line 3 of 'a.csv', column 'label', must be a finite number, but is 'good'."),
        (["1", "1e999"], "regression", "must be a finite number, but is '1e999'."),
        ([1, True], "regression", "must be a finite number, but is True."),
        ([10**400, 1], "regression", "must be a finite number, but is 1000"),
        (
            ["a", "a"],
            "auto",
            "`data.label=label` must have at least two different labels in training, but every row has 'a'.",
        ),
        ([["a"], ["a"]], "auto", "at least two different labels in training, but every row has 'a'."),
        ([[], []], "auto", "at least two different labels in training, but every row has none."),
        (["2.5", "2.5"], "auto", "at least two different labels in training, but every row has 2.5."),
        (
            [str(n) for n in range(30)],
            "auto",
            r"must have classes of several rows each, but has 30 different values in 30 rows. Name another",
        ),
    ],
)
def test_labels_that_do_not_fit_are_named(values, task, message):
    with pytest.raises(ConfigError, match=message):
        learn(values, task=task)


def test_many_classes_are_believed_where_the_task_is_said():
    assert len(learn([str(n) for n in range(30)], task="single_label").names) == 30


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "positve",
            r"line 2 of 'a.csv', column 'label', must be a label that training has, 'negative', 'positive', but is "
            r"'positve'. Did you mean `positive`\?",
        ),
        ("0.5", "must be the name or whole number of a class, but is '0.5'."),
    ],
)
def test_label_that_training_does_not_have_is_named(value, message):
    with pytest.raises(ConfigError, match=message):
        learn(["positive", "negative"]).encode([value], place=place)


def test_many_names_are_cut_short_in_messages():
    code = learn([f"class {n}" for n in range(30)] * 2)
    with pytest.raises(ConfigError, match="and 18 more, but is 'other'"):
        code.encode(["other"], place=place)


def test_missing_is_null_nan_and_the_empty_text():
    for value in (None, math.nan, "nan", " NaN ", "", " "):
        assert is_missing(value, task="auto")
    for value in ("none", "null", "NA", 0, False, [], "0"):
        assert not is_missing(value, task="auto")
    assert not is_missing("", task="multi_label")
    assert is_missing(None, task="multi_label")


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["1", "1.5", "a|b", "nan"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


@given(
    values=st.lists(ANY, min_size=1, max_size=8),
    task=st.sampled_from(["auto", "single_label", "multi_label", "regression"]),
)
def test_any_labels_are_encoded_or_refused_in_one_sentence(values, task):
    try:
        code = learn(values, task=task)
        encoded = code.encode(values, place=place)
    except ConfigError:
        return
    assert len(encoded) == len(values)
    if code.task == "single_label":
        assert set(encoded) == set(range(len(code.names)))
    elif code.task == "multi_label":
        assert {index for indices in encoded for index in indices} == set(range(len(code.names)))
    else:
        assert all(math.isfinite(number) for number in encoded)
