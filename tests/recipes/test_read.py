"""Training files of other tools: what their keys become, and that each is in one list."""

import json

import pytest

from lorasweep.errors import ConfigError
from lorasweep.recipes.keys import UNKNOWN_KEY
from lorasweep.recipes.read import TOOLS, load_table, read_recipe

AXOLOTL = {
    "base_model": "org/base",
    "load_in_4bit": True,
    "datasets": [{"path": "org/data", "type": "chat_template", "field_messages": "conversations"}],
    "val_set_size": 0.05,
    "sequence_len": 2048,
    "sample_packing": True,
    "adapter": "qlora",
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "v_proj"],
    "lora_modules_to_save": ["embed_tokens"],
    "peft_use_rslora": True,
    "gradient_accumulation_steps": 4,
    "micro_batch_size": 2,
    "num_epochs": 2,
    "optimizer": "adamw_torch",
    "adam_beta2": 0.95,
    "lr_scheduler": "cosine",
    "learning_rate": "2e-4",  # YAML reads it as a text
    "warmup_ratio": 0.1,
    "weight_decay": 0.01,
    "max_grad_norm": 0,
    "bf16": "auto",
    "gradient_checkpointing": "offload",
    "seed": 7,
    "logging_steps": 1,
    "wandb_project": None,
}
TRL = {
    "model_name_or_path": "org/base",
    "dataset_name": "org/data",
    "dataset_train_split": "train[:50%]",
    "use_peft": True,
    "lora_r": 8,
    "lora_target_modules": ["all-linear"],
    "per_device_train_batch_size": 4,
    "max_steps": 100,
    "report_to": "none",
    "packing": True,
}
FACTORY = {
    "model_name_or_path": "org/base",
    "stage": "sft",
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "q_proj, v_proj",
    "dataset": "mine",
    "template": "llama3",
    "cutoff_len": 512,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "quantization_bit": 4,
    "plot_loss": True,
}


def describe_data(folder, **entry):
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "dataset_info.json").write_text(json.dumps({"mine": entry}))


def test_axolotls_keys_become_settings(read):
    recipe = read(AXOLOTL)
    assert recipe.tool == "axolotl"
    assert (
        recipe.settings.items()
        >= {
            "model.path": "org/base",
            "model.quantization": "nf4",
            "data": "chat",
            "data.path": "org/data",
            "data.train": "train",
            "data.messages": "conversations",
            "optim": "adamw",
            "optim.beta2": 0.95,
            "optim.weight_decay": 0.01,
            "optim.clip_norm": None,
            "schedule": "cosine",
            "schedule.warmup_fraction": 0.1,
            "trainer.batch_size": 8,
            "trainer.accumulate": 4,
            "trainer.precision": "auto",
            "trainer.activation_checkpointing": True,
            "seed": 7,
        }.items()
    )
    assert recipe.method == {
        "method": "lora",
        "method.rank": 32,
        "method.alpha": 16.0,
        "method.dropout": 0.05,
        "method.targets": ["q_proj", "v_proj"],
        "method.modules_to_save": ["embed_tokens"],
        "method.scaling": "alpha_over_sqrt_rank",
    }
    assert (recipe.lr, recipe.epochs, recipe.length, recipe.warmup_steps) == (2e-4, 2.0, 2048, 0)
    assert "2 × 4 accumulated" in recipe.batch
    assert recipe.keys.not_followed.keys() == {"logging_steps", "wandb_project", "sample_packing", "val_set_size"}
    assert "`trainer.batch_size` examples" in recipe.keys.not_followed["sample_packing"]


def test_trls_defaults_count_where_its_file_has_no_key(read):
    recipe = read(TRL)
    assert recipe.tool == "TRL"
    assert recipe.lr == 2e-5
    assert recipe.method["method.alpha"] == 32
    assert recipe.settings["data.train"] == "train[:50%]"
    assert recipe.settings["trainer.max_steps"] == 100
    assert recipe.settings["schedule"] == "linear"
    assert "data" not in recipe.settings  # the columns decide
    assert recipe.defaults["lora_alpha"] == 32
    assert "Followed as TRL's defaults: " in "\n".join(recipe.describe())
    dpo = read(TRL, beta=0.05)
    assert (dpo.settings["data"], dpo.settings["objective.beta"], dpo.lr) == ("preferences", 0.05, 1e-6)
    assert read(TRL, use_peft=False).method == {"method": "full"}
    assert "also scores the prompts" in recipe.keys.not_followed["assistant_only_loss"]
    assert "assistant_only_loss" not in read(TRL, assistant_only_loss=True).keys.not_followed


