"""Hydra's words and files become settings; what does not compose is one sentence that names the nearest valid thing."""

import pytest
from omegaconf import OmegaConf

from lorasweep.config.build import as_settings
from lorasweep.config.compose import (
    LIST_GROUPS,
    compose_run,
    compose_sweep,
    default_options,
    group_options,
    hydra_session,
    layer_settings,
    packaged_folder,
)
from lorasweep.errors import ConfigError


def test_a_setting_of_peft_is_set_alone_or_with_the_whole_mapping():
    whole = {"peft_type": "VERA", "r": 8, "target_modules": ["q_proj"]}
    settings = {"method": "peft", "method.config": whole, "method.config.r": 16}
    assert compose_run(settings).method.config == {**whole, "r": 16}
    with pytest.raises(ConfigError, match=r"`method.config` is not a setting"):
        compose_run({"method.config.r": 16})


def test_several_loggers_and_callbacks_are_chosen_at_once():
    config = compose_run({"logger": ["tensorboard", "csv"], "callbacks": ["lr_monitor"], "logger.csv.prefix": "a"})
    assert list(config.logger) == ["tensorboard", "csv"]
    assert config.logger["csv"].arguments == {"name": "csv", "prefix": "a"}
    assert list(compose_run({"logger": "none"}).logger) == []
    assert list(compose_run({}).logger) == ["tensorboard"]
    with pytest.raises(ConfigError, match=r"`logger` must be one of .*, but got 'tensorbord'. Did you mean `tensorbo"):
        compose_run({"logger": ["csv", "tensorbord"]})
    with pytest.raises(ConfigError, match=r"`optim` must be one of .*, but got"):
        compose_run({"optim": ["adamw", "sgd"]})


def test_a_class_takes_the_place_of_an_option_and_leaves_our_settings():
    config = compose_run({"optim._target_": "torch.optim.RMSprop", "optim.alpha": 0.9, "optim.clip_norm": None})
    assert (config.optim.target, config.optim.arguments) == ("torch.optim.RMSprop", {"alpha": 0.9})
    assert (config.optim.lr, config.optim.clip_norm) == (1e-3, None)


@pytest.mark.parametrize("key", ["logger.mine.prefix", "optim.momentum", "schedule.total_steps", "trainer.strategy.a"])
def test_an_argument_without_a_class_is_no_setting(key):
    with pytest.raises(ConfigError, match=f"`{key}` is not a setting"):
        compose_run({key: 1})


def test_an_entry_of_a_mapping_is_set_by_its_dotted_key_and_a_later_mapping_replaces_it():
    config = compose_run({"method.rank_pattern.q_proj": 4, "method.rank_pattern.mlp.up_proj": 2})
    assert config.method.rank_pattern == {"q_proj": 4, "mlp.up_proj": 2}
    with pytest.raises(ConfigError, match=r"`method.rank_pattern.q_proj >= 1` must hold"):
        compose_run({"method.rank_pattern.q_proj": 0})
    with pytest.raises(ConfigError, match=r"`method.rank_pattern` is not a setting"):
        compose_run({"method": "full", "method.rank_pattern.q_proj": 4})
    layers = {"method.rank_pattern.q_proj": 4}, {"method.rank_pattern": {"k_proj": 2}}, {"method.rank_pattern.o": 1}
    assert compose_run(layer_settings(*layers)).method.rank_pattern == {"k_proj": 2, "o": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim.lrr": 1}, r"`optim.lrr` is not a setting. Did you mean `optim.lr`\? `lorasweep train --help` lists"),
        ({"rank": 4}, r"`rank` is not a setting. Did you mean `method.rank`\?"),
        ({"method": "full", "method.rank": 4}, "`method.rank` is not a setting."),
        ({"method": "lorra"}, r"`method` must be one of .*lora.*, but got 'lorra'. Did you mean `lora`\?"),
        ({"method": None}, "`method` must be one of .*lora.*, but got 'None'."),
        ({"method": {"name": "lora"}}, "`method` must be one of .*lora.*, but got \"{'name': 'lora'}\"."),
        ({"method.name": "frozen"}, "`method.rank` is not a setting."),
        ({"method.name": "x"}, "`method` must be one of .*lora.*, but got 'x'."),
        ({"model": "causal_lm"}, "`model.path` must be set, but is missing."),
        ({"method.rank": "many"}, "`method.rank` must be a whole number, but got 'many'."),
        ({"seeds": 3}, "`seeds` must be a group of settings, but got 3."),
        ({"seed": "${nothing}"}, "Interpolation key 'nothing' not found"),
    ],
)
def test_a_key_or_value_that_is_wrong_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        compose_run(settings)


