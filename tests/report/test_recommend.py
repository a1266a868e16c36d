"""The recommended settings follow the verdicts, and `lorasweep train --from` reads them."""

import pytest
from tests.files import edit_json, set_values
from tests.small_runs import OWN_MODULE

from lorasweep.config.build import as_settings
from lorasweep.config.compose import compose_run
from lorasweep.errors import ConfigError, RecordError
from lorasweep.report.facts import read_findings
from lorasweep.report.recommend import load_recommended, read_recommended
from lorasweep.report.text import name_settings
from lorasweep.results import load_sweep

from .conftest import build_rank_sweep, scatter_seeds


def recommended(sweep):
    return list(read_findings(sweep).recommended)


def test_better_method_is_recommended_with_lora_as_the_alternative(finished_and_confirmed):
    full, lora = recommended(finished_and_confirmed)
    assert (full.subject.name, full.is_settled) == ("full", True)
    assert name_settings(full).keys() == {"method", "learning rate", "steps"}
    assert name_settings(lora)["method"] == "LoRA"
    assert name_settings(lora).keys() == {"method", "rank", "α", "learning rate", "steps"}
    train, export = lora.commands["train"], lora.commands["export"]
    assert train == f"lorasweep train --from {finished_and_confirmed}/lora"
    assert export == f"lorasweep export {finished_and_confirmed}/lora --format peft --out adapter"
    assert len(full.commands) == 1
    # a file of another tool that trains LoRA gets the settings of LoRA
    _, one, _ = load_recommended(finished_and_confirmed, key="RUN", methods=("lora", "peft"))
    assert one.row.method == "lora"


@pytest.mark.parametrize(
    ("settings", "ending"),
    [({"model.trust_remote_code": True}, "--out adapter --trust"), (OWN_MODULE, None), ({}, "--out adapter")],
    ids=["remote code", "own module", "plain"],
)
def test_an_export_is_a_command_only_if_it_works(finished_and_confirmed, settings, ending):
    config = as_settings(compose_run({"method": "lora", **settings}))
    for run in finished_and_confirmed.glob("runs/*/run.json"):
        set_values(run, {"config": config})
    *_, lora = recommended(finished_and_confirmed)
    exports = [command for command in lora.commands.values() if "export" in command]
    assert [command.endswith(ending or "") for command in exports] == [True] * (ending is not None)


def test_rank_is_the_smallest_that_is_shown_to_be_sufficient(tmp_path):
    sweep = build_rank_sweep(tmp_path / "one", {4: 1.72, 16: 1.66, 64: 1.652})
    for rank in (16, 64):
        scatter_seeds(sweep, f"lora-rank-{rank}", 0.012)
    verdicts = {(one.name, one.subject): one.verdict for one in read_findings(sweep).data.evidence.answers}
    assert verdicts["as_good_as_full", "lora-rank-16"] == "open"
    assert verdicts["as_good_as_full", "lora-rank-64"] == "not worse"
    assert verdicts["smallest", "lora-rank-16"] == "sufficient"
    assert [(name_settings(one)["rank"], one.is_settled) for one in recommended(sweep)] == [("64", False)]
    found = recommended(build_rank_sweep(tmp_path / "two", {2: 1.75, 8: 1.6605, 32: 1.66}, noise=0.0002))
    assert [(name_settings(one)["rank"], one.is_settled) for one in found] == [
        ("8", True)
    ]  # it is as good as full, too


def test_predicted_setting_is_read_with_the_value_of_confirm_each(tmp_path):
    sweep = build_rank_sweep(tmp_path, {2: 1.75, 8: 1.6605}, noise=0.0002)
    for source in (sweep, sweep / "lora", sweep / "lora-rank-8"):
        found, origin = read_recommended(source)
        assert (found["method.rank"], found["optim.lr"]) == (8, 0.0102)
        assert (origin["arm"], origin["trial"]) == ("lora-rank-8", None)
    for subject in (None, "lora", "lora-rank-8"):
        assert load_sweep(sweep).recommended(subject).params == {"method.rank": 8, "optim.lr": 0.0102}
    assert read_recommended(sweep / "lora-rank-2")[0]["method.rank"] == 2


def test_settings_are_read_of_a_sweep_or_of_an_arm_and_use_all_training_data(confirmed):
    limited = {"data": "table", "data.max_train_examples": 100, "trainer.batch_size": 4}
    edit_json(confirmed / "sweep.json", lambda raw: [arm["settings"].update(limited) for arm in raw["arms"]])
    full, lora = recommended(confirmed)
    for source, one in ((confirmed, full), (confirmed / "full", full), (confirmed / "lora", lora)):
        settings, origin = read_recommended(source)
        assert (settings["trainer.batch_size"], settings["data.max_train_examples"]) == (4, None)
        assert origin == {
            "sweep": str(confirmed.resolve()),
            "name": "quickstart",
            "arm": one.subject.name,
            "trial": load_sweep(confirmed).best(one.subject.arm).number,
        }


def test_a_sweep_without_recommended_settings_is_refused(confirmed, monkeypatch):
    for name, error, message in (
        ("lra", ConfigError, r"with one of frozen, .*lra.* Did you mean `lora`\?"),
        ("frozen", RecordError, "a complete trial of a method that trains"),
        ("lora/0", RecordError, "a sweep's folder must exist"),
    ):
        with pytest.raises(error, match=message):
            read_recommended(confirmed / name)
    edit_json(confirmed / "sweep.json", lambda raw: raw.update(status="interrupted"))
    for is_open, command in ((False, "sweep --resume"), (True, "status")):
        monkeypatch.setattr("lorasweep.report.sweep_data.is_running", lambda _folder, is_open=is_open: is_open)
        with pytest.raises(RecordError, match=rf"is interrupted\. Type `lorasweep {command}"):
            read_recommended(confirmed)


def test_runs_of_a_former_setting_are_in_no_mean(confirmed):
    before = {name: mean.value for name, mean in read_findings(confirmed).data.evidence.means.items()}

    def add_former(raw):
        rows = [row for row in raw["confirm"] if row["arm"] == "lora"]
        raw["confirm"] += [
            row | {"setting_number": row["setting_number"] + 1, "test_scores": {"bits_per_byte": 9.0}} for row in rows
        ]

    edit_json(confirmed / "sweep.json", add_former)
    data = read_findings(confirmed).data
    assert {name: mean.value for name, mean in data.evidence.means.items()} == before
    assert data.tokens_trained > sum(run.record.tokens_trained for run in data.trials if run.record)
