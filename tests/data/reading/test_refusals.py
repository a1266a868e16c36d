"""Data that can't be used is refused in one sentence with the setting or the place, the value and the remedy."""

import gzip

import pytest
from tests.data.conftest import jsonl_of, said

from lorasweep.errors import ConfigError


def rows(*lines, header="text,label"):
    return "\n".join([header, *lines, ""])


def talk(*messages, **columns):
    return jsonl_of({"messages": list(messages), **columns})


def labelled(label):
    return {"text": "a", "label": label}


GOOD = rows("a,x", "b,y", "c,x")
USER, ANSWER = said("user", "hi"), said("assistant", "hello")
CALLING = {"role": "assistant", "tool_calls": [{"name": "get", "arguments": {"n": 7}}]}
LABEL = "`data.label=label`"
KINDS = {"a.xlsx": "", "b.csv": "", "c.tsv": "", "sms": ""}
REGRESSION = {"task": "regression"}
FILES = [
    ("train.csv", "", ["has none"]),
    ("train.jsonl", "\n", ["has none"]),
    ("train.csv", rows("a,x", "b,x,z"), ["line 3", "2 fields", "`data.delimiter`"]),
    ("train.csv", rows("b,x,z", "c,x,z"), ["does not match"]),
    ("train.csv", rows('"b,x', "c,y"), ["inside string"]),
    ("train.csv", "txt,label\na,b\n", ["`data.text`", "['txt', 'label']", "`data.columns`"]),
    ("train.csv", b"text,label\n\xff,b\n", ["UTF-8", "iconv -f cp1252 -t utf-8 train.csv > train-utf8.csv"]),
    ("train.csv.gz", GOOD, ["gzip"]),
    ("train.csv.gz", gzip.compress(GOOD.encode(), mtime=0)[:-9], ["ended"]),
    ("train.json", "[1", ["json"]),
    ("train.jsonl", '{"text": "a", "label": 1}\n{"text"}\n', ["JSON", "line 2"]),
    ("train.jsonl", '{"text": "a"}\n5\n', ["line 2", "an object", "5"]),
    ("train.json", '[{"text": "a"},\n{"text" "b"}]', ["line 2", "column 9"]),
    ("train.parquet", "PAR1 but not really", ["parquet"]),
]
ROWS = [
    (["fine,a", " ,b"], {}, ["row 2 of 'train.csv'", "`text` ' '", "remove"]),
    ([",b", ",b", "c,a"], {}, ["row 1", "2 rows"]),
    (["fine,"], {}, ["row 1 of 'train.csv'", "column 'label'"]),
    (["a,x", "b,x"], {}, [LABEL, "two different labels", "['x']"]),
    (["a,2.5", "b,2.5"], {}, [LABEL, "two different labels", "2.5"]),
    (["a,1", "b,x"], REGRESSION, [LABEL, "finite number", "'x'"]),
    (["a,1", "b,1e999"], REGRESSION, [LABEL, "finite number", "'1e999'"]),
    ([f"a{n},{n}" for n in range(30)], {}, [LABEL, "30 different values", "`data.task`"]),
    (["a,x", "b,y"], {}, ["`data.train`", "at least 3 different examples", "has 2"]),
    (["a,x", "b,y", "c,x"], {"label": "text"}, ["`data.label`", "different columns", "'text'"]),
]
NO_FILES = ["*.parquet", "x" * 5000, "~nobody-here/a.csv"]
CHATS = [
    (jsonl_of({"prompt": "", "completion": "b"}), ["row 1 of 'train.jsonl'", "`prompt` ''", "`completion` 'b'"]),
    (jsonl_of({"prompt": "a", "completion": None}), ["text", "None"]),
    (jsonl_of({"prompt": "a"}), ["'train.jsonl'", "['prompt']", "`data.prompt`", "`data.messages`"]),
    (jsonl_of({"messages": "hi"}), ["list of messages", "'hi'"]),
    (talk(USER), ["assistant's", "'user'"]),
    (talk(said("user", [{"type": "image", "url": "x"}])), ["must have a text", "image"]),
    (talk(said("bot", "hi")), ["system, developer, user, assistant, tool", "'bot'"]),
    (talk({"speaker": "USER", "content": "hi"}), ["`role` and `content`", "'speaker'"]),
    (talk(USER, said("assistant", " ")), ["each message of the assistant", "' '"]),
    (talk(said("system", "be brief"), said("user", ""), ANSWER), ["must have a text", "''", "message 2"]),
    (talk(USER, CALLING, USER, ANSWER), ["each tool call", "user", "calls: 1"]),
    (talk(USER, said("tool", "7"), ANSWER), ["role tool", "calls: 0"]),
    (talk(USER, {**CALLING, "tool_calls": [{"name": "get", "arguments": "7"}]}), ["object"]),
    (talk(USER, {**CALLING, "tool_calls": "get()"}), ["JSON list", "'get()'"]),
    (talk(USER, {**ANSWER, "weight": 0.5}), ["weight 0", "0.5", "message 2"]),
    (talk(USER, {**ANSWER, "weight": 0}), ["whose weight is not 0"]),
    (talk(USER, ANSWER, tools="get"), ["JSON list", "`tools`", "'get'"]),
]
BAD = said("assistant", "go")
PAIRS = [
    ({"prompt": "a", "chosen": "b"}, ["`data.rejected`", "'train.jsonl'", "'rejected'"]),
    ({"prompt": "a", "answer": "b", "rejected": "c"}, ["`data.chosen`", "'chosen'"]),
    ({"prompt": [USER], "chosen": [ANSWER], "rejected": "go"}, ["two texts or two lists of messages", "one of each"]),
    ({"prompt": "a", "chosen": [USER, ANSWER], "rejected": [USER, BAD]}, ["continues the prompt", "in `chosen`"]),
    ({"chosen": [USER, ANSWER], "rejected": [said("user", "ho"), BAD]}, ["answers to one prompt"]),
    ({"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, BAD, USER, BAD]}, ["answers to one prompt"]),
    ({"chosen": [ANSWER], "rejected": [BAD]}, ["answers to one prompt", "has none"]),
    ({"chosen": "yes", "rejected": "no"}, ["must have a prompt", "same words"]),
    (
        {"prompt": [USER, USER], "chosen": [ANSWER], "rejected": [BAD]},
        ["roles that alternate", "['user', 'user', 'ass"],
    ),
    ({"prompt": [USER, ANSWER], "chosen": "b", "rejected": "c"}, ["roles that alternate"]),
    ({"prompt": "a", "chosen": "b", "rejected": [said("bot", "c")]}, ["one of each"]),
    ({"prompt": "a", "chosen": [ANSWER], "rejected": [said("bot", "c")]}, ["'bot'", "message 1", "in `rejected`"]),
    ({"prompt": "a", "chosen": 5, "rejected": 6}, ["must have a text", "5"]),
    ({"prompt": None, "chosen": "b", "rejected": "c"}, ["must have a text", "None"]),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, ["row 1 of 'train.jsonl'", "different answers"]),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["`data.train`", "at least 3 different examples", "has 1"]),
]
# kind of data, files, settings, words of the message
CASES = [
    *(("table", {file: content}, {"train": file}, [f"'{file}'", *words]) for file, content, words in FILES),
    # columns of test data, which are checked before a row is read
    ("table", {"train.csv": GOOD, "test.csv": "txt,label\nb,y\n"}, {}, ["`data.text`", "'test.csv'", "Did you mean"]),
    ("table", {"train.csv": GOOD, "test.csv": "text|label\nb|y\n"}, {}, ["['text|label']", "`data.delimiter`"]),
    (
        "table",
        {"train.csv": "text,label,by\na,x,1\n", "test.csv": GOOD},
        {"group": "by"},
        ["`data.group`", "'test.csv'"],
    ),
    ("table", {"train.csv": GOOD, "test.jsonl": jsonl_of({"txt": "b"})}, {}, ["`data.text`", "'test.jsonl'", "`txt`"]),
    ("table", {"train.csv": GOOD, "test.parquet": ""}, {}, ["'test.parquet'"]),
    # rows and labels
    *(("table", {"train.csv": rows(*lines)}, settings, words) for lines, settings, words in ROWS),
    ("table", {"train.jsonl": jsonl_of(labelled(1), labelled(True))}, REGRESSION, [LABEL, "finite number", "True"]),
    (
        "table",
        {"train.jsonl": jsonl_of(labelled("x"), labelled({"a": 1}))},
        {},
        ["row 2", "must have texts"],
    ),
    (
        "table",
        {"train.csv": GOOD},
        {"labels": ["a", "b", "c"]},
        ["`data.labels`", "2 classes", "('x', 'y')"],
    ),
    ("table", {"train.csv": "text,lable\na,x\n"}, {}, ["`data.label`", "'train.csv'", "`lable`"]),
    ("table", {"train.csv": GOOD}, {"text_pair": "b"}, ["`data.text_pair`", "'train.csv'", "'b'"]),
    # names of files
    *(
        ("table", KINDS, {"train": name}, ["`data.train`", repr(name)])
        for name in (".", "a.xlsx", "*.*", "[bc].*", "sms")
    ),
    *(("table", {}, {"train": name}, ["`data.train` must name an existing file"]) for name in NO_FILES),
    ("table", {"reviews.csv": GOOD}, {"train": "reviws.csv"}, ["`data.train`", "Did you mean `reviews.csv`"]),
    # texts
    ("text", {"a.txt": "  \n"}, {"train": "a.txt"}, ["`data.train`", "'a.txt'", "empty"]),
    ("text", {"books/.hidden": "x"}, {"train": "books"}, ["`data.train`", "'books'"]),
    ("text", {"books/b.png": b"\x89PNG"}, {"train": "books"}, ["'books/b.png'", "UTF-8"]),
    ("text", {"a.txt": "ab"}, {"train": "a.txt"}, ["`data.train`", "validation and test", "Give more text"]),
    ("text", {"book.txt": "a"}, {"train": "bok.txt"}, ["`data.train`", "'bok.txt'", "`book.txt`"]),
    ("text", {"e.txt": "a"}, {"train": "pairs.txt"}, ["but got 'pairs.txt'."]),
    # conversations
    (
        "chat",
        {"a.jsonl": jsonl_of({"prompt": "a", "completion": "b"}), "b.jsonl": talk(USER, ANSWER)},
        {"train": "[ab].jsonl"},
        ["`data.train`", "same columns", "['prompt', 'completion']", "'b.jsonl'"],
    ),
    *(("chat", {"train.jsonl": content}, {}, words) for content, words in CHATS),
    *(("preferences", {"train.jsonl": jsonl_of(row)}, {}, words) for row, words in PAIRS),
]


@pytest.mark.parametrize(("name", "files", "settings", "words"), CASES)
def test_data_that_can_not_be_used_is_refused(read, name, files, settings, words):
    with pytest.raises(ConfigError) as raised:
        read(name, files, **settings)
    assert [word for word in words if word.lower() not in str(raised.value).lower()] == []
