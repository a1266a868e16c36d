"""A function that a setting names is found, given what it asks for, and every mistake is one sentence."""

import sys

import pytest

from lorasweep.config.named import call_named, find_named
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
    return call_named(name, key="model.factory", offered=offered)


def test_function_gets_what_it_asks_for(own_module):
    assert call(f"{own_module}:build", dtype="fp32", labels=()) == ("fp32", 3)
    assert call(f"{own_module}:build", dtype="fp32", size=4) == ("fp32", 4)
    assert call(f"{own_module}:takes_all", dtype="fp32", labels=()) == {"dtype": "fp32", "labels": ()}
    assert call(f"{own_module}:plain", dtype="fp32") == 7


def test_module_is_found_in_the_current_folder(own_module):
    assert find_named(f"{own_module}:plain", key="model.factory")() == 7


def test_argument_that_is_not_offered_is_named(own_module):
    with pytest.raises(ConfigError, match="among dtype, labels, but 'own_functions:needs_more' needs 'path'"):
        call(f"{own_module}:needs_more", dtype="fp32", labels=())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "importing 'no_such_module' fails: ModuleNotFoundError: No module named 'no_such_module'"),
        ("own_broken:f", "importing 'own_broken' fails: ModuleNotFoundError: No module named 'not_installed_anywhere'"),
        ("own_functions:biuld", "'own_functions:biuld' is none of that name. Did you mean `build`"),
        ("own_functions:number", "'own_functions:number' is no callable"),
        ("own_functions:fails", "'own_functions:fails' fails: KeyError: 'the key"),
    ],
)
def test_wrong_name_is_one_sentence(own_module, name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        call(name, dtype="fp32")
    assert str(caught.value).startswith("`model.factory` must name a function")
    assert "\n" not in str(caught.value)
