"""Conversations are tokenised as they are served: each kind of chat template, and what can't be served is refused."""

import json

import pytest
from tests.tiny_tokenizer import load_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from lorasweep.config.compose import compose_run
from lorasweep.data.source import Conversation, Message, collect_examples
from lorasweep.data.split import IGNORED
from lorasweep.data.tokenise import tokenise_chats
from lorasweep.errors import ConfigError

MARKS = ["<|u|>", "<|a|>", "<|s|>", "<|t|>", "<|call|>", "<|end|>"]
GENERATE = "{% if add_generation_prompt %}<|a|>{% endif %}"
KEEPS = "{% for m in messages %}<|{{ m.role[0] }}|>{{ m.content }}<|end|>\n{% endfor %}" + GENERATE
DROPS_REASONING = (
    "{% for m in messages %}<|{{ m.role[0] }}|>"
    "{% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}" + GENERATE
)
HAS_SYSTEM_PROMPT = "{% if messages[0].role != 'system' %}<|s|>You help.<|end|>\n{% endif %}" + KEEPS
MARKED = (
    "{% for m in messages %}<|{{ m.role[0] }}|>{% if m.role == 'assistant' %}Well: "
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
    + GENERATE
)
DATED = "{% macro day() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}<|s|>{{ day() }}<|end|>" + KEEPS
TOOLS = (
    "{% for tool in tools or [] %}<|s|>{{ tool.name }}<|end|>{% endfor %}{% for m in messages %}<|{{ m.role[0] }}|>"
    "{% for call in m.tool_calls or [] %}<|call|>{{ call.function.name }}{{ call.function.arguments | tojson }}"
    "{% endfor %}{{ m.content }}<|end|>{% endfor %}" + GENERATE
)
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('must alternate') }}{% endif %}{% endfor %}" + KEEPS
)
OPENS_THINKING = KEEPS.replace("<|a|>{% endif %}", "<|a|><think>\n{% endif %}")
EMPTY_THINKING = (
    "{% for m in messages %}<|{{ m.role[0] }}|>{% if m.role == 'assistant' %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|a|><think>"
    "{{ '</think>' if enable_thinking is false else '\n' }}{% endif %}"
)
NO_END = "{% for m in messages %}<|{{ m.role[0] }}|>{{ m.content }}{% endfor %}" + GENERATE
ENDS_TEXT = KEEPS.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")

TALK = [("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")]
CALLS = [{"type": "function", "function": {"name": "get", "arguments": {"n": 7}}}]


@pytest.fixture
def tokenizer():
    loaded = load_tokenizer()
    loaded.add_special_tokens({"extra_special_tokens": MARKS})
    return loaded


def talk(*messages, tools=""):
    """A conversation of messages, each a role, a text and further fields."""
    made = [Message(role, text, json.dumps(fields[0]) if fields else "") for role, text, *fields in messages]
    return Conversation(made, "g", tools)


def tokenise(tokenizer, template, conversation, /, **settings):
    """The examples of a conversation: its token ids, and the text of its scored tokens."""
    tokenizer.chat_template = template
    values = {"data": "chat", "data.train": "x", "data.max_length": 4096, "data.template": "model"}
    config = compose_run({**values, **{f"data.{key}": value for key, value in settings.items()}}).data
    made = tokenise_chats(collect_examples("train", [conversation]), config=config, tokenizer=tokenizer)
    examples = []
    for n in range(len(made["input_ids"].ends)):
        ids, targets = made["input_ids"][n].tolist(), made["targets"][n].tolist()
        examples.append(([*ids, targets[-1]], [token for token in targets if token != IGNORED]))
    return examples


def texts(tokenizer, *arguments, **settings):
    """The whole text and the scored text of each example."""
    return [tuple(map(tokenizer.decode, example)) for example in tokenise(tokenizer, *arguments, **settings)]


def serve(tokenizer, conversation, index):
    """The tokens that a server gives to the model for the answer at this index."""
    messages = [{"role": m.role, "content": m.content} for m in conversation.messages[:index]]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_a_template_that_keeps_turns_makes_one_example_without_what_follows_the_end_of_a_turn(tokenizer):
    made = texts(tokenizer, KEEPS, talk(*TALK))
    assert made == [("<|u|>hi<|end|>\n<|a|>yes<|end|>\n<|u|>so<|end|>\n<|a|>no<|end|>", "yes<|end|>no<|end|>")]


