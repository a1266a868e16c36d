"""Prompts with completions and lists of messages become conversations that end with the assistant."""

import json

import pytest
from tests.data.conftest import SPLITS, jsonl_of, said


@pytest.mark.parametrize(
    ("columns", "settings"),
    [
        (("prompt", "completion"), {}),
        (("question", "answer"), {}),
        (("so", "and so"), {"prompt": "so", "completion": "and so"}),
    ],
)
def test_prompt_and_completion_are_what_user_and_assistant_say(read, columns, settings):
    rows = [dict(zip(columns, (f"ask {n}", f"say {n}"), strict=True)) for n in range(3)]
    source = read("chat", {f"{split}.jsonl": jsonl_of(*rows) for split in SPLITS}, **settings)
    assert source.train.items[1].messages == [("user", "ask 1", ""), ("assistant", "say 1", "")]
    assert f"{columns[0]} and {columns[1]}" in source.notes[0]


@pytest.mark.parametrize("settings", [{}, {"prompt": "instruction", "input": "input", "completion": "output"}])
def test_an_input_follows_its_prompt_on_a_new_line_unless_it_is_empty(read, settings):
    inputs = ["the text", "", None]
    rows = [{"instruction": f"ask {n}", "input": more, "output": f"say {n}"} for n, more in enumerate(inputs)]
    source = read("chat", {f"{split}.jsonl": jsonl_of(*rows) for split in SPLITS}, **settings)
    assert [item.messages[0][1] for item in source.train.items] == ["ask 0\nthe text", "ask 1", "ask 2"]
    assert [item.messages[1][1] for item in source.train.items] == ["say 0", "say 1", "say 2"]


TALK = [said("system", "be kind"), said("user", "hi"), said("assistant", "hello")]
PARTS = [
    said("system", [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]),
    said("user", [{"type": "text", "text": "hi"}]),
    said("assistant", [{"type": "text", "text": "hello"}]),
]
SHAREGPT = [{"from": role, "value": text} for role, text in (("system", "be kind"), ("human", "hi"), ("gpt", "hello"))]


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"messages": TALK}, {}),
        ({"conversations": TALK}, {}),
        ({"log": TALK}, {"messages": "log"}),
        ({"conversations": SHAREGPT}, {}),
        ({"messages": PARTS}, {}),
        ({"prompt": TALK[:2], "completion": TALK[2:]}, {}),
    ],
)
def test_messages_are_read_as_they_are(read, row, settings):
    source = read("chat", {f"{split}.jsonl": jsonl_of(row) for split in SPLITS}, **settings)
    assert [m.texts for m in source.train.items[0].messages] == [
        ("system", "be kind"),
        ("user", "hi"),
        ("assistant", "hello"),
    ]


ARGUMENTS = {"city": "Oslo", "days": None}
TOOLS = [{"type": "function", "function": {"name": "get"}}]


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ({"id": "1", "type": "function", "function": {"name": "get", "arguments": ARGUMENTS}}, {"city": "Oslo"}),
        ({"name": "get", "arguments": json.dumps(ARGUMENTS)}, ARGUMENTS),  # as OpenAI has it, so null stays
        ({"function": {"name": "get"}}, {}),
    ],
)
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_calls_of_tools_and_reasoning_are_read_in_the_form_of_templates(read, call, arguments, tools):
    answer = {"role": "assistant", "content": None, "tool_calls": [call], "thinking": "look"}
    tool = {"role": "tool", "content": "", "tool_call_id": "1"}  # a tool may have nothing to say
    row = {"messages": [said("user", "hi"), answer, tool, said("assistant", "seven")], "tools": tools}
    (conversation,) = read("chat", {f"{split}.jsonl": jsonl_of(row) for split in SPLITS}).train.items
    fields = [json.loads(message.fields or "{}") for message in conversation.messages]
    identity = {"id": "1"} if "id" in call else {}
    called = {"type": "function", **identity, "function": {"name": "get", "arguments": arguments}}
    assert fields == [{}, {"reasoning_content": "look", "tool_calls": [called]}, {"tool_call_id": "1"}, {}]
    assert [message.content for message in conversation.messages[1:3]] == ["", ""]
    assert json.loads(conversation.tools) == TOOLS


def test_a_prompt_with_a_completion_may_have_tools(read):
    row = {"prompt": "hi", "completion": "yes", "tools": TOOLS}
    (conversation,) = read("chat", {f"{split}.jsonl": jsonl_of(row) for split in SPLITS}).train.items
    assert (len(conversation.messages), json.loads(conversation.tools)) == (2, TOOLS)


def test_answers_to_one_prompt_stay_in_one_split(read):
    rows = [{"prompt": f"ask {n % 50}", "completion": f"say {n}"} for n in range(200)]
    source = read("chat", {"train.jsonl": jsonl_of(*rows)})
    splits = [source.train, source.validation, source.test()]
    prompts = [{conversation.messages[0].content for conversation in split.items} for split in splits]
    assert sum(map(len, prompts)) == 50
    assert sum(map(len, splits)) == 200
    assert any("whose prompt has a hash" in note for note in source.notes)
    assert f"train has {len(source.train)} conversations with {len(prompts[0])} different prompts." in source.notes


def test_conversations_with_one_prompt_are_one_group(read):
    rows = [{"prompt": f"ask {n % 2}", "completion": f"say {n}", "user": "me"} for n in range(4)]
    files = {f"{split}.jsonl": jsonl_of(*rows) for split in SPLITS}
    first, second, *others = [item.group for item in read("chat", files).train.items]
    assert first != second
    assert others == [first, second]
    assert {item.group for item in read("chat", files, group="user").train.items} == {"me"}


def test_answers_of_weight_0_are_kept_before_an_answer_that_is_trained(read):
    weighed = [said("user", "a"), said("assistant", "b") | {"weight": 0}, said("user", "c"), said("assistant", "d")]
    after = [said("user", "e"), said("assistant", "f") | {"weight": 0}]
    files = {f"{split}.jsonl": jsonl_of({"messages": weighed + after}, {"messages": TALK}) for split in SPLITS}
    messages = read("chat", files).train.items[0].messages
    assert [(message.content, message.is_trained) for message in messages] == [
        ("a", False),
        ("b", False),
        ("c", False),
        ("d", True),
    ]
    plain = [{"messages": [{"role": m["role"], "content": m["content"]} for m in weighed]}, {"messages": TALK}]
    others = read("chat", {f"{split}.jsonl": jsonl_of(*plain) for split in SPLITS})
    assert others.train.fingerprint != read("chat", files).train.fingerprint  # other tokens are trained


def test_prompts_of_test_that_are_known_from_train_or_validation_are_counted(read):
    def rows(first, last):
        return jsonl_of(*({"prompt": f"Ask {n}", "completion": f"say {n}"} for n in range(first, last)))

    source = read("chat", {"train.jsonl": rows(0, 30), "validation.jsonl": rows(30, 50), "test.jsonl": rows(29, 35)})
    assert not any("in train" in note for note in source.notes)
    assert source.test().notes[-2:] == (
        "1 of 6 examples of test: their prompt is in train too.",
        "5 of 6 examples of test: their prompt is in validation too.",
    )
