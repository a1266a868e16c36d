"""Overrides in Hydra's syntax: what they mean, and how they are completed."""

import re
import shlex

import pytest

from lorasweep.config.command_line import format_override, parse_overrides
from lorasweep.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("method.rank=4", "method.rank", 4),
        ("method.targets=[q_proj,v_proj]", "method.targets", ["q_proj", "v_proj"]),
        ("data.train='a b.txt'", "data.train", "a b.txt"),
        ("method.rank=1,4,16", "method.rank", [1, 4, 16]),
        ("method.targets='a b','c'", "method.targets", ["a b", "c"]),
        ("method.targets=[q_proj],['v_proj']", "method.targets", [["q_proj"], ["v_proj"]]),
        ("optim.lr=tag(log,interval(1e-4,1e-2))", "optim.lr", {"low": 1e-4, "high": 1e-2, "log": True}),
        ("method.rank=range(2,9,2)", "method.rank", {"low": 2, "high": 8, "step": 2}),
        ("++method.rank=4", "method.rank", 4),
        ("+method.rank_pattern.q_proj=4", "method.rank_pattern.q_proj", 4),
        ("+experiment=quick_check", "+experiment=quick_check", None),
        ("~logger", "~logger", None),
    ],
)
def test_hydras_words_become_values_and_ranges(override, key, value):
    assert parse_overrides([override]) == {key: value}


FULL = {"settings": {"method": "full"}, "space": {"optim.lr": {"low": 1e-5, "high": 1e-3, "log": True}}}


@pytest.mark.parametrize(
    "value",
    [
        1e-5,
        True,
        None,
        "",
        "5%",
        "1",
        "it's",
        'say "so"',
        "C:\\x",
        "a\\",
        "a,b",
        "${x}",
        ["a", "1"],
        FULL,
    ],
    ids=repr,
)
def test_a_formatted_override_is_read_as_the_same_value(value):
    assert parse_overrides(shlex.split(format_override("data.text", value))) == {"data.text": value}


RANGES = ["range(4,4)", "range(1,5,0)", "range(0,1000000000000)", "range(0.1,1000000000000)"]
NO_OPTIONS = ["model=null", "logger=5", "~logger=true", "+optim=[1,2]", "optim={lr:1}", "+experiment=[1]"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.rank", "an override must read `key=value`, but got"),
        ("=4", "an override must read `key=value`, but got"),
        ("method.targets=.*(q|v)", r"""got 'method.targets=.*\(q\|v\)'. .* shell: 'method.targets="\.\*\(q\|v\)"'."""),
        ("data.text=#1 String", r"""got 'data.text=#1 String'. .* shell: 'data.text="#1 String"'."""),
        *((f"method.rank={span}", "`method.rank` .* 1 to 100,000 values") for span in RANGES),
        *((word, f"must be one of .*, but got '{re.escape(word)}'") for word in NO_OPTIONS),
        ("method=glob(*)", r"`method` must be a value, a list or a range, but got 'method=glob\(\*\)'."),
    ],
)
def test_what_is_no_override_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        parse_overrides([override])
