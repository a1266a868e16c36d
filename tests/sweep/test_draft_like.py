"""`lorasweep new --like`: a sweep file that follows a training file of another tool."""

import json
import re
from pathlib import Path

import pytest
import yaml

from lorasweep.cli import run
from lorasweep.outcome import DONE, WRONG_REQUEST
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.confirm import list_questions

THEIRS = {
    "base_model": "org/base",
    "datasets": [{"path": "org/data", "type": "alpaca"}],
    "sequence_len": 128,
    "adapter": "lora",
    "lora_r": 32,
    "lora_alpha": 64,
    "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "v_proj"],
    "gradient_accumulation_steps": 2,
    "micro_batch_size": 4,
    "num_epochs": 5,
    "optimizer": "adamw_torch",
    "warmup_steps": 10,
    "learning_rate": 2e-5,
    "sample_packing": True,
    "logging_steps": 1,
}
STAND_INS = ("model.path=embedded:tiny", "data.train=rows.jsonl")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"repeat {n}", "input": "twice" if n % 2 else "", "output": f"{n} {n}"} for n in range(240)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def draft(*words, name="mine.yaml", **changes):
    values = {**THEIRS, **changes}
    Path("theirs.yaml").write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    assert run(["new", name, "--like", "theirs.yaml", *words]) == DONE
    return yaml.safe_load(Path(name).read_text())


def test_their_settings_are_an_arm_of_their_own_and_their_rank_is_searched(here, capsys):
    sweep = draft(*STAND_INS)
    settings, arms = sweep["settings"], sweep["arms"]
    assert list(arms) == ["frozen", "present", "full", "lora"]
    of_lora = {"method.dropout": 0.05, "method.targets": ["q_proj", "v_proj"]}
    assert arms["present"] == {
        "settings": {"method": "lora", "method.rank": 32, "method.alpha": 64.0, "optim.lr": 2e-5, **of_lora}
    }
    # at α 64, α/r of rank 1 would be beyond the rate law
    assert arms["lora"]["settings"] == {"method": "lora", "method.alpha": 16.0, **of_lora}
    assert arms["lora"]["space"]["method.rank"] == [1, 4, 16, 32, 64]
    assert arms["lora"]["space"]["optim.lr"]["low"] == 2e-5  # their rate is inside
    assert (
        settings.items()
        >= {
            "data": "chat",
            "data.prompt": "instruction",
            "data.input": "input",
            "data.separator": "\n\n### Response:\n",
            "data.max_length": 128,
            "trainer.batch_size": 8,
            "trainer.accumulate": 2,
            "seed": 42,
        }.items()
    )
    steps = settings["trainer.max_steps"]
    assert steps == pytest.approx(5 * 165 / 8, rel=0.1)
    assert settings["schedule.warmup_fraction"] == pytest.approx(10 / steps, abs=1e-3)
    written, printed = Path("mine.yaml").read_text(), capsys.readouterr().out
    for text in (" ".join(line.removeprefix("# ") for line in written.splitlines()), printed):
        assert "Not followed: sample_packing (packed sequences" in text
        assert "logging_steps (logs)" in text
        assert re.search("Followed: [^.]*lora_r, ", text)
    assert "4 × 2 accumulated on one GPU; multiply by your GPUs" in written
    definition = read_definition(here / "mine.yaml")
    questions = [(question.name, question.arm) for question in list_questions(definition)]
    assert questions == [("as_good_as_full", "present"), ("as_good_as_full", "lora"), ("smallest", "lora")]
    assert run(["sweep", "mine.yaml", "--cfg", "job"]) == DONE


def test_a_smaller_alpha_is_kept_and_the_range_of_rates_is_that_of_the_rate_law(here):
    low = draft(*STAND_INS, lora_alpha=4)["arms"]["lora"]
    default = draft(*STAND_INS, lora_alpha=16, name="other.yaml", learning_rate=1e-3)["arms"]["lora"]
    assert low["settings"]["method.alpha"] == 4
    assert low["space"]["optim.lr"]["high"] == pytest.approx(2 * default["space"]["optim.lr"]["high"], rel=0.02)


