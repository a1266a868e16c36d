"""Options of groups and values become settings; `test_refusals` has what is refused."""

from functools import reduce

import pytest
from omegaconf import OmegaConf

from lorasweep.config.build import as_settings
from lorasweep.config.components import Component
from lorasweep.config.compose import (
    LIST_GROUPS,
    compose_run,
    compose_sweep,
    default_options,
    merge_settings,
    packaged_folder,
)
from lorasweep.config.method import FullConfig, IntrinsicConfig, LoraConfig
from lorasweep.config.sweep import parse_margin
from lorasweep.errors import ConfigError


@pytest.mark.parametrize("config", [LoraConfig(), FullConfig(), IntrinsicConfig()], ids=lambda config: config.name)
def test_defaults_in_python_are_those_of_conf(config):
    assert compose_run({"method": config.name}).method == config


def test_several_loggers_and_callbacks_are_chosen_at_once():
    config = compose_run({"logger": ["tensorboard", "csv"], "callbacks": ["lr_monitor"], "logger.csv.prefix": "a"})
    assert list(config.logger) == ["tensorboard", "csv"]
    assert config.logger["csv"].arguments == {"name": "csv", "prefix": "a"}
    assert list(compose_run({"logger": "none"}).logger) == list(compose_run({"~logger": None}).logger) == []
    assert list(compose_run({}).logger) == ["tensorboard"]


def test_a_class_takes_the_place_of_an_option_and_leaves_our_settings():
    config = compose_run({"optim.alpha": 0.9, "optim._target_": "torch.optim.RMSprop", "optim.clip_norm": None})
    assert (config.optim.target, config.optim.arguments) == ("torch.optim.RMSprop", {"alpha": 0.9})
    assert (config.optim.lr, config.optim.clip_norm) == (1e-3, None)
    nested = {"sampler.base_sampler._target_": "optuna.samplers.RandomSampler", "sampler.base_sampler.seed": 3}
    sampler = compose_sweep({"sampler._target_": "optuna.samplers.PartialFixedSampler", **nested}).sampler
    inner = {"_target_": "optuna.samplers.RandomSampler", "seed": 3}
    assert sampler == Component(target="optuna.samplers.PartialFixedSampler", arguments={"base_sampler": inner})


@pytest.mark.parametrize(
    ("layers", "field", "mapping"),
    [
        ([{"rank_pattern.q_proj": 4, "rank_pattern.mlp.up_proj": 2}], "rank_pattern", {"q_proj": 4, "mlp.up_proj": 2}),
        ([{"rank_pattern": {"mlp.up_proj": 4}}, {"rank_pattern.q": 1}], "rank_pattern", {"mlp.up_proj": 4, "q": 1}),
        ([{"rank_pattern.q": 4}, {"rank_pattern": {"k": 2}}, {"rank_pattern.o": 1}], "rank_pattern", {"k": 2, "o": 1}),
        (
            [{"": "peft", "config": {"peft_type": "VERA", "r": 8}, "config.r": 16}],
            "config",
            {"peft_type": "VERA", "r": 16},
        ),
    ],
)
def test_an_entry_of_a_mapping_is_set_by_its_dotted_key_and_a_later_mapping_replaces_it(layers, field, mapping):
    named = [{f"method.{key}".rstrip("."): value for key, value in layer.items()} for layer in layers]
    assert getattr(compose_run(reduce(merge_settings, named, {})).method, field) == mapping


NUM = "worker.num"


@pytest.mark.parametrize(
    ("layers", "merged"),
    [
        ([{NUM: 4}, {"worker": "slurm"}], {"worker": "slurm"}),
        ([{NUM: 1}, {"worker": "local"}], {NUM: 1, "worker": "local"}),
        ([{"worker": "slurm"}, {"worker": "ray", NUM: 3}], {"worker": "ray", NUM: 3}),
        ([{NUM: 3}, {"sampler": "tpe"}], {NUM: 3, "sampler": "tpe"}),
        ([{"optim._target_": "a.B", "optim.x": 1}, {"optim": "adamw"}], {"optim": "adamw"}),
        ([{"optim.beta1": 0.5, "optim.lr": 1}, {"optim._target_": "a.B"}], {"optim.lr": 1, "optim._target_": "a.B"}),
    ],
)
def test_a_layer_that_chooses_another_option_or_class_drops_what_was_set_inside(layers, merged):
    assert reduce(merge_settings, layers, {}) == merged


