"""A sweep that can't be meant is refused in one sentence that names key, value and remedy."""

import pytest

from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.arms import read_definition


@pytest.fixture
def read(write_file):
    """Reads a sweep file's content with overrides; returns the definition."""
    return lambda content, *overrides: read_definition(write_file(content), overrides)


def change(content, path, value):
    *parents, last = path
    for name in parents:
        content = content[name]
    if value is None:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["arm"], {}, r"`arm` is not a setting. Did you mean `arms`\?"),
        (["arms", "lora"], 3, "`arms.lora` must be a .*, but got 3."),
        (["arms", "a b"], {"settings": {}}, "an arm's name must .* letters.*, but got 'a b"),
        (["arms", "a-confirm"], {"settings": {}}, "must not end in .*`-confirm`.*, but got 'a-confirm'"),
        (["name"], "../x", "`name` must .* letters.*, but got '../x'."),
        (["arms", "lora", "spaces"], {}, r"`arms.lora.spaces` is not a setting. Did you mean `space`\?"),
        (["arms", "lora", "trials"], "six", "`arms.lora.trials` must be a whole number, but got 'six'."),
        (["arms", "frozen", "trials"], 2, "`arms.frozen.trials` must be 1 .*, but got 2. Add a `space`."),
        (["settings", "optim.lrr"], 1, r"arm `frozen`: `optim.lrr` is not a setting. Did you mean `optim.lr`\?"),
        (["arms", "lora", "settings", "method"], "lorra", r"`method` .*, but got 'lorra'. Did you mean `lora`\?"),
        (["arms", "lora", "space", "method.rnk"], [1], "`method.rnk` is not a setting. Did you mean `method.rank`"),
        (["arms", "lora", "space", "method.rank"], [4, 0], "arm `lora`: `method.rank >= 1` must hold, but got 0."),
        (["arms", "lora", "space", "optim.lr"], {"low": 0.1, "high": 0.01}, "arm `lora`: .*`optim.lr`.*`low <= high`"),
        (["arms", "lora", "space", "optim.beta1"], {"low": 0.5, "high": 1.5}, "arm `lora`: .*optim.beta1.*got 1.5."),
        (["settings", "sampler"], "tpee", r"`sampler` .*, but got 'tpee'. Did you mean `tpe`\?"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name(read, content, path, value, message):
    change(content, path, value)
    with pytest.raises(ConfigError, match=f"^made_up.yaml: .*{message}"):
        read(content)


@pytest.mark.parametrize("text", ["name: [", "just words", "- a\n- b\n", "name: ${nothing}", "a: 1\na: 2\n", ""])
def test_a_file_that_is_no_sweep_is_refused(read, text):
    with pytest.raises(ConfigError, match=r"made_up\.yaml"):
        read(text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"`optim.lrr` is not a setting. Did you mean `optim.lr`\?"),
        ("method.rnk=1", r"`method.rnk` must be a setting of at least one arm.* Did you mean `method.rank`\?"),
        ("arms.lorra.optim.lr=1", r"`arms.lorra.optim.lr` must be .* at least one arm \(frozen, full, lora\)"),
        ("arms.lora.method.rnk=1", r"arm `lora`: `method.rnk` is not a setting. Did you mean `method.rank`\?"),
        ("arms.lora.trials=many", "`sweep.trials` must be a whole number, but got 'many'."),
        ("arms.lora={trials: 2}", "`arms.lora` must be the settings of a new arm"),
        ("arms.lroa=null", r"null to leave out an arm .*lora.*, but got null\. Did you mean `arms.lora`"),
        ("~arms.lora", "`arms.ARM=null`"),
        ("output=outputs/mine", "`output` must be left out, .*`sweep.output=DIR`"),
        ("resume=true", "`resume` must be left out"),
    ],
)
def test_an_override_that_is_wrong_is_refused(read, content, override, message):
    with pytest.raises(ConfigError, match=message):
        read(content, override)


def test_a_range_where_no_arm_has_a_space_is_refused(read, content):
    words = ["arms.full=null", "arms.lora=null"]
    assert [arm.name for arm in read(content, *words).arms] == ["frozen"]
    with pytest.raises(ConfigError, match=r"`optim.lr` must be a setting of at least one arm \(frozen\)"):
        read(content, *words, "optim.lr=choice(0.1,0.2)")


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("method.rnak", "method.rank"),  # the nearest swept key
        ("optim.lr", "list"),
        ("method.init", "at least two choices"),
        (3, "3"),
    ],
)
def test_a_key_that_can_not_be_confirmed_one_by_one_is_refused_with_what_to_do(read, content, key, remedy):
    content["arms"]["lora"] |= {"confirm_each": key}
    content["arms"]["lora"]["space"]["method.init"] = ["gaussian"]
    with pytest.raises(ConfigError) as raised:
        read(content)
    assert all(part in str(raised.value) for part in ("confirm_each", str(key), remedy))


def test_a_subject_may_not_have_the_name_of_an_arm(read, content):
    content["arms"]["lora"]["confirm_each"] = "method.rank"
    content["arms"]["lora-rank-2"] = {"settings": {"method": "lora"}}
    with pytest.raises(ConfigError, match=r"lora-rank-2"):
        read(content)
