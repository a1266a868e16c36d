"""What the confirm stage shows, in sentences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorasweep.config.sweep import warn_of_few_seeds
from lorasweep.report import write_report
from lorasweep.report.evidence.equivalence import FurtherEvidence
from lorasweep.report.evidence.verdicts import PairComparison
from lorasweep.report.findings import ONE_SEED, describe_pair
from lorasweep.report.summary import summarize

from .conftest import build_rank_arms, build_sweep, confirm_sweep, confirm_winners, edit_json

PAIR = PairComparison(
    first="a",
    second="b",
    verdict="worse",
    difference=0.0361,
    interval=(0.0302, 0.042),
    p_value=0.001,
    adjusted_p_value=0.003,
    equivalence_p_value=0.9,
    num_seeds=5,
    uses_examples=True,
)
ALIKE = replace(
    PAIR,
    verdict="inconclusive",
    difference=0.002,
    interval=(-0.004, 0.008),
    settled_by=FurtherEvidence(kind="seeds", more_seeds=7),
)


@pytest.mark.parametrize(
    ("pair", "sentence"),
    [
        (PAIR, "`a` is worse than `b` by 0.036 [0.030, 0.042]"),
        (
            replace(PAIR, verdict="better", difference=-0.0361, interval=(-0.042, -0.0302)),
            "`a` is better than `b` by 0.036 [0.030, 0.042]",
        ),
        (
            replace(ALIKE, p_value=0.4),
            "`a` and `b` differ by 0.002 [-0.004, 0.008], which is inconclusive; 7 more seeds would probably settle it",
        ),
        (
            replace(ALIKE, verdict="equivalent"),
            "`a` and `b` are equivalent: they differ by 0.002 [-0.004, 0.008], which is less than the margin",
        ),
        (
            replace(PAIR, verdict="not tested", p_value=None, reason="they have no seed in common"),
            "`a` and `b` were not tested: they have no seed in common",
        ),
    ],
)
def test_verdict_in_words(pair: PairComparison, sentence: str) -> None:
    assert describe_pair(pair, groups=None) == sentence


@pytest.mark.parametrize(
    ("evidence", "groups", "words"),
    [
        (FurtherEvidence(kind="seeds", more_seeds=7), "documents", "7 more seeds"),
        (FurtherEvidence(kind="seeds", more_seeds=1), None, "1 more seed"),
        (FurtherEvidence(kind="seeds"), None, "more seeds"),
        (FurtherEvidence(kind="test examples"), None, "more test examples"),
        (FurtherEvidence(kind="test examples"), "documents", "more test examples in more documents"),
        (FurtherEvidence(kind="test examples"), "groups of `a`", "more test examples in more groups of `a`"),
        (FurtherEvidence(kind="too many seeds"), "documents", "no practical number of seeds"),
    ],
)
def test_further_evidence_in_words(evidence: FurtherEvidence, groups: str | None, words: str) -> None:
    assert evidence.describe(groups=groups) == words


def test_pair_that_alone_would_pass_is_said_to_fall_to_the_correction() -> None:
    assert "excludes 0" in describe_pair(replace(ALIKE, p_value=0.03, adjusted_p_value=0.2), groups=None)


def test_top_says_ends_arm_share_verdict_and_limits(confirmed: Path) -> None:
    sentences = summarize(confirmed).sentences
    text = " ".join(sentences)
    assert sentences[0].startswith("Scores are bits per byte on test data that no search has seen, lower is better")
    assert sentences[1].startswith("The frozen base scores 2.0")
    assert "of what full fine-tuning gains, training" in text
    assert "It is worse than full fine-tuning by" in text
    assert "corrected for 3 comparisons (Holm); an interval is for one number alone." in text
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
    text = " ".join(summary.sentences)
    assert "means over 1 fresh seed with" in text
    assert "were not tested: they have one seed in common" in text
    assert "no verdict on `lora` and `full`" in text


@pytest.mark.parametrize(
    ("margin", "parts"),
    [
        ("5%", ("0.018", "bits per byte (5% of full", "before the sweep")),
        (0.02, ("0.02 bits per byte,", "before the sweep")),
    ],
)
def test_margin_is_said(confirmed: Path, margin: float | str, parts: tuple[str, ...]) -> None:
    edit_json(confirmed / "sweep.json", lambda raw: raw.update(margin=margin))
    (sentence,) = [text for text in summarize(confirmed).sentences if "margin, 0" in text]
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


def test_few_seeds_are_a_warning_on_the_page_and_above_the_other_findings(tmp_path: Path) -> None:
    confirm_sweep(build_sweep(tmp_path), seeds=2)
    edit_json(tmp_path / "sweep.json", lambda raw: raw.update(warnings=["other", *warn_of_few_seeds(2)]))
    summary = write_report(tmp_path)
    (warning,) = summary.warnings
    assert warning.startswith("Two seeds say little")
    sentences = list(summary.sentences)
    assert "other" in sentences
    assert not any("`confirm.seeds` is 2" in text for text in sentences)  # the warning above says it
    assert sentences.index(warning) < next(n for n, text in enumerate(sentences) if "tokens trained" in text)
    page = (tmp_path / "report/index.html").read_text()
    assert page.index("Two seeds say little") < page.index('<details id="findings">')
    assert page.count("Two seeds say little") == 2  # at the top and among all findings


def test_of_many_arms_four_best_get_a_sentence(tmp_path: Path) -> None:
    sweep = build_rank_arms(tmp_path, {1: 1.9, 2: 1.8, 4: 1.75, 8: 1.7, 16: 1.67, 32: 1.669})
    sentences = summarize(sweep).sentences
    scored = [text for text in sentences if " scores " in text and text.startswith("`lora")]
    assert [text.split("`")[1] for text in scored] == ["lora-rank4", "lora-rank8", "lora-rank16", "lora-rank32"]
    assert "The other 2 arms are in the table below." in sentences


def test_warnings_of_the_sweep_are_shown(sweep: Path) -> None:
    edit_json(sweep / "sweep.json", lambda raw: raw.update(warnings=["Arms have unequal numbers of trials."]))
    assert "Arms have unequal numbers of trials." in summarize(sweep).sentences
