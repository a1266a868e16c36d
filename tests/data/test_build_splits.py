"""Examples of any kind become splits with a task, and data that a model can't learn from is named before training."""

import functools

import pytest
import torch
from tests.tiny_tokenizer import load_tokenizer

from lorasweep.config.compose import compose_run
from lorasweep.data.build_splits import build_splits
from lorasweep.data.source import Conversation, DataSource, Document, LabelledText, Message, collect_examples
from lorasweep.data.split import CompletionSplit, LabelledSplit
from lorasweep.data.tasks import Classification, LanguageModelling, Regression
from lorasweep.errors import ConfigError
from lorasweep.models.load import load_base


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def config(**settings):
    name = settings.pop("data", "stdlib_docs")
    needed = {"data.train": "x"} if name in ("table", "chat", "text") else {}
    if name == "table":
        needed |= {"data.text": "text", "data.label": "label"}
    return compose_run({"data": name, **needed, **{f"data.{key}": value for key, value in settings.items()}}).data


def make_source(read_examples, *, kind, label_names=()):
    read = []

    def make(name):
        read.append(name)
        return read_examples(name)

    source = DataSource(
        kind=kind,
        label_names=label_names,
        train=make("train"),
        validation=make("validation"),
        test=functools.cache(lambda: make("test")),
        notes=("said",),
    )
    return source, read


def documents(name, texts=("x" * 80,)):
    return collect_examples(name, [Document(str(n), text) for n, text in enumerate(texts)])


def labelled(name, labels=(0, 1, 1)):
    texts = ("good", "bad bad", "so so so")
    return collect_examples(name, [LabelledText(text, None, label) for text, label in zip(texts, labels, strict=True)])


def conversations(name):
    talks = [
        Conversation([Message("user", "hi"), Message("assistant", "yes")]),
        Conversation([Message("user", "a long question"), Message("assistant", "no")]),
    ]
    return collect_examples(name, talks)


def test_the_test_split_is_read_once_and_not_before_it_is_called_for(tokenizer):
    texts = {"test": ["ü" * 40]}
    source, read = make_source(lambda name: documents(name, texts.get(name, ["x" * 80])), kind="documents")
    splits = build_splits(config(block_length=4), source=source, tokenizer=tokenizer, model_kind="causal_lm")
    assert read == ["train", "validation"]
    assert splits.test() is splits.test()
    assert read == ["train", "validation", "test"]
    assert splits.notes == ("said",)
    for split in (splits.validation, splits.test()):  # bits per byte of a split count its own bytes
        assert splits.get_task(split).bytes_per_token == split.bytes_per_token


def test_a_model_that_must_compute_all_logits_is_named_in_the_notes(tokenizer):
    source, _ = make_source(documents, kind="documents")
    settings = {"source": source, "tokenizer": tokenizer, "model_kind": "causal_lm"}
    model = load_base(compose_run({}).model, dtype=torch.float32).model
    splits = build_splits(config(block_length=4), **settings, model=model)
    assert splits.get_task(splits.test()).by_chunk
    assert splits.notes == ("said",)
    splits = build_splits(config(block_length=4), **settings, model=torch.nn.Linear(2, 2))
    assert not splits.task.by_chunk
    assert splits.notes[0] == "said"
    assert "all tokens" in splits.notes[1]


@pytest.mark.parametrize(
    ("kind", "labels", "names", "task", "metric"),
    [
        ("single_label", (0, 1, 1), ("bad", "good"), Classification, "accuracy"),
        ("regression", (0.5, 1.0, 2.0), (), Regression, "pearson"),
    ],
)
def test_labels_decide_the_task_and_its_metric(tokenizer, kind, labels, names, task, metric):
    source, _ = make_source(lambda name: labelled(name, labels), kind=kind, label_names=names)
    splits = build_splits(config(data="table"), source=source, tokenizer=tokenizer, model_kind="classifier")
    assert isinstance(splits.task, task)
    assert splits.metric == metric
    assert isinstance(splits.train, LabelledSplit)
    assert splits.train.batch([0, 1, 2])["targets"].tolist() == list(labels)
    assert splits.train.describe()["examples"] == 3
    assert splits.notes[0] == "said"
    assert splits.notes[1].startswith("Always answering")


def test_balanced_weights_give_every_class_the_same_say_in_training_alone(tokenizer):
    source, _ = make_source(labelled, kind="single_label", label_names=("bad", "good"))
    settings = config(data="table", class_weights="balanced")
    splits = build_splits(settings, source=source, tokenizer=tokenizer, model_kind="classifier")
    assert splits.train.weights.tolist() == [1.5, 0.75, 0.75]
    assert splits.validation.weights.tolist() == [1.0, 1.0, 1.0]
    assert splits.train.describe()["labels"] == {"bad": 1, "good": 2}


