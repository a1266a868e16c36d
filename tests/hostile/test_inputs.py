"""Hostile scores, chat templates and files in `conf/` end in one sentence."""

import gzip
import json
import os

import pytest
from tests.fuzzing import feed

from lorasweep.outcome import DONE, WRONG_REQUEST

ARMS = "full", "lora", "frozen"
SCORES = "arm,seed,score\n" + "".join(f"{arm},{seed},0.8{seed}\n" for arm in ARMS for seed in (1, 2))
JUDGE = ["judge", "scores.csv", "--metric", "accuracy", "--maximize", "--margin", "0.01"]
CHATS = [{"role": role, "content": f"a {role}"} for role in ("user", "assistant")]
SHOWN = {
    "as usual": SCORES,
    "markup": SCORES.replace("lora", "[/red]"),
    "control characters": SCORES.replace("lora", "\x1b[2J"),
    "long name": SCORES.replace("lora", "x" * 100_000),
    "path": SCORES.replace("lora", "../../x"),
    "seeds of two types": SCORES.replace("lora,1", "lora,a"),
    "other seeds": SCORES.replace("lora,", "lora,9"),
    "large": SCORES.replace("0.8", "1e9"),
    "values of two types": SCORES.replace("score\n", "score,value\n").replace("1\n", "1,a\n").replace("2\n", "2,3\n"),
}
REFUSED = {
    "empty": "",
    "only a header": "arm,seed,score\n",
    "NULs": "\0" * 1000,
    "UTF-16": SCORES.encode("utf-16"),
    "gzip": gzip.compress(SCORES.encode()),
    "NaN": SCORES.replace("0.81", "nan"),
    "infinite": SCORES.replace("0.81", "1e400"),
    "too large": SCORES.replace("0.81", "1e308"),
    "5,000 digits": SCORES.replace("0.81", "9" * 5000),
    "text": SCORES.replace("0.81", "x"),
    "no seed": SCORES.replace("lora,1", "lora,"),
    "twice": SCORES + "lora,1,0.5\n",
    "two columns of one name": SCORES.replace("seed", "arm"),
    "100,000 columns": SCORES.replace("score\n", "score" + ",c" * 100_000 + "\n"),
    "2,000 seeds": SCORES + "".join(f"{arm},{n},1\n" for n in range(3, 2000) for arm in ARMS),
    "200 arms": SCORES + "".join(f"a{number},1,0.5\n" for number in range(200)),
    "zero weights": SCORES.replace("score\n", "score,weight\n").replace("1\n", "1,0\n").replace("2\n", "2,0\n"),
    "open quote": SCORES + '"',
}
TEMPLATES = {
    "endless": "{% for i in range(10**12) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}",
    "2 GB": "{{ 'x' * 2000000000 }}",
    "2 GB padded": "{{ '%02000000000d' % 1 }}",
    "doubled": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
    "other file": "{% include '/etc/passwd' %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nested": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "broken": "{% for %}",
    "constant": "hello",
    "empty": "",
}
CONF = [
    ("sweep.yaml", text)
    for text in ("[", "- a", "\0", "a: ${b}\nb: ${a}", "!!python/object/apply:os.system ['touch canary']")
]
CONF += [("train.yaml", text) for text in ("[", "defaults: 3", "optim: 3")]


@pytest.mark.parametrize("name", SHOWN)
def test_odd_scores_are_judged(here, name, capsys):
    (here / "scores.csv").write_text(SHOWN[name])
    assert feed(*JUDGE, capsys=capsys) == DONE


@pytest.mark.parametrize("name", REFUSED)
def test_scores_that_can_not_be_judged_are_refused(here, name, capsys):
    content = REFUSED[name]
    (here / "scores.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert feed(*JUDGE, capsys=capsys) == WRONG_REQUEST


def test_what_is_no_file_of_scores_is_not_opened(here, capsys):
    os.mkfifo(here / "scores.csv")
    assert feed(*JUDGE, capsys=capsys) == WRONG_REQUEST
    assert feed(*JUDGE, "--looks", *range(1, 100), capsys=capsys) == WRONG_REQUEST


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_chat_template_is_refused(here, name, capsys):
    (here / "chats.jsonl").write_text("".join(json.dumps({"messages": CHATS}) + "\n" for _ in range(5)))
    (here / "template.jinja").write_text(TEMPLATES[name])
    settings = "data=chat", "data.train=chats.jsonl", "data.template=template.jinja", "model.path=embedded:tiny"
    assert feed("train", *settings, "--show-examples", 1, capsys=capsys) == WRONG_REQUEST
    assert not (here / "canary").exists()


@pytest.mark.parametrize(("name", "text"), CONF)
def test_broken_files_in_conf_are_refused_or_ignored(here, name, text, capsys):
    (here / "conf").mkdir()
    (here / "conf" / name).write_text(text)
    feed("sweep", "quickstart", "--cfg", "job", capsys=capsys)
    assert not (here / "canary").exists()
