"""Labels become indices or numbers by rules that are said, tables become texts with labels, and misfits are named."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasweep.errors import ConfigError
from lorasweep.tasks.table.read import learn_labels

ROWS = [(f"text {n}", "ab"[n % 3 == 0]) for n in range(60)]


def learn(values, *, task="auto", class_names=()):
    return learn_labels(values, task=task, class_names=class_names, key="`data.label=label`")


@pytest.mark.parametrize(
    ("values", "task", "names"),
    [
        (["pos", " neg", "pos "], "single_label", ("neg", "pos")),
        (["10", "9", "9"], "single_label", ("9", "10")),
        ([10, 9.0, "9"], "single_label", ("9", "10")),
        (["007", "7"], "single_label", ("007", "7")),
        ([True, False], "single_label", ("false", "true")),
        (["1", "0.5"], "regression", ()),
        (["1e-3", "5"], "regression", ()),
    ],
)
def test_task_is_seen_from_the_labels_and_names_are_sorted(values, task, names):
    code = learn(values)
    assert (code.kind, code.names) == (task, names)


def test_names_that_the_data_set_states_keep_its_order():
    code = learn(["not_entailment", "entailment"], class_names=("entailment", "not_entailment", "unclear"))
    assert [code.encode(name) for name in ("entailment", "not_entailment")] == [0, 1]
    assert "as the data set orders them" in code.reason
    assert "no example of ['unclear']" in code.reason


def test_labels_may_have_other_names_in_their_sorted_order(read):
    file = {"train.csv": "text,label\n" + "".join(f"text {n},{9 + n % 2}\n" for n in range(40))}
    source = read("table", file, labels=["nine", "ten"])
    assert source.label_names == ("nine", "ten")
    assert [item.label for item in source.train.items] == [item.label for item in read("table", file).train.items]


@given(
    values=st.lists(st.booleans() | st.integers() | st.floats() | st.text(), min_size=1, max_size=8),
    task=st.sampled_from(["auto", "single_label", "regression"]),
)
def test_any_labels_are_encoded_or_refused(values, task):
    try:
        code = learn(values, task=task)
    except ConfigError:
        return
    encoded = [code.encode(value) for value in values]
    if code.kind == "single_label":
        assert set(encoded) == set(range(len(code.names)))
    else:
        assert all(math.isfinite(number) for number in encoded)


def csv_of(rows, header="text,label"):
    return "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"


def texts_of(split):
    return [example.text for example in split.items]


def test_splits_that_are_given_are_read_as_they_are(read):
    files = {"train.csv": csv_of(ROWS[:40]), "validation.csv": csv_of(ROWS[40:50]), "test.csv": csv_of(ROWS[50:])}
    source = read("table", files)
    assert (source.label_kind, source.label_names) == ("single_label", ("a", "b"))
    for split, rows in ((source.train, ROWS[:40]), (source.validation, ROWS[40:50]), (source.test(), ROWS[50:])):
        assert split.items == [(text, None, "ab".index(label), None) for text, label in rows]
    assert (source.train.name, source.validation.name, source.test().name) == ("train", "validation", "test")
    assert source.test() is source.test()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            "text,label\none,\ntwo,a\nthree,\n",
            ["row 1 of 'test.csv' must have a label", "2 rows", "also row 3"],
        ),
        ("text,label\nfine,a\nwell,c\n", ["row 2 of 'test.csv'", "a label that training has, ('a', 'b')", "'c'"]),
    ],
)
def test_rows_of_the_test_split_are_read_at_its_first_call(read, content, words):
    source = read("table", {"train.csv": csv_of(ROWS), "test.csv": content})
    with pytest.raises(ConfigError) as raised:
        source.test()
    assert [word for word in words if word not in str(raised.value)] == []


@pytest.mark.parametrize(("fraction", "buckets"), [(None, "10 to 29"), (0.25, "10 to 34")])
def test_missing_splits_are_split_off_and_said(read, fraction, buckets):
    source = read("table", {"train.csv": csv_of([*ROWS, *ROWS])}, test_fraction=fraction)
    splits = (source.train, source.validation, source.test())
    texts = [set(texts_of(split)) for split in splits]
    assert all(texts)
    assert sum(map(len, texts)) == len(ROWS)  # a text and its copy are on the same side
    assert sum(map(len, splits)) == 2 * len(ROWS)
    validation, test = (note for note in source.notes if "is split off" in note)
    assert f"validation is split off from train: {len(source.validation)} of 120 examples" in validation
    assert "0 to 9 modulo 100" in validation
    assert f"test is split off from train: {len(source.test())} of 120 examples" in test
    assert f"{buckets} modulo 100" in test
    assert not any("is in train too" in note for note in source.notes)
    assert source.test().notes == ()


def test_duplicates_are_counted(read):
    files = {
        "train.csv": csv_of([("one", "a"), ("One ", "a"), ("two", "b"), ("two", "a")]),
        "validation.csv": csv_of([("TWO", "a"), ("two", "b"), ("three", "b")]),
        "test.csv": csv_of([("one", "a"), ("four", "b")]),
    }
    source = read("table", files)
    assert "2 of 4 examples of train: their text is that of another one." in source.notes
    assert "2 of 3 examples of validation: their text is in train too." in source.notes
    assert "1 texts of train have several different labels." in source.notes
    assert source.test().notes == ("1 of 2 examples of test: their text is in train too.",)


def test_labels_that_look_like_missing_values_or_have_one_example_are_doubted(read):
    rows = [*((f"text {n}", "ab"[n % 2]) for n in range(8)), ("two", "NaN"), ("three", "NaN"), ("four", "once")]
    source = read("table", {f"{split}.csv": csv_of(rows) for split in ("train", "validation", "test")})
    (note,) = (note for note in source.notes if note.startswith("Check the labels"))
    assert "['NaN', 'once']" in note


def test_pairs_of_texts_belong_together(read):
    rows = [("q", "yes", "x"), ("q", "no", "y"), ("r", "yes", "x")]
    files = {f"{split}.csv": csv_of(rows, "question,answer,label") for split in ("train", "validation", "test")}
    source = read("table", files, text="question", text_pair="answer")
    assert [item[:2] for item in source.train.items] == [row[:2] for row in rows]
    assert not any("examples of train: " in note for note in source.notes)  # two pairs may share one of their texts


def test_limits_take_evenly_spaced_rows_of_each_split(read):
    files = {f"{split}.csv": csv_of(ROWS) for split in ("train", "validation", "test")}
    source = read("table", files, max_train_examples=30, max_validation_examples=2, max_test_examples=60)
    assert texts_of(source.train) == [text for text, _ in ROWS[::2]]
    assert texts_of(source.validation) == ["text 0", "text 30"]
    assert len(source.test()) == 60
    assert "train uses 30 of 60 examples, evenly spaced." in source.notes
    assert "validation uses 2 of 60 examples, evenly spaced." in source.notes


def test_group_of_a_row_is_the_value_of_its_column(read):
    rows = [(*row, f" author {n % 7} ") for n, row in enumerate(ROWS)]
    source = read("table", {"train.csv": csv_of(rows, "text,label,author")}, group="author")
    without = read("table", {"train.csv": csv_of(rows, "text,label,author")})
    groups = {example.text: example.group for example in source.train.items}
    assert groups == {text: group.strip() for text, _, group in rows if text in groups}
    assert source.train.fingerprint == without.train.fingerprint
    assert {example.group for example in without.train.items} == {None}
