"""Overrides in Hydra's syntax: what they mean, which jobs `-m` makes of them, and how they are completed."""

from __future__ import annotations

import pytest

from lorasweep.config.command_line import complete_override, list_jobs, parse_overrides, sort_overrides
from lorasweep.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("method.rank=4", "method.rank", 4),
        ("optim.lr=1e-3", "optim.lr", 1e-3),
        ("method=lora", "method", "lora"),
        ("optim.clip_norm=null", "optim.clip_norm", None),
        ("trainer.progress=false", "trainer.progress", False),
        ("method.targets=[q_proj,v_proj]", "method.targets", ["q_proj", "v_proj"]),
        ("method.rank_pattern={q_proj:4}", "method.rank_pattern", {"q_proj": 4}),
        ("data.train='a b.txt'", "data.train", "a b.txt"),
        ("method.rank=choice(1,4,16)", "method.rank", [1, 4, 16]),
        ("method.rank=1,4,16", "method.rank", [1, 4, 16]),
        ("method.targets='a b','c'", "method.targets", ["a b", "c"]),
        ("method.targets=[q_proj],['v_proj']", "method.targets", [["q_proj"], ["v_proj"]]),
        ("optim.lr=interval(1e-4,1e-2)", "optim.lr", {"low": 1e-4, "high": 1e-2}),
        ("optim.lr=tag(log,interval(1e-4,1e-2))", "optim.lr", {"low": 1e-4, "high": 1e-2, "log": True}),
        ("method.rank=range(2,9,2)", "method.rank", {"low": 2, "high": 8, "step": 2}),
        ("method.rank=range(1,4)", "method.rank", {"low": 1, "high": 3, "step": 1}),
        ("arms.lora.optim.lr=1", "arms.lora.optim.lr", 1),
        ("++method.rank=4", "method.rank", 4),
        ("+method.rank_pattern.q_proj=4", "method.rank_pattern.q_proj", 4),
        ("+experiment=quick_check", "+experiment=quick_check", None),
        ("~logger", "~logger", None),
    ],
)
def test_hydras_words_become_values_and_ranges(override, key, value):
    assert parse_overrides([override]) == {key: value}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.rank", "an override must read `key=value`, but got"),
        ("=4", "an override must read `key=value`, but got"),
        ("method.rank=[1", "an override must read `key=value`, but got"),
        ("method.targets=.*(q|v)", r"""got 'method.targets=.*\(q\|v\)'. .* shell: 'method.targets="\.\*\(q\|v\)"'."""),
        ("data.text=#1 String", r"""got 'data.text=#1 String'. .* shell: 'data.text="#1 String"'."""),
        ("++method=full", r"`method` must be chosen without a plus, but got '\+\+method=full'."),
        ("method.rank=range(4,4)", "`method.rank` .* not empty"),
        ("method=glob(*)", r"`method` must be a value, a list or a range, but got 'method=glob\(\*\)'."),
    ],
)
def test_what_is_no_override_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        parse_overrides([override])


def test_hydras_own_settings_are_kept_from_the_run():
    words = ["hydra/launcher=joblib", "method.rank=4", "hydra.searchpath=[pkg://a,/b]", "+hydra.verbose=true"]
    sorted_words = sort_overrides(words)
    assert sorted_words.run == ("method.rank=4",)
    assert sorted_words.hydra == ("hydra/launcher=joblib", "+hydra.verbose=true")
    assert sorted_words.search_path == ("pkg://a", "/b")


@pytest.mark.parametrize(
    ("words", "jobs"),
    [
        (["method.rank=4"], [["method.rank=4"]]),
        (["method.rank=1,4"], [["method.rank=1"], ["method.rank=4"]]),
        (["method.rank=range(1,4)"], [["method.rank=1"], ["method.rank=2"], ["method.rank=3"]]),
        (["method=glob(b*)"], [["method=bitfit"]]),
        (["seed=1,2", "~logger", "method=lora"], [[f"seed={seed}", "~logger=null", "method=lora"] for seed in (1, 2)]),
        (["hydra/sweeper=basic", "+experiment=a,b"], [["+experiment=a"], ["+experiment=b"]]),
    ],
)
def test_a_grid_has_every_combination(words, jobs):
    assert list_jobs(sort_overrides(words), is_grid=True) == jobs


def test_an_experiment_may_have_a_grid(tmp_path, monkeypatch):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    grid = "# @package _global_\nhydra:\n  sweeper:\n    params:\n      method.rank: 1,4\n"
    (tmp_path / "conf" / "experiment" / "ranks.yaml").write_text(grid)
    monkeypatch.chdir(tmp_path)
    jobs = list_jobs(sort_overrides(["+experiment=ranks", "seed=3"]), is_grid=True)
    assert jobs == [[f"method.rank={rank}", "+experiment=ranks", "seed=3"] for rank in (1, 4)]


@pytest.mark.parametrize(
    ("words", "is_grid", "message"),
    [
        (["method.rank=1,4"], False, "`method.rank` must have one value, but got 'method.rank=1,4'. Add `-m`"),
        (["method.rank=interval(1,4)"], False, "ranges are for `lorasweep sweep`"),
        (["method.rank=interval(1,4)"], True, "`-m` must have values, .* Use `lorasweep sweep` to search an interval."),
        (["hydra/launcher=ghost"], False, "Could not find 'hydra/launcher/ghost'.*`pip install hydra-ghost-launcher`"),
        (["hydra.swep.dir=a"], False, "Could not override 'hydra.swep.dir'"),
        (["+hydra.sweeper.params.seed='1,2'"], True, "Hydra can't apply .*hydra.sweeper.params"),
    ],
)
def test_words_that_make_no_jobs_are_refused(words, is_grid, message):
    with pytest.raises(ConfigError, match=message):
        list_jobs(sort_overrides(words), is_grid=is_grid)


@pytest.mark.parametrize(
    ("prefix", "typed", "completions"),
    [
        ("method=b", [], ["method=bitfit"]),
        ("method.di", [], []),
        ("method.di", ["method=intrinsic"], ["method.dim="]),
        ("method.di", ["method=ghost"], []),
        ("++optim.lr_ratio_b", [], ["++optim.lr_ratio_b="]),
        ("~optim.eps", [], ["~optim.eps"]),
        ("+", [], ["+experiment="]),
        ("+experiment=q", [], ["+experiment=quick_check"]),
        ("pruner", [], []),
    ],
)
def test_a_word_is_completed_with_what_train_takes(prefix, typed, completions):
    assert complete_override(prefix, typed, primaries=["train"]) == completions


def test_a_sweep_also_takes_its_own_groups():
    assert "pruner=" in complete_override("prun", primaries=["sweep", "train"])
