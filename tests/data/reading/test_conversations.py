"""Prompts with completions and lists of messages become conversations that end with the assistant."""

import json

import pytest

from lorasweep.errors import ConfigError

SPLITS = ("train", "validation", "test")


def jsonl_of(*rows):
    return "\n".join(map(json.dumps, rows))


def said(role, content):
    return {"role": role, "content": content}


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
    assert source.train.items[1].messages == [("user", "ask 1"), ("assistant", "say 1")]
    assert f"{columns[0]} and {columns[1]}" in source.notes[0]


TALK = [said("system", "be kind"), said("user", "hi"), said("assistant", "hello")]
SHAREGPT = [{"from": role, "value": text} for role, text in (("system", "be kind"), ("human", "hi"), ("gpt", "hello"))]


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"messages": TALK}, {}),
        ({"conversations": TALK}, {}),
        ({"log": TALK}, {"messages": "log"}),
        ({"conversations": SHAREGPT}, {}),
        ({"prompt": TALK[:2], "completion": TALK[2:]}, {}),
    ],
)
def test_messages_are_read_as_they_are(read, row, settings):
    source = read("chat", {f"{split}.jsonl": jsonl_of(row) for split in SPLITS}, **settings)
    assert source.train.items[0].messages == [("system", "be kind"), ("user", "hi"), ("assistant", "hello")]


def test_answers_to_one_prompt_stay_in_one_split(read):
    rows = [{"prompt": f"ask {n % 50}", "completion": f"say {n}"} for n in range(200)]
    source = read("chat", {"train.jsonl": jsonl_of(*rows)})
    splits = [source.train, source.validation, source.test()]
    prompts = [{conversation.messages[0].content for conversation in split.items} for split in splits]
    assert sum(map(len, prompts)) == 50
    assert sum(map(len, splits)) == 200
    assert any("whose prompt has a hash" in note for note in source.notes)
    assert f"train has {len(source.train)} conversations with {len(prompts[0])} different prompts." in source.notes


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "", "completion": "b"}, ["row 1 of 'train.jsonl'", "`prompt` ''", "`completion` 'b'"]),
        ({"prompt": "a", "completion": None}, ["text", "None"]),
        ({"prompt": "a"}, ["'train.jsonl'", "['prompt']", "`data.prompt`", "`data.messages`"]),
        ({"messages": "hi"}, ["list of messages", "'hi'"]),
        ({"messages": ["hi"]}, ["`role` and `content`", "'hi'"]),
        ({"messages": []}, ["assistant's", "[]"]),
        ({"messages": [said("user", "hi")]}, ["assistant's", "'user'"]),
        ({"messages": [said("bot", "hi")]}, ["system, user, assistant", "'bot'"]),
        ({"messages": [{"content": "hi"}]}, ["system, user, assistant", "None"]),
        ({"messages": [said("user", [{"type": "image"}])]}, ["text", "image"]),
    ],
)
def test_what_is_no_conversation_is_named(read, row, words):
    with pytest.raises(ConfigError) as raised:
        read("chat", {"train.jsonl": jsonl_of(row)})
    assert [word for word in words if word not in str(raised.value)] == []


def test_conversations_with_one_prompt_are_one_group(read):
    rows = [{"prompt": f"ask {n % 2}", "completion": f"say {n}", "user": "me"} for n in range(4)]
    files = {f"{split}.jsonl": jsonl_of(*rows) for split in SPLITS}
    first, second, *others = [item.group for item in read("chat", files).train.items]
    assert first != second
    assert others == [first, second]
    assert {item.group for item in read("chat", files, group="user").train.items} == {"me"}