STARTUP = "sampler.startup_trials"


@pytest.mark.parametrize(
    ("layers", "layered"),
    [
        ([{STARTUP: 4}, {"sampler": "qmc"}], {"sampler": "qmc"}),
        ([{STARTUP: 4}, {"sampler": "gp"}], {STARTUP: 4, "sampler": "gp"}),
        ([{"sampler": "qmc"}, {"sampler": "gp", STARTUP: 3}], {"sampler": "gp", STARTUP: 3}),
        ([{STARTUP: 4}, {}, {STARTUP: 2}], {STARTUP: 2}),
        ([{STARTUP: 3}, {"worker": "ray"}], {STARTUP: 3, "worker": "ray"}),
    ],
)
def test_a_layer_that_chooses_another_option_drops_what_was_set_inside_its_group(layers, layered):
    assert layer_settings(*layers) == layered


def test_a_setting_without_a_default_may_be_left_open():
    assert compose_run({"model": "causal_lm"}, require_all=False).model.path == "???"
    with pytest.raises(ConfigError, match=r"`model.revison` is not a setting. Did you mean `model.revision`\?"):
        compose_run({"model": "causal_lm", "model.revison": "main"}, require_all=False)


def test_a_users_own_conf_is_found_first(tmp_path, monkeypatch):
    (tmp_path / "conf" / "optim").mkdir(parents=True)
    adamw = (packaged_folder("conf") / "optim" / "adamw.yaml").read_text()
    (tmp_path / "conf" / "optim" / "adamw.yaml").write_text(adamw.replace("lr: 1.0e-3", "lr: 0.25"))
    (tmp_path / "conf" / "optim" / "mine.yaml").write_text(adamw.replace("lr: 1.0e-3", "lr: 0.5"))
    monkeypatch.chdir(tmp_path)
    assert compose_run({}).optim.lr == 0.25
    assert compose_run({"optim": "mine"}).optim.lr == 0.5
    with hydra_session():
        assert group_options("optim") == ["adafactor", "adamw", "adamw_8bit", "mine", "sgd"]
    assert compose_run({}).trainer.max_steps == 150  # the packaged files are still found


def test_a_users_file_with_a_key_too_many_is_refused(tmp_path, monkeypatch):
    (tmp_path / "conf" / "schedule").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "schedule" / "linear.yaml").write_text("name: linear\nwarmup_fraction: 0.1\nwarmup: 3\n")
    with pytest.raises(ConfigError, match=r"`schedule.warmup` is not a setting. Did you mean `warmup_frac"):
        compose_run({})


OPTIONS = [
    (primary, group, file.stem)
    for primary in ("train", "sweep")
    for group in default_options(primary)
    for file in sorted((packaged_folder("conf") / group).glob("*.yaml"))
]


MANDATORY = {
    **{f"model={option}": {"model.path": "owner/name"} for option in ("causal_lm", "classifier")},
    **{f"data={option}": {"data.train": "file"} for option in ("text", "table", "chat")},
}
"""What has no default."""


@pytest.mark.parametrize(("primary", "group", "option"), OPTIONS)
def test_a_conf_file_has_one_line_for_every_setting_and_no_other(primary, group, option):
    written = OmegaConf.load(packaged_folder("conf") / group / f"{option}.yaml")
    compose = compose_run if primary == "train" else compose_sweep
    settings = {group: option} | MANDATORY.get(f"{group}={option}", {})
    built = getattr(compose(settings), group)
    names = list(as_settings(built))
    if group in LIST_GROUPS:  # parts by a name each, with the lines of their classes
        assert OmegaConf.to_container(written) == as_settings(built)
        return
    if written.pop("defaults", None):  # it says what differs from another file
        names = [name for name in names if name in list(written)]
    assert sorted(written) == sorted(names)


@pytest.mark.parametrize(
    ("steps", "space"), [(1, 1), (20, 10), (60, 30), (125, 25), (75, 15), (97, 49), (1000, 500), (1500, 375)]
)
def test_a_run_is_evaluated_at_its_half_and_end(steps, space):
    assert compose_run({"trainer.max_steps": steps}).trainer.eval_every_steps == space
