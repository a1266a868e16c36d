"""A sweep file is found and read; what can't be meant is refused with key, value and remedy, and no code is run."""

import pytest

from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.sweep_file import find_sweep_file


def refuse(words, function, *arguments, **named):
    with pytest.raises(ConfigError) as raised:
        function(*arguments, **named)
    assert [word for word in words if word not in str(raised.value)] == []


def test_a_sweep_is_found_by_path_or_name(write_file, content, here):
    path = write_file(content)
    assert find_sweep_file(str(path)) == path
    assert find_sweep_file("quickstart").name == "quickstart.yaml"
    (here / "sweeps").mkdir()
    (here / "sweeps" / "quickstart.yaml").write_text("name: mine\n")
    assert find_sweep_file("quickstart") == here / "sweeps" / "quickstart.yaml"


@pytest.mark.parametrize(
    "text",
    [
        *("name: [", "just words", "- a\n- b\n", "name: ${nothing}", "a: 1\na: 2\n", ""),
        "a: ${b}\nb: ${a}",
        *("name: !!timestamp x", "name: !!bool x", "name: !!binary aGk="),
        "name: !!python/object/apply:os.system ['touch ran']\narms: {a: {settings: {method: frozen}}}",
    ],
)
def test_a_file_that_is_no_sweep_is_refused_and_no_code_runs(read, here, text):
    refuse(["made_up.yaml"], read, text)
    assert not (here / "ran").exists()


LORA = "arms", "lora"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["arm"], {}, ["`arm`", "`arms`"]),
        (LORA, 3, ["`arms.lora`", "got 3"]),
        (["arms", "a b"], {}, ["an arm's name", "letters", "'a b'"]),
        (["arms", "a-confirm"], {}, ["`-confirm`", "'a-confirm'", "Rename"]),
        (["name"], "../x", ["`name`", "letters", "'../x'"]),
        (["arms"], {str(number): {} for number in range(101)}, ["`arms`", "1 to 100 arms", "has 101"]),
        ([*LORA, "space", "method.rank"], list(range(1, 1002)), ["`method.rank`", "at most 1,000", "has 1,001"]),
        (["settings", "sweep.output"], "a\0b", ["`sweep.output`", "NUL", r"'a\x00b'"]),
        ([*LORA, "spaces"], {}, ["`arms.lora.spaces`", "`arms.lora.space`"]),
        (["arms", "frozen", "trials"], 2, ["`arms.frozen.trials`", "2", "Add a `space`"]),
        ([*LORA, "space", "method.rank"], [4, 0], ["`lora`", "`method.rank >= 1`", "0"]),
        ([*LORA, "space", "optim.beta1"], {"low": 0.5, "high": 1.5}, ["`lora`", "optim.beta1", "1.5"]),
        ([*LORA, "confirm_each"], "method.rnak", ["confirm_each", "method.rnak", "method.rank"]),
        ([*LORA, "confirm_each"], "optim.lr", ["confirm_each", "optim.lr", "a list"]),
        (["arms", "lora-rank-2"], {"settings": {"method": "lora"}}, ["lora-rank-2", "rename"]),
    ],
)
def test_a_wrong_key_or_value_of_a_file_is_refused(read, content, path, value, words):
    content["arms"]["lora"]["confirm_each"] = "method.rank"
    *parents, last = path
    place = content
    for name in parents:
        place = place[name]
    place[last] = value
    refuse(["made_up.yaml: ", *words], read, content)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method.rnk=1"], ["`method.rnk`", "at least one arm (frozen, full, lora)", "`method.rank`"]),
        (["arms.lorra.optim.lr=1"], ["`arms.lorra.optim.lr`", "at least one arm (frozen, full, lora)"]),
        (["arms.lora={trials: 2}"], ["`arms.lora={...}`", "a new arm", "`arms.lora.KEY=VALUE`"]),
        (["arms.lora=2"], ["`arms.lora`", "null", "but got 2", "`arms.lora.KEY=VALUE`"]),
        (["~arms.lora"], ["~arms.lora", "`arms.ARM=null`"]),
        (["+experiment=quick_check"], ["+experiment=quick_check", "`lorasweep train`"]),
        (["output=mine"], ["`output`", "'mine'", "`sweep.output=DIR`"]),
        (["resume=true"], ["`resume`", "True", "`--resume DIR`"]),
        (["arms.full=null", "arms.lora=null", "optim.lr=1,2"], ["`optim.lr`", "at least one arm (frozen)"]),
    ],
)
def test_a_wrong_override_is_refused(read, content, overrides, words):
    refuse(words, read, content, *overrides)
