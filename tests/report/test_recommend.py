"""The recommended settings follow the verdicts, and their files are read by lorasweep and PEFT."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorasweep.cli import DONE, run
from lorasweep.config.compose import compose_run
from lorasweep.errors import ConfigError, RecordError
from lorasweep.record import find_winners, read_sweep
from lorasweep.report import write_report
from lorasweep.report.recommend import Recommendation, read_recommended
from lorasweep.report.summary import summarize

from .conftest import build_rank_sweep, build_sweep, edit_json


def recommended(sweep: Path) -> list[Recommendation]:
    return list(summarize(sweep).recommended)


def test_better_method_is_recommended_with_lora_as_the_alternative(finished_and_confirmed: Path) -> None:
    full, lora = recommended(finished_and_confirmed)
    assert (full.arm, full.is_settled) == ("full", True)
    assert full.settings.keys() == {"method", "learning rate"}
    assert lora.settings["method"] == "LoRA"
    assert lora.settings.keys() == {"method", "rank", "α", "learning rate"}
    assert "full fine-tuning scores" in lora.sentences[1]
    command = f"lorasweep export {finished_and_confirmed}/runs/lora-confirm-0000 --format peft --out adapter"
    assert command in lora.sentences[2]
    assert len(full.sentences) == 2


def test_rank_is_the_smallest_sufficient_one_and_not_the_best(tmp_path: Path) -> None:
    found = recommended(build_rank_sweep(tmp_path, {2: 1.75, 8: 1.6605, 32: 1.66}, noise=0.0002))
    assert [(one.settings["rank"], one.is_settled) for one in found] == [("8", True)]  # it is as good as full, too


def test_predicted_setting_is_written_with_the_value_of_confirm_each(tmp_path: Path) -> None:
    sweep = build_rank_sweep(tmp_path, {2: 1.75, 8: 1.6605}, noise=0.0002)
    (lora,) = recommended(sweep)
    settings = yaml.safe_load(lora.files["train.yaml"])
    assert (settings["method.rank"], settings["optim.lr"]) == (8, 0.0102)
    assert "a predicted setting" in lora.files["train.yaml"]
    for source in (sweep, sweep / "lora", sweep / "lora-rank-8"):
        found, origin = read_recommended(source)
        assert found["method.rank"] == 8
        assert (origin["arm"], origin["trial"]) == ("lora-rank-8", None)
    assert read_recommended(sweep / "lora-rank-2")[0]["method.rank"] == 2


def test_sweep_without_a_complete_trial_recommends_nothing(sweep: Path) -> None:
    edit_json(sweep / "sweep.json", lambda raw: [t.update(state="failed", value=None) for t in raw["trials"]])
    assert recommended(sweep) == []
    write_report(sweep)
    assert not (sweep / "report/recommended").exists()


def save_adapter_configs(sweep: Path, config: dict[str, Any]) -> None:
    for run_folder in (sweep / "runs").glob("lora-*"):
        (run_folder / "best").mkdir(exist_ok=True)
        (run_folder / "best/adapter_config.json").write_text(json.dumps(config))


def test_peft_gets_the_saved_configuration_and_with_pissa_the_rank_of_training(sweep: Path) -> None:
    save_adapter_configs(sweep, {"r": 99, "lora_alpha": 5, "rank_pattern": {"q": 2}, "inference_mode": True})
    lora = recommended(sweep)[-1]
    assert "    r=99,\n    lora_alpha=5,\n    rank_pattern={'q': 2},\n)" in lora.files["peft_config.py"]
    for run_folder in (sweep / "runs").glob("lora-*"):
        edit_json(run_folder / "run.json", lambda raw: raw["config"]["method"].update(init="pissa"))
    lora = recommended(sweep)[-1]
    assert f"    r={lora.settings['rank']},\n" in lora.files["peft_config.py"]
    assert "    init_lora_weights='pissa',\n)" in lora.files["peft_config.py"]


def keep_full_record(sweep: Path, settings: dict[str, Any]) -> None:
    """Gives every lora trial the whole configuration of a real run, and the arm its settings."""
    config = asdict(compose_run({"method": "lora", **settings}))

    def set_settings(raw: dict[str, Any]) -> None:
        raw["arms"][1]["settings"] = {"method": "lora", **settings, "output": "elsewhere"}

    def set_config(raw: dict[str, Any]) -> None:
        swept = {key: raw["config"]["method"][key] for key in ("rank", "alpha")}
        lr = raw["config"]["optim"]["lr"]
        raw["config"] = {**config, "method": {**config["method"], **swept}, "optim": {**config["optim"], "lr": lr}}

    edit_json(sweep / "sweep.json", set_settings)
    for run_folder in (sweep / "runs").glob("lora-*"):
        edit_json(run_folder / "run.json", set_config)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # in PEFT
def test_files_train_here_and_load_in_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft  # noqa: PLC0415 (slow to start)
    import transformers  # noqa: PLC0415

    sweep = build_sweep(tmp_path / "sweep", full=0)
    patterns = {"method.rank_pattern": {"down_proj": 2}, "method.targets": ["q_proj", "re:.*down_proj"]}
    small = {"trainer.max_steps": 2, "trainer.batch_size": 2, "trainer.eval_every_steps": 2}
    keep_full_record(sweep, {**patterns, **small, "data.max_validation_blocks": 2, "schedule": "cosine"})
    write_report(sweep)
    folder = sweep / "report/recommended"
    monkeypatch.chdir(tmp_path)
    assert run(["train", str(folder / "train.yaml"), "output=trained"]) == DONE
    settings = yaml.safe_load((folder / "train.yaml").read_text())
    assert settings["method.rank_pattern"] == {"down_proj": 2}
    trained = json.loads((tmp_path / "trained/best/adapter_config.json").read_text())
    save_adapter_configs(sweep, trained)
    write_report(sweep)

    names: dict[str, Any] = {}
    exec((folder / "peft_config.py").read_text(), names)
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=4, vocab_size=16)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), names["peft_config"])
    loaded = model.peft_config["default"]
    assert loaded.r == trained["r"]
    assert (loaded.rank_pattern, loaded.inference_mode) == (trained["rank_pattern"], False)


def test_settings_are_read_of_a_sweep_or_of_an_arm_and_use_all_training_data(confirmed: Path) -> None:
    limited = {"data": "table", "data.max_train_examples": 100, "trainer.batch_size": 4}
    edit_json(confirmed / "sweep.json", lambda raw: [arm["settings"].update(limited) for arm in raw["arms"]])
    full, lora = recommended(confirmed)
    for source, one in ((confirmed, full), (confirmed / "full", full), (confirmed / "lora", lora)):
        settings, origin = read_recommended(source)
        assert settings == yaml.safe_load(one.files["train.yaml"]) | {"data.max_train_examples": None}
        assert origin == {
            "sweep": str(confirmed.resolve()),
            "name": "quickstart",
            "arm": one.arm,
            "trial": find_winners(read_sweep(confirmed))[one.arm].number,  # type: ignore[union-attr]
        }


def test_a_sweep_without_recommended_settings_is_refused(confirmed: Path) -> None:
    wrong = {
        "lra": (ConfigError, r"with one of the arms frozen, .*lra.* Did you mean `lora`\?"),
        "frozen": (RecordError, "a complete trial of a method that trains"),
        "lora/0": (RecordError, r"must contain sweep\.json"),
    }
    for name, (error, message) in wrong.items():
        with pytest.raises(error, match=message):
            read_recommended(confirmed / name)
    edit_json(confirmed / "sweep.json", lambda raw: raw.update(status="interrupted"))
    with pytest.raises(RecordError, match=r"is interrupted\. Type `lorasweep sweep --resume"):
        read_recommended(confirmed)


def test_runs_of_a_former_setting_are_in_no_mean(confirmed: Path) -> None:
    before = {one.name: one.mean for one in summarize(confirmed).data.evidence.subjects}

    def add_former(raw: dict[str, Any]) -> None:
        rows = [row for row in raw["confirm"] if row["arm"] == "lora"]
        raw["confirm"] += [row | {"setting_number": row["setting_number"] + 1, "value": 9.0} for row in rows]

    edit_json(confirmed / "sweep.json", add_former)
    data = summarize(confirmed).data
    assert {one.name: one.mean for one in data.evidence.subjects} == before
    assert len(data.former_runs) == 5
    assert data.tokens_trained > sum(run.record.tokens_trained for run in data.trials if run.record)
