"""Sentences state the measured values."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lorasweep.runs.inspect.measures import LayerRow, Overlap
from lorasweep.runs.inspect.sentences import describe_overlaps, describe_run
from lorasweep.runs.inspect.truncation import RankScore


def make_row(**values):
    row = LayerRow(
        layer="layers.0.q_proj",
        block=0,
        kind="q_proj",
        d_out=8,
        d_in=8,
        trained_rank=8,
        update_norm=0.3,
        base_norm=4.0,
        norm_share=0.2,
        energy_rank=4,
        amplification=3.0,
    )
    return replace(row, **values)


ROWS = (make_row(), make_row(layer="layers.1.up_proj", block=1, kind="up_proj", update_norm=0.4, base_norm=3.0))


def make_scores(scores):
    """Returns rows in which lower scores are better; the last row is the whole update."""
    *_, full = scores.values()
    gain = scores[0] - full
    return [
        RankScore(
            rank=rank,
            score=score,
            loss=score - full,
            kept_share=(scores[0] - score) / gain if gain > 0 else None,
            norm_share=0.5,
        )
        for rank, score in scores.items()
    ]


def describe(scores=(), *, rows=ROWS, method="lora"):
    return " ".join(describe_run(method, "bits_per_byte", rows, scores))


def test_size_and_rank_are_said():
    text = describe()
    assert "`lora` at rank 8 changed 2 weights" in text
    assert "10 % of their norm" in text
    assert "4 directions" in text


@pytest.mark.parametrize(("method", "trained_rank", "how"), [("lora", 8, "at rank 8"), ("bitfit", None, "by `bitfit`")])
def test_the_rank_that_is_enough_and_the_loss_of_half_of_it_are_said(method, trained_rank, how):
    scores = make_scores({0: 2.0, 1: 1.6, 2: 1.4, 4: 1.2, 6: 1.004, 8: 1.0})
    text = describe(scores, rows=[make_row(trained_rank=trained_rank)], method=method)
    assert f"Trained {how}, rank 6 is enough: cut to it, it keeps at least 99% of its gain" in text
    assert "rank 2 loses 0.400" in text


@pytest.mark.parametrize(
    "scores", [{0: 2.0, 1: 1.9, 2: 1.0}, {0: 2.0, 1: 1.9, 2: 1.001, 16: 1.0}], ids=["all", "more directions, as DoRA"]
)
def test_an_update_that_needs_its_trained_rank_says_so(scores):
    text = describe(make_scores(scores), rows=[make_row(trained_rank=2)])
    assert "it needs its whole rank" in text
    assert "rank 1 loses 0.900" in text


def test_an_update_that_gains_nothing_says_so():
    text = describe(make_scores({0: 1.0, 1: 1.5}))
    assert "1.500 bits per byte" in text
    assert "brings no gain" in text


def test_vectors_alone_have_no_rank():
    row = make_row(kind="q_proj.bias", d_in=None, trained_rank=None, energy_rank=None, amplification=None)
    assert "direction" not in describe(rows=[row], method="bitfit")


def test_overlaps_stand_beside_those_of_random_directions():
    overlaps = [Overlap("mean", n, n, 0.5 / n, 0.1 * n) for n in (1, 2, 4)] + [Overlap("q", 1, 1, 0.9, 0.1)]
    text = describe_overlaps("This run", "`x`", overlaps)
    assert "This run and `x`" in text
    assert "0.50 of the first direction (random: 0.10)" in text
    assert "0.12 of the first 4 directions" in text
