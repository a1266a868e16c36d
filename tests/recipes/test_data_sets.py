"""Which data another tool's file names, and how their columns are read."""

import json

import pytest

from lorasweep.errors import ConfigError

FACTORY = {"model_name_or_path": "org/base", "stage": "sft", "dataset": "mine", "dataset_dir": "."}
AXOLOTL = {
    "base_model": "org/base",
    "learning_rate": 1e-4,
    "adapter": "lora",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_target_linear": True,
}


def data_of(recipe):
    return {key: value for key, value in recipe.settings.items() if key.split(".")[0] == "data"}


ALPACA = {"data": "chat", "data.prompt": "instruction", "data.input": "input", "data.completion": "output"}


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"type": "alpaca"}, ALPACA | {"data.template": "plain", "data.separator": "\n\n### Response:\n"}),
        ({"type": "alpaca:phi", "field_output": "say"}, ALPACA | {"data.completion": "say"}),
        ({"type": "sharegpt"}, {"data": "chat", "data.messages": "conversations"}),
        ({"type": "chat_template", "roles": {"user": ["human"]}}, {"data": "chat", "data.messages": "messages"}),
        (
            {"type": {"field_instruction": "ask", "field_output": "say", "format": "[INST] {instruction} [/INST]"}},
            {"data": "chat", "data.prompt": "ask", "data.completion": "say"},
        ),
        ({"type": "completion", "field": "body"}, {"data": "text", "data.text": "body"}),
        ({"type": "alpaca", "split": "train[:1%]", "name": "en"}, {"data.train": "train[:1%]", "data.subset": "en"}),
    ],
)
def test_the_types_of_axolotl(read, entry, expected):
    recipe = read({**AXOLOTL, "datasets": [{"path": "org/data", **entry}]})
    assert data_of(recipe).items() >= expected.items()
    assert recipe.settings["data.path"] == "org/data"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("chatml.argilla", {"data.prompt": "instruction", "data.chosen": "chosen_response"}),
        ("chat_template.default", {"data.prompt": "messages", "data.chosen": "chosen"}),
    ],
)
def test_the_pairs_of_axolotl(read, kind, expected):
    recipe = read({**AXOLOTL, "rl": "dpo", "rl_beta": 0.3, "datasets": [{"path": "org/data", "type": kind}]})
    assert data_of(recipe).items() >= {"data": "preferences", **expected}.items()
    assert recipe.settings["objective.beta"] == 0.3


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ({"data_files": ["a.jsonl", "b.jsonl"]}, "datasets.data_files"),
        ({"type": "context_qa"}, "datasets.type"),
    ],
)
def test_data_that_would_be_read_otherwise_are_refused_unless_others_are_named(read, entry, key):
    values = {**AXOLOTL, "datasets": [{"path": "org/data", "type": "chat_template", **entry}]}
    with pytest.raises(ConfigError, match=f"`{key}`"):
        read(values)
    recipe = read(values, has_data=True)
    assert key in recipe.keys.refused
    assert any(line.startswith("Refused, so other data are named: ") for line in recipe.describe())


def test_local_files_and_folders_are_found(read, tmp_path):
    def path_of(**entry):
        return data_of(read({**AXOLOTL, "datasets": [{"type": "alpaca", **entry}]}))

    assert path_of(path="./rows.jsonl")["data.train"] == "rows.jsonl"
    assert path_of(path="json", data_files="rows.jsonl")["data.train"] == "rows.jsonl"
    (tmp_path / "folder").mkdir()
    assert path_of(path="./folder", split="test") | {"data.path": "./folder", "data.train": "test"} == path_of(
        path="./folder", split="test"
    )
    assert path_of(path="./folder", data_files=["rows.jsonl"])["data.train"] == "folder/rows.jsonl"
    with pytest.raises(ConfigError, match="column of texts"):
        read({**AXOLOTL, "datasets": [{"path": "rows.jsonl", "type": "completion"}]})


def test_trls_mixture_of_one_data_set_is_read(read):
    recipe = read({"model_name_or_path": "org/base", "datasets": [{"path": "org/data", "name": "en", "split": "test"}]})
    assert data_of(recipe) == {"data.path": "org/data", "data.subset": "en", "data.train": "test"}


@pytest.mark.parametrize("described", ["[", "[]", '{"mine": 3}', '{"mine": {"columns": 3}}'])
def test_damaged_descriptions_are_one_sentence(read, tmp_path, described):
    (tmp_path / "dataset_info.json").write_text(described)
    with pytest.raises(ConfigError, match=r"dataset_info\.json"):
        read(FACTORY)


def test_plain_text_has_no_settings_of_chats(read, tmp_path):
    described = {"hf_hub_url": "a/b", "columns": {"prompt": "body"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": described}))
    recipe = read(FACTORY, stage="pt", max_samples=9)
    assert data_of(recipe) == {"data": "text", "data.path": "a/b", "data.train": "train", "data.text": "body"}
    assert "as a whole" in recipe.keys.not_followed["max_samples"]


def test_images_of_descriptions_are_refused(read, tmp_path):
    described = {"file_name": "a.json", "columns": {"images": "images"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": described}))
    with pytest.raises(ConfigError, match=r"`dataset\.images`"):
        read(FACTORY)