def test_typed_settings_win_and_data_with_other_columns_are_found(here, capsys):
    rows = [{"prompt": f"say {n}", "completion": str(n)} for n in range(200)]
    (here / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = (STAND_INS[0], "data.train=other.jsonl", "trainer.batch_size=1", "optim.weight_decay=0.3")
    settings = draft(*words)["settings"]
    assert settings["data"] == "chat"
    assert not settings.keys() & {"data.prompt", "data.input", "data.separator", "data.path"}
    assert (settings["trainer.batch_size"], settings["optim.weight_decay"]) == (1, 0.3)
    assert "other columns than theirs.yaml names: `data`" not in (printed := capsys.readouterr().out)
    assert "`data.input` and `data.completion`." in printed
    (here / "text.txt").write_text("some words in a row\n" * 3000)
    settings = draft(STAND_INS[0], "data.train=text.txt", name="text.yaml")["settings"]
    assert (settings["data"], settings["data.block_length"]) == ("text", 128)


def test_a_second_column_of_alpaca_may_be_missing(here):
    rows = [{"instruction": f"repeat {n}", "output": f"{n} {n}"} for n in range(200)]
    (here / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = draft(STAND_INS[0], datasets=[{"path": "own.jsonl", "type": "alpaca"}])["settings"]
    assert settings["data.train"] == "own.jsonl"
    assert (settings["data.prompt"], settings["data.completion"]) == ("instruction", "output")
    assert "data.input" not in settings


@pytest.mark.parametrize(
    ("prompt", "template", "expected"),
    [
        ("say {}", None, {"data.template": "plain", "data.separator": ""}),  # TRL joins texts without a template
        ([{"role": "user", "content": "say {}"}], None, {}),
        ("say {}", "own.jinja", {"data.template": "own.jinja"}),
    ],
)
def test_trl_gives_a_template_to_messages_alone(here, prompt, template, expected):
    (here / "own.jinja").write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
    answer = "{}" if isinstance(prompt, str) else [{"role": "assistant", "content": "{}"}]
    text = json.dumps({"prompt": prompt, "completion": answer})
    (here / "own.jsonl").write_text("\n".join(text.replace("{}", str(n)) for n in range(200)))
    theirs = {"model_name_or_path": "org/base", "use_peft": True, "chat_template_path": template}
    Path("theirs.yaml").write_text(yaml.safe_dump(theirs))
    words = (STAND_INS[0], "data.train=own.jsonl", *(() if expected else ("data.template=plain",)))
    assert run(["new", "mine.yaml", "--like", "theirs.yaml", *words]) == DONE
    settings = yaml.safe_load(Path("mine.yaml").read_text())["settings"]
    found = {key: settings[key] for key in ("data.template", "data.separator") if key in settings}
    assert found == (expected or {"data.template": "plain"})


def test_pairs_and_their_beta(here):
    rows = [{"question": f"add {n}", "chosen": f"{n} {n}", "rejected": "no"} for n in range(200)]
    (here / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = [{"path": "org/pairs", "type": "chatml.intel"}]
    words = (STAND_INS[0], "data.train=pairs.jsonl")
    sweep = draft(*words, rl="dpo", rl_beta=0.7, datasets=pairs)
    assert sweep["settings"].items() >= {"data": "preferences", "data.prompt": "question"}.items()
    assert sweep["arms"]["present"]["settings"]["objective.beta"] == 0.7
    assert sweep["arms"]["lora"]["space"]["objective.beta"] == {"low": 0.01, "high": 0.7, "log": True}
    sweep = draft(*words, "objective.beta=0.2", rl="dpo", rl_beta=0.7, datasets=pairs, name="typed.yaml")
    assert sweep["settings"]["objective.beta"] == 0.2
    assert "objective.beta" not in sweep["arms"]["lora"]["space"]


def test_the_files_length_of_training_is_kept(here, capsys):
    sweep = draft(*STAND_INS, num_epochs=1, val_set_size=0.0)
    said = capsys.readouterr().out
    assert "val_set_size (validation and test data are split from the training data" in said
    assert "are taken from `data.train`" in said
    assert sweep["settings"]["trainer.max_steps"] == 22  # 165 examples, 8 a step; no lower bound


def test_without_full_fine_tuning_the_margin_is_a_share_of_the_best_gain(here):
    sweep = draft(*STAND_INS, "arms.full=null")
    assert sweep["settings"]["confirm.margin"] == "5%"
    assert "full" not in sweep["arms"]


def test_full_fine_tuning_is_compared_with_the_searched_arm_of_it(here):
    sweep = draft(*STAND_INS, adapter=None, lora_r=None, lora_alpha=None)
    assert list(sweep["arms"]) == ["frozen", "full", "present", "lora"]
    assert sweep["arms"]["present"]["settings"] == {"method": "full", "optim.lr": 2e-5}
    assert {question.reference for question in list_questions(read_definition(here / "mine.yaml"))} == {"full", None}


def test_dora_is_searched_by_its_own_rank(here):
    sweep = draft(*STAND_INS, peft_use_dora=True)
    lora = sweep["arms"]["lora"]
    assert lora["settings"]["method"] == "peft"
    assert lora["settings"]["method.config"]["use_dora"] is True
    assert lora["space"]["method.config.r"] == [1, 4, 16, 32, 64]
    ranks = {config.method.config["r"] for config in read_definition(here / "mine.yaml").arms[-1].corner_configs}
    assert ranks == {1, 4, 16, 32, 64}


@pytest.mark.parametrize(
    ("text", "named"),
    [("base_model: a\nrl: grpo\n", "`rl`"), ("base_model: !!python/name:os.system\n", "theirs.yaml"), (None, "theirs")],
)
def test_a_wrong_file_is_one_sentence_and_nothing_is_written(here, capsys, text, named):
    if text is not None:
        Path("theirs.yaml").write_text(text)
    assert run(["new", "mine.yaml", "--like", "theirs.yaml", *STAND_INS]) == WRONG_REQUEST
    (error,) = capsys.readouterr().err.splitlines()[-1:]
    assert named in error
    assert not Path("mine.yaml").exists()
