"""Examples of any kind become splits with an objective; data that a model can't learn from is named before training."""

import functools
from types import SimpleNamespace

import pytest
import torch
from tests.data.conftest import make_data
from tests.tiny_tokenizer import load_tokenizer

from lorasweep.config.compose import compose_run
from lorasweep.data.rows import describe_lost, list_passages
from lorasweep.data.source import DataSource, collect_examples
from lorasweep.errors import ConfigError
from lorasweep.models.load import load_base
from lorasweep.objectives.next_tokens import NextTokens
from lorasweep.tasks.chat.read import Conversation, Message
from lorasweep.tasks.preferences.read import Preference
from lorasweep.tasks.splits import build_data_splits
from lorasweep.tasks.table.objective import Classification, Regression
from lorasweep.tasks.table.read import LabelledText
from lorasweep.tasks.text.read import Document

TALK = [Message("user", "hi"), Message("assistant", "yes"), Message("user", "so"), Message("assistant", "no")]
REASONED = Message("assistant", "yes", '{"reasoning_content": "because"}')
CONVERSATIONS = [
    Conversation([Message("user", "hi"), Message("assistant", "yes")]),
    Conversation([Message("user", "a long question"), Message("assistant", "no")]),
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
DOCUMENTS = [Document("0", "x" * 80)]
NAMES = ("bad", "good")
TINY = load_base(compose_run({}).model, dtype=torch.float32).model


def pair(prompt, chosen, rejected, **settings):
    sides = [
        Conversation([*TALK[:2], Message("user", prompt), Message("assistant", answer)], prompt)
        for answer in (chosen, rejected)
    ]
    return Preference(*sides, **settings)


PAIRS = [pair("hi", "yes", "no, never"), pair("so", "a longer answer", "a")]


def label(*labels):
    texts = ("good", "bad bad", "so so so")
    return [LabelledText(text, None, value) for text, value in zip(texts, labels, strict=True)]


def build(
    items, *, data, model_kind="causal_lm", kind=None, names=(), tokenizer=None, model=None, test=None, **settings
):
    """Builds the splits of a source whose splits all have these items; `test` may have others."""
    required = {
        "stdlib_docs": {},
        "chat": {"train": "x"},
        "preferences": {"train": "x"},
        "table": {"train": "x", "text": "text", "label": "label"},
    }
    source = DataSource(
        label_kind=kind,
        label_names=names,
        train=collect_examples("train", items),
        validation=collect_examples("validation", items),
        test=functools.cache(lambda: collect_examples("test", test() if test else items)),
        notes=("said",),
    )
    config = make_data(data, **required[data], **settings)
    base = SimpleNamespace(tokenizer=tokenizer or load_tokenizer(), kind=model_kind, model=model or TINY)
    return build_data_splits(config, source=source, base=base)


def test_the_test_split_is_read_once_and_not_before_it_is_called_for():
    read = []
    test = lambda: read.append("test") or [Document("0", "ü" * 40)]  # noqa: E731
    splits = build(DOCUMENTS, data="stdlib_docs", block_length=4, test=test)
    assert not read
    assert splits.test() is splits.test()
    assert read == ["test"]
    assert splits.notes == ("said",)
    for split in (splits.validation, splits.test()):  # bits per byte of a split count its own bytes
        assert splits.objective.for_split(split).bytes_per_token == split.bytes_per_token


def test_a_model_that_must_compute_all_logits_is_named_in_the_notes():
    splits = build(DOCUMENTS, data="stdlib_docs", block_length=4)
    assert splits.objective.for_split(splits.test()).by_chunk
    assert splits.notes == ("said",)
    splits = build(DOCUMENTS, data="stdlib_docs", block_length=4, model=torch.nn.Linear(2, 2))
    assert not splits.objective.by_chunk
    assert "all tokens" in splits.notes[1]


@pytest.mark.parametrize(
    ("kind", "labels", "names", "objective", "metric"),
    [
        ("single_label", (0, 1, 1), NAMES, Classification, "accuracy"),
        ("regression", (0.5, 1.0, 2.0), (), Regression, "pearson"),
    ],
)
def test_labels_decide_the_objective_and_its_metric(kind, labels, names, objective, metric):
    splits = build(kind=kind, items=label(*labels), data="table", model_kind="classifier", names=names)
    assert isinstance(splits.objective, objective)
    assert splits.metric == metric
    assert splits.train.batch([0, 1, 2])["targets"].tolist() == list(labels)
    assert splits.train.describe()["examples"] == 3


def test_balanced_weights_give_every_class_the_same_say_in_training_alone():
    splits = build(
        label(0, 1, 1),
        data="table",
        model_kind="classifier",
        kind="single_label",
        names=NAMES,
        class_weights="balanced",
    )
    assert splits.train.weights.tolist() == [1.5, 0.75, 0.75]
    assert splits.validation.weights.tolist() == [1.0, 1.0, 1.0]
    assert splits.train.describe()["labels"] == {"bad": 1, "good": 2}


@pytest.mark.parametrize(
    ("kind", "items", "data", "model_kind", "settings", "words"),
    [
        (
            None,
            DOCUMENTS,
            "stdlib_docs",
            "classifier",
            {},
            "`model.kind` must be causal_lm for `data=stdlib",
        ),
        ("single_label", label(0, 1, 1), "table", "causal_lm", {}, "`model.kind` must be classifier for `data=table`"),
        (None, CONVERSATIONS, "chat", "classifier", {}, "`model.kind` must be causal_lm for `data=chat`"),
        ("single_label", label(0, 1, 1), "table", "classifier", {"metric": "pearson"}, "`data.metric` must be"),
        ("regression", label(0.5, 1, 2), "table", "classifier", {"metric": "f1"}, "`data.metric` must be"),
        ("regression", label(0.5, 1, 2), "table", "classifier", {"class_weights": "balanced"}, "`data.class_weights`"),
        (None, CONVERSATIONS, "chat", "causal_lm", {"max_length": 2}, "`data.max_length`"),
        (None, PAIRS, "preferences", "causal_lm", {"max_length": 2}, "`data.max_length`"),
        (None, PAIRS, "preferences", "causal_lm", {"metric": "bits_per_byte"}, "`data.metric`"),
        (None, [pair("a", "b", "c", has_messages=True)], "preferences", "causal_lm", {}, "a chat template"),
    ],
)
def test_data_that_does_not_fit_the_model_or_the_settings_is_refused(kind, items, data, model_kind, settings, words):
    with pytest.raises(ConfigError) as raised:
        build(
            items, kind=kind, data=data, model_kind=model_kind, names=() if kind == "regression" else NAMES, **settings
        )
    assert words in str(raised.value)


def test_conversations_are_completions_and_those_whose_answer_is_cut_off_are_dropped_and_counted():
    tokenizer = load_tokenizer()
    splits = build(CONVERSATIONS, data="chat", template="plain")
    assert isinstance(splits.objective, NextTokens)
    prompt, completion = CONVERSATIONS[0].messages
    names = {"tokenizer": tokenizer, "prompt": prompt.content, "completion": completion.content}
    encoded = eval(splits.train.describe()["format"], names)["input_ids"]  # the code in the model card
    assert splits.train.sequences["input_ids"][0].tolist() == encoded[:-1]
    splits = build(CONVERSATIONS, data="chat", template="plain", max_length=10)
    assert (len(splits.train), splits.train.groups, splits.train.describe()["left_out"]) == (1, ("0",), 1)
    (note,) = describe_lost([splits.train], is_longest=False)
    assert "`data.max_length` cuts off" in note.text
    assert note.kind == "warning"


def test_answers_that_become_examples_of_their_own_keep_the_group_of_their_conversation():
    rewriting = load_tokenizer()  # the end-of-text token of an answer is not in the next prompt
    rewriting.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    talks = [Conversation(TALK, "a"), Conversation(TALK, "b")]
    splits = build(talks, data="chat", tokenizer=rewriting)
    assert splits.train.groups == ("a", "a", "b", "b")
    assert (splits.train.describe()["examples"], splits.train.describe()["conversations"]) == (4, 2)
    assert any("2 conversations of train are 4 examples, because the chat template" in note for note in splits.notes)


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_pairs_are_tokenised_as_conversations_whose_last_answer_is_scored(template):
    tokenizer = load_tokenizer()
    tokenizer.chat_template = template
    split = build(PAIRS, data="preferences", tokenizer=tokenizer).train
    assert (len(split), split.groups) == (2, ("hi", "so"))
    facts = split.describe()
    # scored tokens: "yes" and "no, never", "a longer answer" and "a", each with its end
    assert (facts["examples"], facts["chosen_tokens"], facts["rejected_tokens"]) == (2, 10.0, 6.0)
    assert facts["longer_accuracy"] == 0.5
    chats = [side for pair in PAIRS for side in (pair.chosen, pair.rejected)]
    same = build(chats, data="chat", tokenizer=tokenizer, turns="last").train
    for row in range(4):
        assert split.sequences["input_ids"][row].tolist() == same.sequences["input_ids"][row].tolist()
        assert split.sequences["targets"][row].tolist() == same.sequences["targets"][row].tolist()
    shown = list_passages(split, 1, tokenizer=tokenizer)
    end = tokenizer.eos_token
    assert [text for text, is_scored in shown if is_scored] == [f"a longer answer{end}", f"a{end}"]
    assert [text for text, is_scored in shown if text in ("chosen: ", "\nrejected: ")] == ["chosen: ", "\nrejected: "]


def test_pairs_whose_answers_are_cut_off_are_counted_and_dropped_without_a_scored_token():
    cut = pair("a prompt of which nothing is left to be scored", "yes", "no")
    splits = build([*PAIRS, cut], data="preferences", template="plain", max_length=22)
    assert (len(splits.train), splits.train.describe()["left_out"], splits.train.describe()["truncated"]) == (2, 1, 2)
    (note,) = describe_lost([splits.train, splits.test()], is_longest=True)
    assert "2 of 3 examples of train, 2 of 3 examples of test, and leaves out 1 of train, 1 of test" in note.text
    assert note.kind == "warning"
