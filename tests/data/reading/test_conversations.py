"""Prompts with completions and lists of messages become conversations that end with the assistant."""

from __future__ import annotations

import json

import pytest

from lorasweep.data.source import Message
from lorasweep.errors import ConfigError

SPLITS = ("train", "validation", "test")


def jsonl_of(*rows):
    return "\n".join(map(json.dumps, rows))


def said(role, content):
    return {"role": role, "content": content}


def messages_of(conversation):
    return [(message.role, message.content) for message in conversation]


@pytest.mark.parametrize(
    ("columns", "settings"),
    [
        (("prompt", "completion"), {}),
        (("prompt", "response"), {}),
        (("question", "answer"), {}),
        (("so", "and so"), {"prompt": "so", "completion": "and so"}),
    ],
)
def test_prompt_and_completion_are_what_user_and_assistant_say(read, columns, settings):
    rows = [dict(zip(columns, (f"ask {n}", f"say {n}"), strict=True)) for n in range(3)]
    source = read("chat", {f"{split}.jsonl": jsonl_of(*rows) for split in SPLITS}, **settings)
    assert (source.kind, source.label_names) == ("conversations", ())
    assert source.train.conversations[1] == [
        Message(role="user", content="ask 1"),
        Message(role="assistant", content="say 1"),
    ]
    assert source.notes[0] == f"Conversations are read from {columns[0]} and {columns[1]}."


@pytest.mark.parametrize(
    ("column", "settings"), [("messages", {}), ("conversations", {}), ("log", {"messages": "log"})]
)
def test_messages_are_read_as_they_are(read, column, settings):
    row = {column: [said("system", "be kind"), said("user", "hi"), said("assistant", "hello")]}
    source = read("chat", {f"{split}.jsonl": jsonl_of(row) for split in SPLITS}, **settings)
    assert messages_of(source.train.conversations[0]) == [("system", "be kind"), ("user", "hi"), ("assistant", "hello")]


def test_words_of_sharegpt_are_known(read):
    row = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    source = read("chat", {f"{split}.jsonl": jsonl_of(row) for split in SPLITS})
    assert messages_of(source.train.conversations[0]) == [("user", "hi"), ("assistant", "hello")]


def test_prompt_and_completion_may_be_messages(read):
    row = {"prompt": [said("system", "be kind"), said("user", "hi")], "completion": [said("assistant", "hello")]}
    source = read("chat", {f"{split}.jsonl": jsonl_of(row) for split in SPLITS})
    assert [role for role, _ in messages_of(source.train.conversations[0])] == ["system", "user", "assistant"]


def test_csv_is_read_too(read):
    source = read("chat", {f"{split}.csv": "prompt,completion\nhi,hello\n" for split in SPLITS})
    assert messages_of(source.train.conversations[0]) == [("user", "hi"), ("assistant", "hello")]


def test_answers_to_one_prompt_stay_in_one_split(read):
    rows = [{"prompt": f"ask {n % 50}", "completion": f"say {n}"} for n in range(200)]
    source = read("chat", {"train.jsonl": jsonl_of(*rows)})
    splits = [source.train, source.validation, source.test()]
    prompts = [{conversation[0].content for conversation in split.conversations} for split in splits]
    assert sum(map(len, prompts)) == 50
    assert sum(map(len, splits)) == 200
    assert any("whose prompt has a hash" in note for note in source.notes)
    assert f"train has {len(source.train)} conversations with {len(prompts[0])} different prompts." in source.notes


def test_few_prompts_are_split_by_their_answers(read):
    rows = [{"prompt": "write a poem", "completion": f"poem {n}"} for n in range(60)]
    source = read("chat", {"train.jsonl": jsonl_of(*rows)})
    assert min(len(source.train), len(source.validation), len(source.test())) >= 1
    assert any("whose content has a hash" in note for note in source.notes)
    assert "0 of" in next(note for note in source.notes if "repeat the content" in note)


def test_prompts_that_training_has_are_counted(read):
    rows = [{"prompt": f"ask {n}", "completion": "say"} for n in range(30)]
    other = [{"prompt": "ASK 3", "completion": "say more"}, {"prompt": "new", "completion": "say"}]
    source = read(
        "chat", {"train.jsonl": jsonl_of(*rows), "validation.jsonl": jsonl_of(*other), "test.jsonl": jsonl_of(*other)}
    )
    count = "1 of 2 rows of {} have the prompt of a row of train, apart from case and white space."
    assert count.format("validation") in source.notes
    assert count.format("test") in source.test().notes


def test_limits_and_fingerprints_are_of_what_is_used(read):
    rows = [{"prompt": f"ask {n}", "completion": "say"} for n in range(30)]
    files = {f"{split}.jsonl": jsonl_of(*rows) for split in SPLITS}
    whole, less = read("chat", files), read("chat", files, max_train_examples=10)
    assert [c[0].content for c in less.train.conversations] == [f"ask {n}" for n in range(0, 30, 3)]
    assert whole.train.fingerprint != less.train.fingerprint
    assert whole.train.fingerprint == read("chat", files).train.fingerprint == whole.validation.fingerprint


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "", "completion": "b"},
            "line 1 of 'train.jsonl' must have a text as user's content in column 'prompt', but",
        ),
        (
            {"prompt": "a", "completion": " "},
            "must have a text as assistant's content in column 'completion', but it is empty. Mend",
        ),
        (
            {"prompt": "a", "completion": None},
            "must have a text as assistant's content in column 'completion', but has None.",
        ),
        (
            {"prompt": "a"},
            r"'train.jsonl' must have columns `prompt` and `completion`, or `messages`, but has \['prompt'\]. Name",
        ),
        ({"messages": "hi"}, "must have a list of messages in column 'messages', but has 'hi'."),
        ({"messages": ["hi"]}, "must have messages with `role` and `content` in column 'messages', but has 'hi'."),
        ({"messages": []}, "must have messages in 'messages' that end with the assistant's, but has none."),
        ({"messages": [said("user", "hi")]}, "that end with the assistant's, but has user."),
        (
            {"messages": [said("bot", "hi")]},
            "must have the roles system, user, assistant in column 'messages', but has 'bot'.",
        ),
        (
            {"messages": [{"content": "hi"}]},
            "must have the roles system, user, assistant in column 'messages', but has None.",
        ),
        (
            {"messages": [said("user", [{"type": "image"}])]},
            "must have a text as user's content in column 'messages', but has",
        ),
        ({"messages": [said("user", "")]}, "must have a text as user's content in column 'messages', but it is empty."),
    ],
)
def test_what_is_no_conversation_is_named(read, row, message):
    with pytest.raises(ConfigError, match=message):
        read("chat", {"train.jsonl": jsonl_of(row)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prompt": "ask", "completion": "completion"},
            "`data.prompt` must be a column of 'train.jsonl', but got 'ask'.",
        ),
        ({"messages": "mesages"}, "`data.messages` must be a column of 'train.jsonl', but got 'mesages'."),
    ],
)
def test_column_that_is_not_there_is_named(read, settings, message):
    with pytest.raises(ConfigError, match=message):
        read("chat", {"train.jsonl": jsonl_of({"prompt": "a", "completion": "b"})}, **settings)


def test_files_of_a_glob_have_the_same_columns(read):
    files = {"a.jsonl": jsonl_of({"prompt": "a", "completion": "b"}), "b.jsonl": jsonl_of({"messages": []})}
    with pytest.raises(
        ConfigError, match=r"same columns, but 'b.jsonl' has messages where 'a.jsonl' has prompt, completion."
    ):
        read("chat", files, train="*.jsonl")
