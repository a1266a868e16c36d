"""Hostile chat templates and files in `conf/` end in one sentence."""

import json

import pytest
from tests.fuzzing import feed

from lorasweep.outcome import WRONG_REQUEST

CHATS = [{"role": role, "content": f"a {role}"} for role in ("user", "assistant")]
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
