"""No setting of a sweep is out of range."""

from __future__ import annotations

import pytest

from lorasweep.config.components import Component
from lorasweep.config.compose import compose_sweep
from lorasweep.config.sweep import (
    FixedSampler,
    HalvingPruner,
    MedianPruner,
    ModelBasedSampler,
    parse_margin,
)
from lorasweep.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler.startup_trials": 0}, "`sampler.startup_trials >= 1` must hold, but got 0."),
        ({"pruner.reduction_factor": 1}, "`pruner.reduction_factor >= 2` must hold, but got 1."),
        ({"pruner.rungs": []}, r"`pruner.rungs` must be ascending fractions of a run, .* but got \[\]."),
        ({"pruner.rungs": [0.5, 0.2]}, r"`pruner.rungs` must be ascending fractions .* but got \[0.5, 0.2\]."),
        ({"pruner.rungs": [0.2, 0.2]}, r"`pruner.rungs` must be ascending fractions .* but got \[0.2, 0.2\]."),
        ({"pruner.rungs": [0.0, 0.2]}, "`pruner.rungs` must be ascending fractions .* more than 0 and less than 1"),
        ({"pruner.rungs": [0.2, 1.0]}, "ascending fractions of a run.* but got"),
        ({"pruner.min_steps": 2}, "`pruner.min_steps` is not a setting."),
        ({"pruner": "median", "pruner.min_trials": 0}, "`pruner.min_trials >= 1` must hold, but got 0."),
        ({"pruner": "median", "pruner.min_fraction": 1.5}, "`pruner.min_fraction < 1` must hold, but got 1.5."),
        ({"pruner": "hyperband"}, "`pruner` must be one of halving, median, none, but got 'hyperband'."),
        ({"sampler": "cmaes"}, "`sampler` must be one of gp, grid, optunahub, qmc, random, tpe, but got 'cmaes'."),
        ({"worker.num": 2}, "`worker.num` must be 1 .*, but got 2. .* `worker=ray worker.num=2`"),
        ({"worker.num": 0}, "`worker.num` must be 1 .*, but got 0"),
        ({"worker": "ray", "worker.num": 0}, "`worker.num >= 1` must hold, but got 0"),
        ({"worker": "kubernetes"}, "`worker` must be one of local, ray, slurm, but got 'kubernetes'"),
        ({"worker.pack_size": 0}, "`worker.pack_size >= 1` must hold, but got 0."),
        ({"worker.pack_size": "all"}, "`worker.pack_size` must be a whole number, but got 'all'."),
        ({"worker.lease_s": 5}, "`worker.lease_s` is not a setting."),
        ({"storage": "postgresql"}, "`storage` must be a group of settings, but got 'postgresql'."),
        ({"sweep.trials": 0}, "`sweep.trials >= 1` must hold, but got 0."),
        ({"sweep.seed": -1}, "`sweep.seed >= 0` must hold, but got -1."),
        ({"confirm.seeds": -1}, "`confirm.seeds >= 0` must hold, but got -1."),
        ({"confirm.seeds": 1001}, "`confirm.seeds <= 1000` must hold, but got 1001."),
        ({"confirm.seeds": "many"}, "`confirm.seeds` must be a whole number, but got 'many'."),
        *(
            ({"confirm.margin": margin}, f"`confirm.margin` must be a positive number.* but got {margin!r}")
            for margin in (0.0, -0.1, "0%", "100%", "five", "%")
        ),
        ({"confirm.seed": 3}, r"`confirm.seed` is not a setting. Did you mean `confirm.seeds`\?"),
        ({"sweep.max_failures": 0}, "`sweep.max_failures >= 1` must hold, but got 0."),
        ({"sampler": "tpee"}, r"`sampler` must be one of .*, but got 'tpee'. Did you mean `tpe`\?"),
        ({"sampler": "random", "sampler.startup_trials": 3}, "`sampler.startup_trials` is not a setting."),
        ({"sweep.trails": 3}, r"`sweep.trails` is not a setting. Did you mean `sweep.trials`\?"),
    ],
)
def test_a_sweep_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        compose_sweep(settings)


@pytest.mark.parametrize(
    ("margin", "value", "is_share"), [("5%", 0.05, True), ("2.5 %", 0.025, True), (0.01, 0.01, False), (2, 2, False)]
)
def test_a_margin_is_a_share_of_the_gain_or_a_number(margin, value, is_share):
    found = parse_margin(compose_sweep({"confirm.margin": margin}).confirm.margin)
    assert (found.value, found.is_share_of_gain) == (pytest.approx(value), is_share)


def test_a_sampler_and_a_pruner_are_told_apart_by_name():
    sweep_config = compose_sweep({"sampler": "qmc", "pruner": "halving", "pruner.rungs": [0.25]})
    assert sweep_config.sampler == FixedSampler(name="qmc")
    assert sweep_config.pruner == HalvingPruner(
        name="halving", rungs=(0.25,), reduction_factor=2, min_survivors=1, criterion="metric"
    )
    assert isinstance(compose_sweep({}).sampler, ModelBasedSampler)
    assert isinstance(compose_sweep({"pruner": "median"}).pruner, MedianPruner)


def test_a_pruner_of_the_users_own_takes_any_argument():
    sweep_config = compose_sweep({"pruner._target_": "optuna.pruners.PercentilePruner", "pruner.percentile": 25.0})
    assert sweep_config.pruner == Component(target="optuna.pruners.PercentilePruner", arguments={"percentile": 25.0})


def test_a_sampler_of_the_users_own_takes_any_argument_and_the_place_of_ours():
    nested = {"sampler.base_sampler._target_": "optuna.samplers.RandomSampler", "sampler.base_sampler.seed": 3}
    sweep_config = compose_sweep({"sampler._target_": "optuna.samplers.PartialFixedSampler", **nested})
    inner = {"_target_": "optuna.samplers.RandomSampler", "seed": 3}
    assert sweep_config.sampler == Component(
        target="optuna.samplers.PartialFixedSampler", arguments={"base_sampler": inner}
    )


@pytest.mark.parametrize("group", ["sampler", "pruner"])
def test_a_class_of_a_package_that_is_not_trusted_is_refused(group):
    with pytest.raises(ConfigError, match=rf"`{group}._target_` must be a class of a package that is trusted"):
        compose_sweep({f"{group}._target_": "os.system", f"{group}.command": "true"})


@pytest.mark.parametrize(
    "url", ["postgresql+psycopg://me:open-sesame@host/db", "postgresql://me@host/db", "mysql://host/db?password=open-s"]
)
def test_an_address_of_a_database_with_a_secret_is_refused_without_saying_it(url):
    with pytest.raises(ConfigError, match=r"`storage.url` must have no user or password before an `@`") as refused:
        compose_sweep({"storage.url": url})
    assert "open-s" not in str(refused.value)
    assert "PGPASSWORD" in str(refused.value)


@pytest.mark.parametrize("url", [None, "postgresql+psycopg://host/db?user=me", "sqlite:////tmp/studies.db"])
def test_an_address_of_a_database_without_a_secret_is_taken(url):
    assert compose_sweep({"storage.url": url}).storage.url == url