def test_a_template_that_rewrites_earlier_turns_makes_an_example_of_each_answer(tokenizer):
    reasoned = [
        (role, text, {"reasoning_content": "hm"}) if role == "assistant" else (role, text) for role, text in TALK
    ]
    made = texts(tokenizer, DROPS_REASONING, talk(*reasoned))
    assert made == [
        ("<|u|>hi<|end|><|a|><think>hm</think>yes<|end|>", "<think>hm</think>yes<|end|>"),
        ("<|u|>hi<|end|><|a|>yes<|end|><|u|>so<|end|><|a|><think>hm</think>no<|end|>", "<think>hm</think>no<|end|>"),
    ]


@pytest.mark.parametrize("template", [KEEPS, DROPS_REASONING])
def test_only_the_last_answer_is_scored_if_asked(tokenizer, template):
    ((text, scored),) = texts(tokenizer, template, talk(*TALK), turns="last")
    assert text.startswith("<|u|>hi<|end|>")
    assert scored.endswith("no<|end|>")
    assert "yes" not in scored


def test_what_a_template_writes_before_the_first_turn_is_not_scored(tokenizer):
    ((text, scored),) = texts(tokenizer, HAS_SYSTEM_PROMPT, talk(*TALK))
    assert (text[:22], scored) == ("<|s|>You help.<|end|>\n", "yes<|end|>no<|end|>")


def test_marks_of_a_template_say_what_is_scored_and_the_end_of_a_turn_is_scored_too(tokenizer):
    ((text, scored),) = texts(tokenizer, MARKED, talk(*TALK))
    assert "<|a|>Well: yes<|end|>" in text
    assert scored == "yes<|end|>no<|end|>"


def test_today_is_the_day_of_the_settings(tokenizer):
    ((text, _),) = texts(tokenizer, DATED, talk(*TALK))
    assert text.startswith("<|s|>26 Jul 2024<|end|>")
    ((text, _),) = texts(tokenizer, DATED, talk(*TALK), template_date="2031-01-02")
    assert text.startswith("<|s|>02 Jan 2031<|end|>")


def test_arguments_reach_the_template(tokenizer):
    ((text, _),) = texts(tokenizer, "{{ mood }}" + KEEPS, talk(*TALK), template_arguments={"mood": "kind"})
    assert text.startswith("kind<|u|>")


CALLING = [("user", "hi"), ("assistant", "", {"tool_calls": CALLS}), ("tool", "7"), ("assistant", "no")]


@pytest.mark.parametrize(
    "template", [TOOLS, TOOLS.replace("name }}{{", "name + '' }}{{ '' +").replace(" | tojson", "")]
)
def test_tool_calls_are_scored_and_what_tools_answer_is_not(tokenizer, template):
    # the second template joins texts, as DeepSeek's does, so it fails unless the arguments are a text
    conversation = talk(*CALLING, tools=json.dumps([{"name": "get"}]))
    ((text, scored),) = texts(tokenizer, template, conversation)
    assert text.startswith("<|s|>get<|end|><|u|>hi<|end|>")
    assert "<|t|>7<|end|>" in text
    assert scored == '<|call|>get{"n": 7}<|end|>no<|end|>'


@pytest.mark.parametrize(
    ("messages", "scored"),
    [
        (TALK[:2], "\n</think>\n\nyes<|end|>"),
        ([TALK[0], ("assistant", "yes", {"reasoning_content": "hm"})], "hm\n</think>\n\nyes<|end|>"),
    ],
)
def test_reasoning_that_a_prompt_opens_is_closed_before_an_answer(tokenizer, messages, scored):
    assert texts(tokenizer, OPENS_THINKING, talk(*messages)) == [("<|u|>hi<|end|>\n<|a|><think>\n" + scored, scored)]


def test_an_answer_continues_the_prompt_that_is_served_if_they_differ_in_white_space(tokenizer):
    made = texts(tokenizer, EMPTY_THINKING, talk(*TALK[:2]))
    assert made == [("<|u|>hi<|end|><|a|><think>\n</think>yes<|end|>", "</think>yes<|end|>")]


def test_a_turn_without_an_end_gets_the_end_of_text(tokenizer):
    first, second = texts(tokenizer, NO_END, talk(*TALK))
    assert first == ("<|u|>hi<|a|>yes<|endoftext|>", "yes<|endoftext|>")
    assert second == ("<|u|>hi<|a|>yes<|u|>so<|a|>no<|endoftext|>", "no<|endoftext|>")


def test_an_end_of_text_after_the_end_of_a_turn_is_left_out(tokenizer):
    assert texts(tokenizer, ENDS_TEXT, talk(*TALK)) == texts(tokenizer, KEEPS, talk(*TALK))


