"""What the confirm stage shows, in sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorasweep.report.evidence.looks import compute_look_level
from lorasweep.report.findings import ONE_SEED
from lorasweep.report.summary import summarize

from .conftest import build_rank_sweep, build_sweep, confirm_sweep, confirm_winners, edit_json


def test_top_says_ends_arm_share_verdict_and_limits(confirmed: Path) -> None:
    sentences = summarize(confirmed).sentences
    text = " ".join(sentences)
    assert sentences[0].startswith("Scores are bits per byte on test data that no search has seen, lower is better")
    assert sentences[1].startswith("The frozen base scores 2.0")
    assert "of what full fine-tuning gains, training" in text
    assert "of what full fine-tuning gains, training" in text
    assert "at most 5 % over all questions and looks" in text
    assert "25 trials and 11 confirm runs in" in text
    assert ONE_SEED not in sentences


@pytest.mark.parametrize(
    ("data", "groups"),
    [
        ({"name": "text", "group": None}, "40 test examples in 20 documents."),
        ({"name": "chat", "group": None}, "40 test examples in 20 prompts."),
        ({"name": "table", "group": "author"}, "40 test examples in 20 groups of `author`."),
    ],
)
def test_groups_of_test_examples_are_named(confirmed: Path, data: dict[str, str | None], groups: str) -> None:
    for run in confirmed.glob("runs/*-confirm-*"):
        edit_json(run / "run.json", lambda raw: raw["config"].update(data=data))
    assert groups in summarize(confirmed).sentences[0]


def test_one_seed_has_no_verdict_and_says_so(tmp_path: Path) -> None:
    summary = summarize(confirm_sweep(build_sweep(tmp_path), seeds=1))
    assert "means over 1 fresh seed with" in " ".join(summary.sentences)
    assert "one seed says nothing about another" in summary.answers[0].text


def test_looks_seeds_and_confidence_are_said_once(confirmed: Path) -> None:
    edit_json(confirmed / "sweep.json", lambda raw: raw.update(looks=[3, 5, 10]))
    (sentence,) = [text for text in summarize(confirmed).sentences if "planned looks" in text]
    assert "3, 5 and 10 seeds; 5 were used" in sentence
    level = compute_look_level((3, 5, 10), level=0.025)  # one question has the whole level
    assert f"{100 * (1 - 2 * level):.3g} % confidence" in sentence


def test_full_gain_is_said_as_a_share_of_the_base(confirmed: Path) -> None:
    (sentence,) = [text for text in summarize(confirmed).sentences if text.startswith("Full fine-tuning lowers")]
    assert "by 18 % [" in sentence  # from 2.03 to 1.66 bits per byte


@pytest.mark.parametrize(
    ("margin", "parts"),
    [
        ("5%", ("0.018", "bits per byte (5% of full", "stated in the sweep")),
        (0.02, ("0.02 bits per byte,", "stated in the sweep")),
    ],
)
def test_margin_is_said(confirmed: Path, margin: float | str, parts: tuple[str, ...]) -> None:
    edit_json(confirmed / "sweep.json", lambda raw: raw.update(margin=margin))
    (sentence,) = [text for text in summarize(confirmed).sentences if text.startswith("The margin")]
    assert all(part in sentence for part in parts)


def test_margin_without_a_gain_names_the_key(confirmed: Path) -> None:
    edit_json(confirmed / "sweep.json", lambda raw: raw.update(direction="maximize"))
    confirm_winners(confirmed)
    assert any("No margin" in text and "`confirm.margin`" in text for text in summarize(confirmed).sentences)


@pytest.mark.parametrize("gone", [{"full"}, {"frozen"}, {"frozen", "full"}])
def test_missing_end_of_the_scale_is_said(confirmed: Path, gone: set[str]) -> None:
    def drop(raw: dict[str, Any]) -> None:
        raw["confirm"] = [row for row in raw["confirm"] if row["arm"] not in gone]

    edit_json(confirmed / "sweep.json", drop)
    sentences = summarize(confirmed).sentences
    assert "no share of full's gain is known" in sentences[1].lower()
    assert not any("of what full fine-tuning gains" in text for text in sentences)


def test_full_that_gained_nothing_has_no_share(confirmed: Path) -> None:
    edit_json(confirmed / "sweep.json", lambda raw: raw.update(direction="maximize"))
    confirm_winners(confirmed)
    sentences = summarize(confirmed).sentences
    assert any("gained nothing, so no share" in text for text in sentences)
    assert "higher is better" in sentences[0]


def test_of_many_subjects_four_best_get_a_sentence(tmp_path: Path) -> None:
    sweep = build_rank_sweep(tmp_path, {1: 1.9, 2: 1.8, 4: 1.75, 8: 1.7, 16: 1.67, 32: 1.669})
    sentences = summarize(sweep).sentences
    scored = [text for text in sentences if " scores " in text and text.startswith("`lora")]
    assert [text.split("`")[1] for text in scored] == [f"lora-rank-{rank}" for rank in (4, 8, 16, 32)]
    assert "The other 2 arms are in the table below." in sentences


def test_warnings_of_the_sweep_are_shown(sweep: Path) -> None:
    edit_json(sweep / "sweep.json", lambda raw: raw.update(warnings=["Arms have unequal numbers of trials."]))
    assert "Arms have unequal numbers of trials." in summarize(sweep).sentences