def test_a_setting_without_a_default_may_be_left_open():
    assert compose_run({"model": "causal_lm"}, require_all=False).model.path == "???"


def test_a_users_own_conf_is_found_first(here):
    (here / "conf" / "optim").mkdir(parents=True)
    adamw = (packaged_folder("conf") / "optim" / "adamw.yaml").read_text()
    (here / "conf" / "optim" / "adamw.yaml").write_text(adamw.replace("lr: 1.0e-3", "lr: 0.25"))
    (here / "conf" / "optim" / "mine.yaml").write_text(adamw.replace("lr: 1.0e-3", "lr: 0.5\nlr_rato_b: 1"))
    assert compose_run({}).optim.lr == 0.25
    with pytest.raises(ConfigError, match=r"`optim.lr_rato_b` is not a setting. Did you mean `optim.lr_ratio_b`"):
        compose_run({"optim": "mine"})
    assert compose_run({}).trainer.max_steps == 150  # the packaged files are still found


MANDATORY = {
    **{f"model={option}": {"model.path": "owner/name"} for option in ("causal_lm", "classifier", "embedder")},
    **{f"data={option}": {"data.train": "file"} for option in ("text", "table", "chat", "preferences", "embeddings")},
}
"""Settings without a default."""
OPTIONS = [
    (primary, group, file.stem)
    for primary in ("train", "sweep")
    for group in default_options(primary)
    for file in sorted((packaged_folder("conf") / group).glob("*.yaml"))
]


@pytest.mark.parametrize(("primary", "group", "option"), OPTIONS)
def test_a_conf_file_has_one_line_for_every_setting_and_allows_no_risk(primary, group, option):
    written = OmegaConf.load(packaged_folder("conf") / group / f"{option}.yaml")
    compose = compose_run if primary == "train" else compose_sweep
    built = getattr(compose({group: option} | MANDATORY.get(f"{group}={option}", {})), group)
    assert not getattr(built, "trust_remote_code", False)
    names = list(as_settings(built))
    if group in LIST_GROUPS:  # components by name, with the arguments of their classes
        assert OmegaConf.to_container(written) == as_settings(built)
        return
    if written.pop("defaults", None):  # the file says what differs from another file
        names = [name for name in names if name in list(written)]
    assert sorted(written) == sorted(names)


@pytest.mark.parametrize("task", ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"])
def test_every_glue_task_is_a_table_of_the_hub(task):
    table = compose_run({"data": f"glue_{task}", "data.max_length": 77}).data
    assert (table.name, table.path, table.subset, table.max_length) == ("table", "nyu-mll/glue", task, 77)
    assert table.metric == {"cola": "matthews", "stsb": "pearson"}.get(task, "accuracy")
    assert table.task == ("regression" if task == "stsb" else "single_label")


@pytest.mark.parametrize(
    ("steps", "interval"), [(1, 1), (20, 10), (60, 30), (125, 25), (75, 15), (97, 49), (1000, 500), (1500, 375)]
)
def test_a_run_is_evaluated_at_its_half_and_end(steps, interval):
    assert compose_run({"trainer.max_steps": steps}).trainer.eval_every_steps == interval


def test_one_seed_sets_every_seed_that_is_not_set_by_itself():
    seeds = compose_run({"seed": 5, "seeds.dropout": 7}).seeds
    assert (seeds.init, seeds.data_order, seeds.dropout) == (5, 5, 7)


@pytest.mark.parametrize(
    ("margin", "value", "is_share"), [("5%", 0.05, True), ("2.5 %", 0.025, True), (0.01, 0.01, False), (2, 2, False)]
)
def test_a_margin_is_a_share_of_the_gain_or_a_number(margin, value, is_share):
    found = parse_margin(compose_sweep({"confirm.margin": margin}).confirm.margin)
    assert (found.value, found.is_share_of_gain) == (pytest.approx(value), is_share)


def test_settings_can_be_keys_although_they_hold_mappings():
    first, second = (LoraConfig(rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 1.0}) for _ in range(2))
    assert {first: 1}[second] == 1
