"""Conversations are tokenised as they are served: each kind of chat template, and what can't be served is refused."""

import json

import pytest
from tests.data.conftest import make_data
from tests.tiny_tokenizer import load_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from lorasweep.data.rows import IGNORED
from lorasweep.data.source import collect_examples
from lorasweep.errors import ConfigError
from lorasweep.tasks.chat.read import Conversation, Message
from lorasweep.tasks.chat.template import read_template
from lorasweep.tasks.chat.tokenise import tokenise_chats

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
    config = make_data("chat", **{"train": "x", "max_length": 4096, "template": "model"} | settings)
    made = tokenise_chats(collect_examples("train", [conversation]), config=config, tokenizer=tokenizer)
    examples = []
    for n in range(len(made["input_ids"])):
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


REASONED = [(role, text, {"reasoning_content": "hm"}) if role == "assistant" else (role, text) for role, text in TALK]
THOUGHT = "<think>hm</think>"
START = "<|u|>hi<|end|>\n<|a|>"
RENDERED = {
    "keeps turns: one example, without what follows the end of a turn": (
        (KEEPS, TALK, {}),
        [(START + "yes<|end|>\n<|u|>so<|end|>\n<|a|>no<|end|>", "yes<|end|>no<|end|>")],
    ),
    "rewrites earlier turns: an example of each answer": (
        (DROPS_REASONING, REASONED, {}),
        [
            (f"<|u|>hi<|end|><|a|>{THOUGHT}yes<|end|>", f"{THOUGHT}yes<|end|>"),
            (f"<|u|>hi<|end|><|a|>yes<|end|><|u|>so<|end|><|a|>{THOUGHT}no<|end|>", f"{THOUGHT}no<|end|>"),
        ],
    ),
    "without an end of a turn: the end of text": (
        (NO_END, TALK, {}),
        [
            ("<|u|>hi<|a|>yes<|endoftext|>", "yes<|endoftext|>"),
            ("<|u|>hi<|a|>yes<|u|>so<|a|>no<|endoftext|>", "no<|endoftext|>"),
        ],
    ),
    "writes before the first turn": (
        (HAS_SYSTEM_PROMPT, TALK[:2], {}),
        [("<|s|>You help.<|end|>\n" + START + "yes<|end|>", "yes<|end|>")],
    ),
    "marks what is scored": ((MARKED, TALK[:2], {}), [(START + "Well: yes<|end|>", "yes<|end|>")]),
    "the day of the settings": (
        (DATED, TALK[:2], {"template_date": "2031-01-02"}),
        [("<|s|>02 Jan 2031<|end|>" + START + "yes<|end|>", "yes<|end|>")],
    ),
    "arguments": (
        ("{{ mood }}" + KEEPS, TALK[:2], {"template_arguments": {"mood": "kind"}}),
        [("kind" + START + "yes<|end|>", "yes<|end|>")],
    ),
    "opens reasoning": (
        (OPENS_THINKING, TALK[:2], {}),
        [(START + "<think>\n\n</think>\n\nyes<|end|>", "\n</think>\n\nyes<|end|>")],
    ),
    "opens reasoning that there is": (
        (OPENS_THINKING, REASONED[:2], {}),
        [(START + "<think>\nhm\n</think>\n\nyes<|end|>", "hm\n</think>\n\nyes<|end|>")],
    ),
    "differs from the prompt in white space": (
        (EMPTY_THINKING, TALK[:2], {}),
        [("<|u|>hi<|end|><|a|><think>\n</think>yes<|end|>", "</think>yes<|end|>")],
    ),
    "an end of text after the end of a turn": (
        (ENDS_TEXT, TALK[:2], {}),
        [(START + "yes<|end|>", "yes<|end|>")],
    ),
}


@pytest.mark.parametrize("kind", RENDERED)
def test_a_template_gives_the_prompts_of_a_server_and_the_answers_of_the_model(tokenizer, kind):
    (template, messages, settings), expected = RENDERED[kind]
    assert texts(tokenizer, template, talk(*messages), **settings) == expected


@pytest.mark.parametrize("template", [KEEPS, DROPS_REASONING])
def test_only_the_last_answer_is_scored_if_asked(tokenizer, template):
    ((text, scored),) = texts(tokenizer, template, talk(*TALK), turns="last")
    assert text.startswith("<|u|>hi<|end|>")
    assert scored.endswith("no<|end|>")
    assert "yes" not in scored


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
    ("template", "conversation", "settings", "words"),
    [
        (ALTERNATES, talk(("system", "be"), *TALK), {}, ["must alternate", "'hi'", "data.template"]),
        ("{{ bos_token }}\n{% for", talk(*TALK), {}, ["line 2", "data.template"]),
        ("{{ cycler.__init__.__globals__.os.system('touch canary') }}", talk(*TALK), {}, ["unsafe", "data.template"]),
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
        (KEEPS, talk(*TALK), {"template": "mine"}, ["`data.template`", "'mine'"]),
        (KEEPS, talk(*TALK), {"template_date": "today"}, ["`data.template_date`", "'today'"]),
        (KEEPS, talk(*TALK), {"turns": "first"}, ["`data.turns`", "'first'"]),
    ],
)
def test_what_a_template_can_not_say_is_refused_in_one_sentence(tokenizer, template, conversation, settings, words):
    with pytest.raises(ConfigError) as raised:
        tokenise(tokenizer, template, conversation, **settings)
    assert [word for word in words if word not in str(raised.value)] == []


def test_a_conversation_that_a_template_does_not_write_is_named(tokenizer):
    tokenizer.chat_template = KEEPS
    template = read_template(make_data("chat", train="x", template="model"), tokenizer)
    talks = [talk(*(CALLING if n in (2, 5) else TALK))._replace(number=n, source="c.jsonl") for n in range(1, 6)]
    with pytest.raises(ConfigError) as raised:
        list(template.render_turns(talks, only_last=False))
    said = str(raised.value)
    assert "row 2 of 'c.jsonl'" in said
    assert "'get'" in said


@pytest.mark.parametrize(
    "name", ["add_generation_prompt", "chat_template", "messages", "tools", "documents", "tokenize", "eos_token"]
)
def test_variables_that_the_template_gets_anyway_are_refused(tokenizer, name):
    with pytest.raises(ConfigError, match=rf"`data\.template_arguments` .*`{name}`"):
        tokenise(tokenizer, KEEPS, talk(*TALK), template_arguments={name: "x"})


NOT_TRAINED = [*TALK[:1], ("assistant", "yes", {"weight": 0}), *TALK[2:]]


@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (KEEPS, (START + "yes<|end|>\n<|u|>so<|end|>\n<|a|>no<|end|>", "no<|end|>")),
        (None, ("<|endoftext|>hi\nyes<|endoftext|>\nso\nno<|endoftext|>", "no<|endoftext|>")),
    ],
)
def test_an_answer_of_weight_0_is_read_but_not_scored(tokenizer, template, expected, turns):
    settings = {"turns": turns, "template": "model" if template else "plain"}
    assert texts(tokenizer, template, talk(*NOT_TRAINED), **settings) == [expected]


def test_a_template_is_read_from_a_file(tokenizer, tmp_path):
    (tmp_path / "mine.jinja").write_text(KEEPS)
    made = texts(tokenizer, None, talk(*TALK), template=str(tmp_path / "mine.jinja"))
    assert made == texts(tokenizer, KEEPS, talk(*TALK))
    (tmp_path / "marked.jinja").write_text(KEEPS, encoding="utf-8-sig")
    assert made == texts(tokenizer, None, talk(*TALK), template=str(tmp_path / "marked.jinja"))


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
