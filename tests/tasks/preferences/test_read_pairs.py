"""Pairs of answers in TRL's and LLaMA-Factory's forms become two conversations with one prompt."""

import json

import pytest
from tests.data.conftest import SPLITS, jsonl_of, said

from lorasweep.errors import ConfigError


def read_rows(read, *rows, **settings):
    return read("preferences", {f"{split}.jsonl": jsonl_of(*rows) for split in SPLITS}, **settings)


SYSTEM, USER, GOOD, BAD = (
    said("system", "be kind"),
    said("user", "hi"),
    said("assistant", "hello"),
    said("assistant", "go"),
)
FROM_GPT = [{"from": role, "value": text} for role, text in (("human", "hi"), ("gpt", "hello"), ("gpt", "go"))]
HI = [("user", "hi")]


@pytest.mark.parametrize(
    ("row", "settings", "prompt"),
    [
        ({"prompt": "hi", "chosen": "hello", "rejected": "go"}, {}, HI),
        ({"question": "hi", "chosen": "hello", "rejected": "go"}, {}, HI),
        ({"ask": "hi", "yes": "hello", "no": "go"}, {"prompt": "ask", "chosen": "yes", "rejected": "no"}, HI),
        ({"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}, {}, [("system", "be kind"), *HI]),
        ({"prompt": [USER], "chosen": "hello", "rejected": "go"}, {}, HI),
        ({"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, {}, [("system", "be kind"), *HI]),
        # a prompt beside whole conversations, as in UltraFeedback
        ({"prompt": " Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, {}, HI),
        (
            {"prompt": "hi", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
            {},
            [("system", "be kind"), *HI],
        ),
        # LLaMA-Factory
        ({"conversations": FROM_GPT[:1], "chosen": FROM_GPT[1], "rejected": FROM_GPT[2]}, {}, HI),
        (
            {"chosen": [USER, BAD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]},
            {},
            [*HI, ("assistant", "go"), *HI],
        ),
    ],
)
def test_both_answers_follow_one_prompt(read, row, settings, prompt):
    source = read_rows(read, row, **settings)
    (pair,) = source.train.items
    for answer, conversation in (("hello", pair.chosen), ("go", pair.rejected)):
        assert [message.texts for message in conversation.messages] == [*prompt, ("assistant", answer)]
        assert (conversation.number, conversation.source) == (1, "train.jsonl")
    assert pair.has_messages is not all(isinstance(value, str) for value in row.values())


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is"),  # no part of a word
        ("The sky is", "The sky is blue.", "The sky"),
        ("\n\nHuman: hi\n\nAssistant: hello", "\n\nHuman: hi\n\nAssistant: go", "\n\nHuman: hi\n\nAssistant:"),
    ],
)
def test_texts_without_a_prompt_begin_with_it(read, chosen, rejected, prompt):
    (pair,) = read_rows(read, {"chosen": chosen, "rejected": rejected}).train.items
    texts = [[message.content for message in side.messages] for side in (pair.chosen, pair.rejected)]
    assert texts == [[prompt, chosen[len(prompt) :]], [prompt, rejected[len(prompt) :]]]


def test_answers_may_call_tools(read):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "get", "arguments": {"n": 7}}]}
    tools = [{"type": "function", "function": {"name": "get"}}]
    (pair,) = read_rows(read, {"prompt": [USER], "chosen": [call], "rejected": [BAD], "tools": tools}).train.items
    assert "tool_calls" in pair.chosen.messages[-1].fields
    assert [json.loads(side.tools) for side in (pair.chosen, pair.rejected)] == [tools, tools]


def test_no_prompt_stands_in_two_splits(read):
    rows = [{"prompt": f"ask {n % 9}", "chosen": f"say {n}", "rejected": "no"} for n in range(90)]
    source = read("preferences", {"train.jsonl": jsonl_of(*rows)})
    splits = [source.train, source.validation, source.test()]
    prompts = [{pair.chosen.messages[0].content for pair in split.items} for split in splits]
    assert (sum(map(len, prompts)), sum(map(len, splits))) == (9, 90)
    assert f"train has {len(source.train)} pairs with {len(prompts[0])} different prompts." in source.notes


def test_pairs_of_one_prompt_are_one_group_unless_a_column_says_otherwise(read):
    rows = [{"prompt": f"ask {n % 2}", "chosen": f"say {n}", "rejected": "no", "user": "me"} for n in range(4)]
    first, second, *others = [pair.chosen.group for pair in read_rows(read, *rows).train.items]
    assert first != second
    assert others == [first, second]
    assert {pair.rejected.group for pair in read_rows(read, *rows, group="user").train.items} == {"me"}


@pytest.mark.parametrize("wrong", [{"chosen": " "}, {"rejected": None}, {"chosen": []}, {"chosen": "no"}])
def test_a_pair_with_an_empty_answer_or_equal_ones_is_refused_with_its_row(read, wrong):
    rows = [{"prompt": "hi", "chosen": f"yes {n}", "rejected": "no"} for n in range(8)]
    rows[4] |= wrong
    with pytest.raises(ConfigError, match=r"row 5 of 'train.jsonl' must have two (different )?answers"):
        read_rows(read, *rows)


def test_a_text_that_ends_with_the_prompt_has_an_empty_answer(read):
    texts = ["Human: hi Assistant: ", "Human: hi Assistant: hello"]
    with pytest.raises(ConfigError, match=r"row 1 .* one is empty"):
        read_rows(read, {"chosen": texts[0], "rejected": texts[1]})


def test_another_order_of_the_answers_is_other_data(read):
    row = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    swapped = row | {"chosen": "no", "rejected": "yes"}
    assert read_rows(read, row).train.fingerprint != read_rows(read, swapped).train.fingerprint
