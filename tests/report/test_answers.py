"""The three lines at the top: verdict, number and interval, or what is open and what would close it."""

import json
import shutil

import pytest
from tests.files import edit_json

from lorasweep.report.findings import read_findings
from lorasweep.report.sweep_data import load_sweep_data
from lorasweep.report.terminal import list_details

from .conftest import STEPS, build_rank_sweep


def test_other_methods_and_pairs_get_a_sentence_each(tmp_path):
    sweep = build_rank_sweep(tmp_path, {4: 1.7, 16: 1.662})

    def ask(raw):
        pair = {"name": "pair", "arm": "lora", "key": None, "subjects": ["lora-rank-4"], "reference": "lora-rank-16"}
        raw["questions"].append(pair)

    edit_json(sweep / "sweep.json", ask)
    (sentence,) = list_details(load_sweep_data(sweep))
    assert sentence.startswith("`lora-rank-4` gains -10 %")


def test_findings_has_an_entry_for_each_answer_and_the_setting(tmp_path):
    sweep = build_rank_sweep(tmp_path, {1: 1.8, 4: 1.7, 16: 1.662})
    findings = read_findings(sweep)
    entries = findings.as_json()["questions"]
    assert all(
        entry.keys() == {"name", "subject", "reference", "verdict", "value", "interval", "open_because"}
        for entry in entries
    )
    assert [entry["name"] for entry in entries] == ["as_good_as_full"] * 3 + ["smallest_rank"] * 2 + ["setting"]
    first = findings.data.evidence.answers[0]
    assert [entries[0][key] for key in ("subject", "value", "interval")] == [first.subject, first.value, first.interval]
    assert entries[-1]["subject"] == "lora-rank-16"
    assert entries[-1]["value"] == {"method.rank": 16, "optim.lr": 0.0102}
    assert entries[-1]["interval"] == (0.0, 0.001)
    assert entries[-1]["verdict"] == "predicted"


def test_fixed_settings_stand_beside_the_best_of_the_search(tmp_path):
    scores = {4: 1.662, 16: 1.66}
    findings = read_findings(build_rank_sweep(tmp_path / "both", scores, fixed=1.8))
    fixed = findings.answers
    assert [line.question for line in fixed][3:] == ["What do the settings of present cost?"]
    line = fixed[3]
    assert line.state == "settled"
    present, best = line.text.split("; ")
    assert present.startswith("Rank 32, α 16, learning rate 0.001 keeps 6")
    assert present.endswith(" of full's gain (worse)")
    assert best.startswith("rank 4, α 16, learning rate 0.0102 keeps ")
    assert "present" not in fixed[0].text
    assert present.count("[") == best.count("[") == 1
    assert len(read_findings(build_rank_sweep(tmp_path / "none", scores)).answers) == 3


def test_fixed_settings_are_compared_by_score_without_a_gain_or_a_confirm_stage(tmp_path):
    sweep = build_rank_sweep(tmp_path, {4: 1.662, 16: 1.66}, fixed=1.8)

    def drop(raw, *, arms, stage):
        for name in ("arms", "trials", "settings", "confirm"):
            raw[name] = [row for row in raw[name] if row.get("arm", row.get("name")) not in arms]
        if stage:
            raw |= {"settings": [], "confirm": [], "questions": [], "looks": []}

    edit_json(sweep / "sweep.json", lambda raw: drop(raw, arms=["full"], stage=False))
    line = read_findings(sweep).answers[3]
    assert "has 1.80" in line.text
    assert "bits per byte; rank" in line.text
    edit_json(sweep / "sweep.json", lambda raw: drop(raw, arms=[], stage=True))
    line = read_findings(sweep).answers[3]
    assert line.text.startswith("Open: Rank 32")
    assert line.next.command


@pytest.mark.parametrize(
    ("optim", "has_law"),
    [
        ({"name": "adamw"}, True),
        ({"_target_": "torch.optim.Adam"}, True),
        ({"name": "sgd"}, False),
        ({"_target_": "torch.optim.SGD"}, False),
    ],
)
def test_the_rate_at_another_alpha_is_said_only_of_adam(finished_and_confirmed, tmp_path, optim, has_law):
    sweep = shutil.copytree(finished_and_confirmed, tmp_path / "sweep")
    for run in sweep.glob("runs/*/run.json"):
        edit_json(run, lambda raw: raw["config"].update(optim={"lr": 1e-3, **optim}))
    findings = read_findings(sweep)
    assert ("lr = u/√α" in findings.answers[2].text) is has_law


def test_share_of_full_gain_is_mirrored_when_maximizing(sweep):
    def list_shares():
        return [arm["share_of_full_gain"] for arm in read_findings(sweep).as_json()["arms"]]

    def negate(raw):
        raw["search_metric"]["direction"] = "maximize"
        for trial in raw["trials"]:
            trial["search_score"] = None if trial["search_score"] is None else -trial["search_score"]

    before = list_shares()
    edit_json(sweep / "sweep.json", negate)
    assert list_shares() == pytest.approx(before)


def test_without_a_shown_gain_a_verdict_has_the_interval_of_the_difference(tmp_path):
    sweep = build_rank_sweep(tmp_path, {4: 1.60, 64: 1.75}, seeds=2)

    def take_the_gain(raw):
        for number, row in enumerate(row for row in raw["confirm"] if row["arm"] == "full"):
            row["test_scores"]["bits_per_byte"] = 2.031 + (-0.02, 0.019)[number]

    edit_json(sweep / "sweep.json", take_the_gain)
    full, rank, _ = (line.text for line in read_findings(sweep).answers)
    assert "it differs from rank 64 by -0.15 [-0.22, -0.08] bits per byte (sufficient)" in rank
    assert "rank 64 differs from `full` by" in full
    assert "%" not in full + rank


def test_answers_say_that_minutes_left_less_than_an_epoch_and_why_the_looks_ended(tmp_path):
    sweep = build_rank_sweep(tmp_path, {4: 1.7, 16: 1.662}, noise=0.05)

    def list_texts():
        return [line.text for line in read_findings(sweep).answers]

    assert not any("`--minutes`" in text or "The sweep ended at" in text for text in list_texts())

    def cut(raw):
        raw["definition"] = {"file": {"settings": {"sweep.minutes": 6}}, "overrides": {}}
        raw["looks"] = [3, 5, 10]
        raw["looks_done"] = [{"seeds": 5, "open": ["lora-rank-4"], "next": []}]

    edit_json(sweep / "sweep.json", cut)
    for run in sweep.glob("runs/*/run.json"):
        edit_json(run, lambda raw: raw["data"].update(train={"examples": 10_000}))
        trainer = json.loads(run.read_text())["config"]["trainer"]
    texts, size = list_texts(), trainer["batch_size"]
    cut_to = f"each run had {STEPS} steps of {size} ({STEPS * size / 10_000:.2g} epochs)."
    assert all(text.endswith(f" To fit `--minutes`, {cut_to}") for text in texts)
    assert "The sweep ended at 5 of 10 seeds, because more had no good chance to settle it." in texts[0]
