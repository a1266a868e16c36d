"""Which trials can train together, and on which base each arm trains."""

import pytest

from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.packing import check_packing, choose_pack_sizes, explain_solo_arms
from lorasweep.sweep.definition.sweep_file import find_sweep_file


@pytest.fixture
def plan(read):
    def plan(content, *overrides):
        definition = read(content, *overrides)
        check_packing(definition)
        return {arm.name: arm.packing for arm in definition.arms}

    return plan


def test_lora_trials_and_arms_that_differ_in_what_a_slot_owns_share_packs(plan, content):
    content["arms"]["other"] = {"settings": {"method": "lora", "method.alpha": 4, "schedule": "cosine"}, "trials": 1}
    content["arms"]["longer"] = {"settings": {"method": "lora", "trainer.max_steps": 16}, "trials": 1}
    plans = plan(content)
    assert plans["lora"].largest.method.rank == 4
    assert plans["lora"].key == plans["other"].key
    assert plans["longer"].key not in (None, plans["lora"].key)
    assert plans["full"].key is None
    assert "`method=full` trains alone" in plans["full"].reason


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("trainer.compile", True, "trainer.compile=false"),
        ("trainer.strategy", {"_target_": "my.Strategy"}, "trainer.strategy=auto"),
        ("schedule", "one_cycle", "schedule=cosine"),
    ],
)
def test_a_setting_that_slots_do_not_have_runs_alone_and_says_what_mends_it(plan, content, key, value, remedy):
    content["arms"]["lora"]["settings"][key] = value
    lora = plan(content)["lora"]
    assert lora.key is None
    assert lora.reason.endswith(f"`{remedy}`.")
    assert plan(content, f"arms.lora.{remedy}")["lora"].key is not None


def test_callbacks_that_would_end_or_save_all_runs_of_a_pack_run_alone_and_other_callbacks_are_shared(plan, content):
    for target, said in (("EarlyStopping", "`trainer.early_stop_evaluations`"), ("ModelCheckpoint", "`best/`")):
        content["arms"]["lora"]["settings"]["callbacks.mine._target_"] = f"lightning.pytorch.callbacks.{target}"
        lora = plan(content)["lora"]
        assert lora.key is None
        assert "`callbacks.mine` would" in lora.reason
        assert said in lora.reason
    content["arms"]["lora"]["settings"]["callbacks.mine._target_"] = "mine.Callback"
    content["arms"]["other"] = {"settings": {"method": "lora"}, "trials": 1}
    plans = plan(content)
    assert None not in (plans["lora"].key, plans["other"].key)
    assert plans["lora"].key != plans["other"].key  # the callbacks of a pack belong to all of its slots


def test_trials_of_the_shipped_qlora_share_packs(tmp_path):
    (tmp_path / "chat.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    overrides = {"model.path": "m", "data.train": str(tmp_path / "chat.jsonl")}
    packing = read_definition(find_sweep_file("qlora"), overrides).find_arm("lora").packing
    assert packing.largest.trainer.activation_checkpointing
    assert packing.key is not None


def test_an_adapter_of_peft_trains_alone_and_its_keys_are_swept(read, content):
    content["arms"]["lora"] = {
        "settings": {"method": "peft", "method.config": {"peft_type": "VERA", "target_modules": ["q_proj"]}},
        "space": {"method.config.r": [8, 16], "optim.lr": {"low": 1e-3, "high": 1e-2, "log": True}},
        "trials": 4,
    }
    definition = read(content, "method.config.d_initial=0.2", "worker.pack_size=auto")
    arm = next(arm for arm in definition.arms if arm.name == "lora")
    whole = {"peft_type": "VERA", "target_modules": ["q_proj"], "d_initial": 0.2}
    assert {config.method.config["r"] for config in arm.corner_configs} == {8, 16}
    assert all(config.method.config == {**whole, "r": config.method.config["r"]} for config in arm.corner_configs)
    (note,) = explain_solo_arms(definition)
    assert note.startswith("`lora`: its trials run alone. `method=peft` trains alone")


def test_a_swept_setting_that_slots_share_runs_alone_and_a_size_that_can_not_be_is_refused(plan, content):
    with pytest.raises(ConfigError, match=r"`worker.pack_size <= 6` must hold.*but got 7"):
        plan(content, "worker.pack_size=7")
    with pytest.raises(ConfigError, match=r"`worker.pack_size` must be 1 or auto for arm `frozen`, but got 2"):
        plan(content, "worker.pack_size=2", "arms.lora=null")
    content["arms"]["lora"]["space"]["trainer.batch_size"] = [2, 4]
    assert "`trainer.batch_size` is swept" in plan(content)["lora"].reason


def quantizations(definition):
    return {arm.name: {config.model.quantization for config in arm.corner_configs} for arm in definition.arms}


def test_arms_that_train_weights_of_the_base_have_it_unquantised(read, content):
    content["settings"]["model.quantization"] = "nf4"
    content["arms"]["head"] = {"settings": {"method": "full", "method.parameters": "lm_head.*"}}
    definition = read(content)
    assert quantizations(definition) == {"frozen": {"nf4"}, "lora": {"nf4"}, "full": {"none"}, "head": {"none"}}


def test_a_model_of_the_sweep_may_be_quantised_by_its_file(read, content, here):
    folder = here / "conf" / "model"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("defaults: [causal_lm, _self_]\nname: mine\npath: own/name\nquantization: nf4\n")
    content["settings"]["model"] = "mine"
    assert quantizations(read(content))["full"] == {"none"}
    content["settings"]["model"] = "tiny"
    content["arms"]["full"]["settings"]["model"] = "mine"
    with pytest.raises(ConfigError, match=r"arm `full`: `model.quantization` must be none with `method=full`"):
        read(content)


def test_arms_on_different_bases_share_no_packs(read, content):
    del content["settings"]["worker.pack_size"]
    lora = content["arms"].pop("lora")
    for kind in ("none", "nf4"):
        content["arms"][f"lora-{kind}"] = lora | {"settings": {"method": "lora", "model.quantization": kind}}
    definition = read(content)
    keys = [definition.find_arm(f"lora-{kind}").packing.key for kind in ("none", "nf4")]
    assert None not in keys
    assert len(set(keys)) == 2


@pytest.mark.parametrize(
    ("num", "slots", "workers", "sizes"),
    [
        (7, 4, 1, [4, 3]),
        (8, 8, 3, [3, 3, 2]),
        (2, 8, 5, [1, 1]),
        (0, 4, 2, []),
    ],
)
def test_packs_are_as_few_as_fit_but_one_for_each_worker_and_of_even_sizes(num, slots, workers, sizes):
    assert choose_pack_sizes(num, slots=slots, num_workers=workers) == sizes
