"""A function that a setting names is found, given what it asks for, and every mistake is one sentence."""

import sys

import pytest

from lorasweep.config.components import call_user_function
from lorasweep.errors import ConfigError

MODULE = """
def build(dtype, size=3):
    return dtype, size
def takes_all(**given):
    return given
def plain():
    return 7
def needs_more(dtype, path):
    return None
def positional(dtype, /):
    return None
def fails():
    raise KeyError("the key\\nand more")
number = 5
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module in the current folder; the search path is afterwards as it was."""
    (tmp_path / "own_functions.py").write_text(MODULE)
    (tmp_path / "own_broken.py").write_text("import not_installed_anywhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield "own_functions"
    sys.modules.pop("own_functions", None)


def call(name, **offered):
    return call_user_function(name, key="model.factory", offered=offered)


def test_function_gets_what_it_asks_for(own_module):
    assert call(f"{own_module}:build", dtype="fp32", labels=()) == ("fp32", 3)
    assert call(f"{own_module}:build", dtype="fp32", size=4) == ("fp32", 4)
    assert call(f"{own_module}:takes_all", dtype="fp32", labels=()) == {"dtype": "fp32", "labels": ()}
    assert call(f"{own_module}:plain", dtype="fp32") == 7


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("no_such_module:f", ["'no_such_module:f'", "No module named 'no_such_module'"]),
        ("own_broken:f", ["'own_broken:f'", "No module named 'not_installed_anywhere'"]),
        ("own_functions:biuld", ["'own_functions:biuld'", "no attribute 'biuld'"]),
        ("own_functions:number", ["'own_functions:number'", "5 is not a callable"]),
        ("own_functions:fails", ["'own_functions:fails'", "KeyError: 'the key"]),
        ("own_functions:needs_more", ["the arguments dtype", "'own_functions:needs_more'", "'path'"]),
    ],
)
def test_a_function_that_can_not_be_called_is_one_sentence(own_module, name, fragments):
    with pytest.raises(ConfigError) as caught:
        call(name, dtype="fp32")
    message = str(caught.value)
    assert message.startswith("`model.factory` must")
    assert [fragment for fragment in fragments if fragment not in message] == []
    assert "\n" not in message