@pytest.mark.parametrize(
    ("labels", "kind", "settings", "key"),
    [
        ((0, 1, 1), "single_label", {"metric": "pearson"}, "metric"),
        ((0.5, 1.0, 2.0), "regression", {"metric": "f1"}, "metric"),
        ((0.5, 1.0, 2.0), "regression", {"class_weights": "balanced"}, "class_weights"),
    ],
)
def test_settings_that_do_not_fit_the_labels_are_refused(tokenizer, labels, kind, settings, key):
    names = ("a", "b") if kind == "single_label" else ()
    source, _ = make_source(lambda name: labelled(name, labels), kind=kind, label_names=names)
    with pytest.raises(ConfigError, match=rf"`data\.{key}` must be"):
        build_splits(config(data="table", **settings), source=source, tokenizer=tokenizer, model_kind="classifier")


def test_conversations_are_completions(tokenizer):
    source, _ = make_source(conversations, kind="conversations")
    settings = config(data="chat", template="plain")
    causal = build_splits(settings, source=source, tokenizer=tokenizer, model_kind="causal_lm")
    assert isinstance(causal.train, CompletionSplit)
    assert isinstance(causal.task, LanguageModelling)
    prompt, completion = source.train.items[0].messages
    names = {"tokenizer": tokenizer, "prompt": prompt.content, "completion": completion.content}
    encoded = eval(causal.train.describe()["format"], names)["input_ids"]  # the code in the model card
    assert causal.train.tokens[0].tolist() == encoded[:-1]


def test_examples_whose_answer_is_cut_off_are_dropped_and_counted(tokenizer):
    source, _ = make_source(conversations, kind="conversations")
    settings = config(data="chat", template="plain", max_length=10)
    splits = build_splits(settings, source=source, tokenizer=tokenizer, model_kind="causal_lm")
    assert len(splits.train) == 1
    assert splits.train.groups == ("0",)
    assert splits.train.describe()["left_out"] == 1
    settings = config(data="chat", template="plain", max_length=2)
    with pytest.raises(ConfigError, match=r"`data\.max_length`"):
        build_splits(settings, source=source, tokenizer=tokenizer, model_kind="causal_lm")


@pytest.mark.parametrize(
    ("read_examples", "kind", "data", "model_kind", "wanted"),
    [
        (documents, "documents", "stdlib_docs", "classifier", "causal_lm"),
        (labelled, "single_label", "table", "causal_lm", "classifier"),
        (conversations, "conversations", "chat", "classifier", "causal_lm"),
    ],
)
def test_data_that_the_model_cant_learn_from_is_refused(tokenizer, read_examples, kind, data, model_kind, wanted):
    source, _ = make_source(read_examples, kind=kind, label_names=("a", "b"))
    with pytest.raises(ConfigError, match=f"`model.kind` must be {wanted} for `data={data}`"):
        build_splits(config(data=data), source=source, tokenizer=tokenizer, model_kind=model_kind)


def test_answers_that_become_examples_of_their_own_keep_the_group_of_their_conversation(tokenizer):
    def talk(group):
        said = [Message("user", "hi"), Message("assistant", "yes"), Message("user", "so"), Message("assistant", "no")]
        return Conversation(said, group)

    source, _ = make_source(lambda name: collect_examples(name, [talk("a"), talk("b")]), kind="conversations")
    rewriting = load_tokenizer()  # the end-of-text token of an answer is not in the next prompt
    rewriting.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    splits = build_splits(config(data="chat"), source=source, tokenizer=rewriting, model_kind="causal_lm")
    assert splits.train.groups == ("a", "a", "b", "b")
    assert (splits.train.describe()["examples"], splits.train.describe()["conversations"]) == (4, 2)
    assert any("2 conversations of train are 4 examples" in note for note in splits.notes)


def test_reasoning_that_a_template_leaves_out_is_said(tokenizer):
    reasoned = Message("assistant", "yes", '{"reasoning_content": "because"}')
    talks = [Conversation([Message("user", "hi"), reasoned], "a")]
    source, _ = make_source(lambda name: collect_examples(name, talks), kind="conversations")
    splits = build_splits(config(data="chat"), source=source, tokenizer=tokenizer, model_kind="causal_lm")
    assert splits.train.describe()["without_reasoning"] == 1
    assert any("lack reasoning" in note for note in splits.notes)
