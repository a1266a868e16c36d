"""A setting that is wrong is refused in one sentence with its key, its value and what to do."""

import math

import pytest

from lorasweep.config.build import build
from lorasweep.config.compose import compose_run, compose_sweep
from lorasweep.config.method import LoraConfig
from lorasweep.errors import ConfigError

TABLE = {"data": "table", "data.train": "a.csv"}
CHAT = {"data": "chat", "data.train": "a.jsonl"}
TEXT = {"data": "text", "data.train": "a.txt"}
FSDP = {"trainer.strategy": "fsdp", "trainer.devices": 2}
NF4 = {"model.quantization": "nf4"}


def refuse(compose, settings, words):
    with pytest.raises(ConfigError) as raised:
        compose(settings)
    assert [word for word in words if word not in str(raised.value)] == []
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "full", "method.rank": 4}, ["`method.rank`", "`method=lora`"]),
        ({"method.name": "frozen"}, ["`method.rank`"]),
        ({"method.config.r": 16}, ["`method.config`", "`method=peft`"]),
        ({"method": "full", "method.rank_pattern.q_proj": 4}, ["`method.rank_pattern`", "`method=lora`"]),
        ({"data.train": "a.csv"}, ["`data.train`", "`data=table`", "`data=text`"]),
        ({"model": "causal_lm", "model.revison": "main", "model.path": "m"}, ["`model.revison`", "`model.revision`"]),
        ({"optim.momentum": 1}, ["`optim.momentum`", "`optim=sgd`"]),
        ({"schedule.total_steps": 1}, ["`schedule.total_steps`", "`schedule=one_cycle`"]),
        ({"logger.mine.prefix": 1}, ["`logger.mine._target_`", "missing"]),
        ({"trainer.strategy.a": 1}, ["`trainer.strategy`", "{'a': 1}", "ddp"]),
        *(({"method": value}, ["`method`", "lora", repr(str(value))]) for value in ("lorra", None, {"name": "lora"})),
        ({"optim": ["adamw", "sgd"]}, ["`optim`", "adafactor", "['adamw', 'sgd']"]),
        ({"seeds": 3}, ["`seeds`", "a group of settings", "3"]),
        ({"seed": "${nothing}"}, ["'nothing'"]),
        ({"trainer.accumulate": 17}, ["`trainer.accumulate <= trainer.batch_size`", "17", "16"]),
        ({"seeds.data_order": 2**32}, ["`seeds.data_order < 4294967296`", "4294967296"]),
        ({"method.rank_pattern.q_proj": 0}, ["`method.rank_pattern.q_proj >= 1`", "0"]),
        *(({"method": name, "optim.lr_ratio_b": 2}, ["`optim.lr_ratio_b`", name]) for name in ("full", "frozen")),
        *((FSDP | more, ["ddp", f"`{next(iter(more))}`", "'fsdp'"]) for more in ({"method": "intrinsic"}, NF4)),
        (FSDP | {"method": "full", "method.parameters": ".*bias"}, ["ddp", "`method`"]),
        *((NF4 | {"method": name}, ["`model.quantization`", name, "'nf4'"]) for name in ("full", "intrinsic")),
        (TABLE | {"data.train": " "}, ["`data.train`", "empty"]),
        (TABLE | {"data.test_fraction": 0}, ["`data.test_fraction >= 0.01`", "0"]),
        (TEXT | {"data.test_fraction": "all"}, ["`data.test_fraction`", "a number", "'all'"]),
        (TABLE | {"data.test": "b.csv", "data.test_fraction": 0.2}, ["`data.test_fraction`", "`data.test`", "0.2"]),
        (TABLE | {"data.revision": "main"}, ["`data.revision`", "`data.path`", "'main'"]),
        (CHAT | {"data.prompt": "a"}, ["`data.prompt` and `data.completion`", "together", "'a'"]),
        (CHAT | {"data.prompt": "a", "data.completion": "b", "data.messages": "c"}, ["`data.messages`", "'c'"]),
        (TABLE | {"data.labels": ["a", "a"]}, ["`data.labels`", "different", "['a', 'a']"]),
        (TABLE | {"data.class_weights": "balance"}, ["none, balanced", "`balanced`"]),
        (TABLE | {"data.metric": "perplexity"}, ["`data.metric`", "'perplexity'"]),
    ],
)
def test_a_wrong_setting_of_a_run_is_refused(settings, words):
    refuse(compose_run, settings, words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"worker.num": 0}, ["`worker.num >= 1`", "0", "auto"]),
        ({"confirm": "no"}, ["`confirm`", "a group of settings", "'no'"]),
        ({"confirm.seed": 3}, ["`confirm.seed`", "`confirm.seeds`"]),
        *(({"confirm.seeds": looks}, ["`confirm.seeds`", str(looks), "[3,6,10]"]) for looks in ([], [6, 3], [3, 3])),
        *(
            ({"confirm.margin": margin}, ["`confirm.margin`", repr(margin), "`5%`"])
            for margin in (0.0, -0.1, "0%", "100%", "five", "%")
        ),
    ],
)
def test_a_wrong_setting_of_a_sweep_is_refused(settings, words):
    refuse(compose_sweep, settings, words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank_pattern": {"q_proj": 0}}, ["`method.rank_pattern.q_proj >= 1`", "0"]),
        ({"alpha": math.inf}, ["`method.alpha`", "finite", "inf"]),
        ({"dropout": 1.0}, ["`method.dropout < 1`", "1.0"]),
        ({"targets": ""}, ["`method.targets`", "`all-linear`"]),
    ],
)
def test_a_wrong_setting_of_lora_is_refused_from_a_mapping_and_from_python(settings, words):
    refuse(lambda values: build(LoraConfig, values, key="method"), settings, words)
    with pytest.raises(ValueError, match=next(iter(settings))):
        LoraConfig(**settings)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sweep: [1, 2\n", ["conf/sweep.yaml", "line 1", "YAML"]),
        ("defaults: 3\n", ["'sweep'", "`defaults`", "a list"]),
    ],
)
def test_a_broken_file_of_the_user_s_conf_is_named(here, text, words):
    (here / "conf").mkdir()
    (here / "conf" / "sweep.yaml").write_text(text)
    refuse(compose_sweep, {}, words)