def test_llama_factorys_data_are_described_above_its_file(read, tmp_path):
    describe_data(tmp_path, file_name="rows.json", columns={"prompt": "ask", "query": "more", "response": "say"})
    (tmp_path / "examples").mkdir()
    recipe = read(FACTORY, name="examples/theirs.yaml")
    assert (
        recipe.settings.items()
        >= {
            "data": "chat",
            "data.train": str(tmp_path / "data" / "rows.json"),
            "data.prompt": "ask",
            "data.input": "more",
            "data.completion": "say",
            "model.quantization": "nf4",
            "trainer.batch_size": 8,
            "trainer.activation_checkpointing": True,
            "schedule.warmup_fraction": 0.1,  # a number of steps below 1 is a share
        }.items()
    )
    assert recipe.method["method.targets"] == ["q_proj", "v_proj"]
    assert recipe.method["method.alpha"] == 8  # twice the rank
    assert recipe.defaults["lora_alpha"] == 8
    assert "llama3" not in str(recipe.settings)
    assert "chat template" in recipe.keys.not_followed["template"]
    describe_data(tmp_path, hf_hub_url="org/pairs", ranking=True, formatting="sharegpt")
    dpo = read(FACTORY, stage="dpo", pref_beta=0.2)
    assert (
        dpo.settings.items()
        >= {
            "data": "preferences",
            "data.path": "org/pairs",
            "data.prompt": "conversations",
            "objective.beta": 0.2,
        }.items()
    )
    assert "pref_beta" in read(FACTORY, pref_beta=0.2).keys.not_followed  # it trains no pairs


def test_every_key_is_in_one_list_and_unknown_ones_are_named(read):
    recipe = read(AXOLOTL, new_trick=3, lora_qkv_kernel=True, gptq=False)
    lists = [recipe.keys.followed, recipe.keys.not_followed, recipe.keys.refused]
    theirs = {
        *AXOLOTL,
        "new_trick",
        "lora_qkv_kernel",
        "gptq",
        "datasets.path",
        "datasets.type",
        "datasets.field_messages",
    }
    assert sorted(key for keys in lists for key in keys) == sorted(theirs)
    assert recipe.keys.not_followed["new_trick"] == UNKNOWN_KEY
    assert f"Not followed: new_trick ({UNKNOWN_KEY})." in recipe.describe()


@pytest.mark.parametrize("name", TOOLS)
def test_a_table_has_a_reason_for_each_refused_value(name):
    table = load_table(name)
    for part in (table, table["data_set"]):
        rules = [rule for rule in part["followed"].values() if isinstance(rule, dict)]
        assert all("why" in rule for rule in rules if "refuse" in rule)


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"lora_target_modules": None, "lora_target_linear": True}, {"method.targets": "all-linear"}),
        ({"lora_target_modules": r"model\.layers\.\d+\.q_proj"}, {"method.targets": r"model\.layers\.\d+\.q_proj"}),
        ({"lora_target_modules": "all-linear"}, {"method.targets": "all-linear"}),
        ({"adapter": None, "load_in_4bit": None}, {"method": "full"}),
    ],
)
def test_targets_and_methods(read, changes, method):
    assert read(AXOLOTL, **changes).method.items() >= method.items()


def test_dora_is_trained_by_peft(read):
    method = read(AXOLOTL, peft_use_dora=True, load_in_4bit=False).method
    assert method["method"] == "peft"
    assert method["method.config"] == {
        "peft_type": "LORA",
        "use_dora": True,
        "use_rslora": True,
        "r": 32,
        "lora_alpha": 16.0,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": ["embed_tokens"],
    }


@pytest.mark.parametrize(
    ("theirs", "ours", "warmup"),
    [("constant", "constant", 0.0), ("constant_with_warmup", "constant", 0.1), ("inverse_sqrt", "cosine", 0.1)],
)
def test_a_schedule_is_ours_or_the_default_of_the_tool_which_is_said(read, theirs, ours, warmup):
    recipe = read(AXOLOTL, lr_scheduler=theirs)
    assert (recipe.settings["schedule"], recipe.settings["schedule.warmup_fraction"]) == (ours, warmup)
    assert ("inverse_sqrt" in recipe.keys.not_followed.get("lr_scheduler", "")) is (theirs == "inverse_sqrt")