@pytest.mark.parametrize(
    ("template", "conversation", "settings", "words"),
    [
        (ALTERNATES, talk(("system", "be"), *TALK), {}, ["must alternate", "'hi'", "data.template"]),
        ("{% for", talk(*TALK), {}, ["fails", "data.template"]),
        (KEEPS, talk(*CALLING), {}, ["'get'", "'<|end|>", "data.template"]),
        ("{{ messages | length }}" + KEEPS, talk(*TALK), {}, ["'1<|u|>hi", "'2<|u|>hi"]),
        (
            EMPTY_THINKING,
            talk(("user", "hi"), ("assistant", "yes", {"reasoning_content": "hm"})),
            {"template_arguments": {"enable_thinking": False}},
            ["<think></think>'", "<think>hm</think>yes", "enable_thinking: true"],
        ),
        (None, talk(*TALK), {}, ["has none", "plain"]),
        (None, talk(*CALLING), {"template": "plain"}, ["tool calls"]),
        (None, talk(*TALK), {"template": "missing.jinja"}, ["'missing.jinja'"]),
    ],
)
def test_what_a_template_can_not_say_is_refused_in_one_sentence(tokenizer, template, conversation, settings, words):
    with pytest.raises(ConfigError) as raised:
        tokenise(tokenizer, template, conversation, **settings)
    assert [word for word in words if word not in str(raised.value)] == []


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [("template", "mine", "'mine'"), ("template_date", "today", "'today'"), ("turns", "first", "'first'")],
)
def test_wrong_settings_are_named(key, value, word):
    with pytest.raises(ConfigError, match=rf"`data\.{key}`.*{word}"):
        compose_run({"data": "chat", "data.train": "x", f"data.{key}": value})


def test_a_template_is_read_from_a_file(tokenizer, tmp_path):
    (tmp_path / "mine.jinja").write_text(KEEPS)
    made = texts(tokenizer, None, talk(*TALK), template=str(tmp_path / "mine.jinja"))
    assert made == texts(tokenizer, KEEPS, talk(*TALK))


def test_other_settings_of_a_template_are_not_taken_from_the_cache(tokenizer):
    assert len(texts(tokenizer, KEEPS, talk(*TALK))[0][1]) > len(
        texts(tokenizer, KEEPS, talk(*TALK), turns="last")[0][1]
    )


def make_merging_tokenizer():
    """A BPE tokenizer that merges the end of the prompt `a:` with an answer's first letter."""
    vocabulary = {token: n for n, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), ":y", "ye", "es"])}
    backend = Tokenizer(models.BPE(vocabulary, [(":", "y"), ("y", "e"), ("e", "s")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def make_metaspace_tokenizer():
    """A tokenizer that adds a space to the start of a text, as SentencePiece does."""
    vocabulary = {token: n for n, token in enumerate(["▁", *"\n:abcdefghijklmnopqrstuvwxyz", "▁y", ":y"])}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "y"), (":", "y")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


BORDERED = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}" + GENERATE.replace(
    "<|a|>", "a:"
)


@pytest.mark.parametrize("make", [load_tokenizer, make_merging_tokenizer, make_metaspace_tokenizer, ByT5Tokenizer])
def test_prompts_have_the_tokens_of_the_server_and_answers_their_own_text(make):
    tokenizer, conversation = make(), talk(*TALK)
    tokens, scored = [], []
    for ids, scores in tokenise(tokenizer, BORDERED, conversation):
        tokens.append(ids)
        scored += scores
    for index in (1, 3):
        prompt = serve(tokenizer, conversation, index)
        assert any(ids[: len(prompt)] == prompt for ids in tokens)
    end = tokenizer.eos_token
    assert tokenizer.decode(scored, skip_special_tokens=False).replace(" ", "") == f"yes{end}no{end}"
    whole = [tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") for ids in tokens]
    assert whole[-1] == f"u:hi{end}a:yes{end}u:so{end}a:no{end}"


def test_an_answer_that_merges_with_its_prompt_begins_with_a_token_of_its_own():
    tokenizer = make_merging_tokenizer()
    first, second = tokenise(tokenizer, BORDERED, talk(*TALK))  # the server tokenises the first answer again, merged
    assert tokenizer.convert_ids_to_tokens(first[1]) == ["ye", "s", "<|end|>"]
    assert ":y" in tokenizer.convert_ids_to_tokens(second[0])
    assert ":y" not in tokenizer.convert_ids_to_tokens(first[0])
