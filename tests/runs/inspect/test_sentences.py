"""Sentences say what the numbers are."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from lorasweep.runs.inspect.layers import LayerChange
from lorasweep.runs.inspect.sentences import describe_overlaps, describe_run
from lorasweep.runs.inspect.subspaces import Overlap
from lorasweep.runs.inspect.truncation import TruncatedScore, Truncation

RUN = SimpleNamespace(method="lora", record=SimpleNamespace(metric="bits_per_byte"))


def make_row(**values):
    row = LayerChange(
        layer="layers.0.q_proj",
        block=0,
        kind="q_proj",
        d_out=8,
        d_in=8,
        trained_rank=8,
        change_norm=0.3,
        base_norm=4.0,
        norm_share=0.2,
        effective_rank=5.24,
        stable_rank=2.0,
        energy_rank=4,
        amplification=3.0,
    )
    return replace(row, **values)


ROWS = (
    make_row(),
    make_row(layer="layers.1.up_proj", block=1, kind="up_proj", change_norm=0.4, base_norm=3.0, norm_share=0.8),
)


def make_truncation(scores, sign=1):
    rows = [TruncatedScore(rank=rank, score=score, norm_share=0.5) for rank, score in scores.items()]
    return Truncation(scores=tuple(rows), sign=sign)


def describe(truncation=None, rows=ROWS, note=None):
    return describe_run(RUN, rows, truncation, note=note)


def test_size_rank_and_place_are_said():
    assert describe() == (
        "`lora` at rank 8 changed 2 weights of the base by 10 % of their norm.",
        "Its effective rank is 5.2 and its stable rank 2.0; 90 % of the squared norm lies in 4 directions "
        "(medians over layers).",
        "`up_proj` has the largest share of the squared norm (80 %) and `q_proj` the smallest (20 %); "
        "block 1 of 0 to 1 has 80 %.",
    )


@pytest.mark.parametrize(
    ("method", "trained_rank", "how"),
    [("lora", 8, "at rank 8"), ("bitfit", None, "by `bitfit`"), ("full", None, "in full")],
)
def test_the_rank_that_is_enough_and_the_loss_of_half_of_it_are_said(method, trained_rank, how):
    truncation = make_truncation({0: 2.0, 1: 1.6, 2: 1.4, 4: 1.2, 6: 1.004, 8: 1.0})
    run = SimpleNamespace(**{**vars(RUN), "method": method})
    found = " ".join(describe_run(run, [make_row(trained_rank=trained_rank)], truncation, note=None))
    assert f"Trained {how}, rank 6 is enough" in found
    assert "keeps 99% of its gain; rank 2 loses 0.400 bits per byte." in found


@pytest.mark.parametrize(
    "scores", [{0: 2.0, 1: 1.9, 2: 1.0}, {0: 2.0, 1: 1.9, 2: 1.001, 16: 1.0}], ids=["all", "more directions, as DoRA"]
)
def test_a_change_that_needs_its_trained_rank_says_so(scores):
    found = " ".join(describe(make_truncation(scores), rows=[make_row(trained_rank=2)]))
    assert "Trained at rank 2, it needs all of it" in found
    assert "rank 1 loses 0.900 bits per byte" in found


def test_a_change_that_gains_nothing_says_so():
    found = " ".join(describe(make_truncation({0: 1.0, 1: 1.5})))
    assert "scores 1.500 bits per byte and none of it 1.000: it gains nothing" in found


def test_a_note_stands_where_scores_are_missing():
    assert "Not scored." in describe(note="Not scored.")


def test_vectors_alone_have_no_rank():
    row = make_row(
        kind="q_proj.bias", d_in=None, trained_rank=None, effective_rank=None, amplification=None, norm_share=1.0
    )
    assert describe(rows=[row]) == (
        "`lora` changed 1 weight of the base by 7.5 % of their norm.",
        "No matrix changed, so there is no rank to speak of.",
    )


def test_overlaps_stand_beside_those_of_random_directions():
    overlaps = [Overlap("mean", n, n, 0.5 / n, 0.1 * n) for n in (1, 2, 4)] + [Overlap("q", 1, 1, 0.9, 0.1)]
    assert describe_overlaps("This run", "`x`", overlaps) == (
        "This run and `x` share (φ, mean over layers) 0.50 of the first direction (random: 0.10), "
        "0.12 of the first 4 directions (random: 0.40)."
    )