def test_lora_plus_is_a_setting_of_the_arms_of_lora(read):
    recipe = read(AXOLOTL, loraplus_lr_ratio=16)
    assert recipe.method["optim.lr_ratio_b"] == 16
    assert "optim.lr_ratio_b" not in recipe.settings
    full = read(AXOLOTL, loraplus_lr_ratio=16, adapter=None, load_in_4bit=None)
    assert full.method == {"method": "full"}
    assert "loraplus_lr_ratio" in full.keys.not_followed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": "adamw_bnb_8bit"}, ("optimizer", "32-bit states")),
        ({"lora_target_modules": None}, ("lora_target_modules", "all linear layers")),
        ({"load_in_4bit": None, "load_in_8bit": True}, ("load_in_8bit", "16 bits")),
        ({"trust_remote_code": True}, ("trust_remote_code", "model.trust_remote_code=true")),
        ({"liger_rope": True}, ("liger_rope", "rounding")),
    ],
)
def test_what_is_not_followed_says_what_that_changes(read, changes, said):
    key, why = said
    recipe = read(AXOLOTL, **changes)
    assert why in recipe.keys.not_followed[key]
    assert "model.trust_remote_code" not in recipe.settings


@pytest.mark.parametrize(
    ("values", "changes", "named"),
    [
        (AXOLOTL, {"processor_type": "AutoProcessor"}, ["`processor_type`", "images"]),
        (AXOLOTL, {"rl": "grpo"}, ["`rl`", "'grpo'", "DPO"]),
        (AXOLOTL, {"base_model": "org/base-GPTQ"}, ["`base_model`", "GPTQ"]),
        (AXOLOTL, {"adapter": "llama-adapter"}, ["`adapter`", "llama-adapter"]),
        (AXOLOTL, {"datasets": None}, ["`datasets`", "data.train"]),
        (AXOLOTL, {"datasets": 3}, ["`datasets`", "list of"]),
        (AXOLOTL, {"datasets": [{"path": "a/b"}, {"path": "c/d"}]}, ["`datasets`", "2", "merge"]),
        (AXOLOTL, {"datasets": [{"path": "a/b", "type": "ebft.x"}]}, ["`datasets.type`", "ebft.x"]),
        (AXOLOTL, {"datasets": [{"type": "alpaca"}]}, ["`datasets.path`", "missing"]),
        (AXOLOTL, {"lora_r": [8, 16]}, ["`lora_r`", "[8, 16]"]),
        (AXOLOTL, {"lora_r": 0}, ["`lora_r`", "0"]),
        (AXOLOTL, {"learning_rate": None}, ["`learning_rate`", "missing"]),
        (AXOLOTL, {"learning_rate": "fast"}, ["`learning_rate`", "fast"]),
        (TRL, {"reward_funcs": "accuracy"}, ["`reward_funcs`", "rewards"]),
        (TRL, {"loss_type": "ipo"}, ["`loss_type`", "ipo"]),
        (FACTORY, {"stage": "ppo"}, ["`stage`", "ppo"]),
        (FACTORY, {"finetuning_type": "oft"}, ["`finetuning_type`", "oft"]),
        (FACTORY, {"export_dir": "out"}, ["`export_dir`", "exports"]),
        (FACTORY, {"dataset": "other"}, ["`dataset`", "other"]),
        (FACTORY, {"image_max_pixels": 4}, ["`image_max_pixels`"]),
    ],
)
def test_what_is_refused_names_the_key_and_the_reason(read, tmp_path, values, changes, named):
    describe_data(tmp_path, file_name="rows.json")
    with pytest.raises(ConfigError) as caught:
        read(values, **changes)
    assert all(part in str(caught.value) for part in named), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- base_model",
        "base_model: [",
        "base_model: !!python/object/apply:os.system [echo]",
        "base_model: \x00",
        "model: org/base\nlr: 1",
    ],
)
def test_a_file_that_is_no_training_file_is_one_sentence(read, text):
    with pytest.raises(ConfigError, match="must") as caught:
        read(text)
    assert "theirs.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_missing_file_and_a_folder_are_one_sentence(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="must be a YAML file"):
            read_recipe(path)


def test_foreign_yaml_sets_no_class(read):
    assert read(AXOLOTL, _target_="os.system").keys.not_followed["_target_"] == UNKNOWN_KEY
    for optimizer in ({"_target_": "os.system"}, "lion_pytorch"):  # whose rate would not hold for AdamW
        with pytest.raises(ConfigError, match=r"`optimizer`: it is .* holds for this optimizer alone"):
            read(AXOLOTL, optimizer=optimizer)


def test_keys_below_a_group_are_read_by_their_dotted_names(read):
    pairs = [{"path": "org/pairs", "type": "chatml.intel"}]
    recipe = read(AXOLOTL, datasets=pairs, rl="dpo", rl_beta=0.3, trl={"beta": 0.2, "use_vllm": True})
    assert recipe.settings["objective.beta"] == 0.2  # as in axolotl, where it wins
    assert recipe.keys.followed["trl.beta"] == "objective.beta"
    assert recipe.keys.not_followed["trl.use_vllm"] == UNKNOWN_KEY
