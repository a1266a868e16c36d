"""Sentences state the measured values."""

from __future__ import annotations

from dataclasses import replace

from lorasweep.runs.inspect.measures import LayerRow, Overlap
from lorasweep.runs.inspect.sentences import describe_overlaps, describe_run


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


def describe(rows=ROWS, *, method="lora"):
    return " ".join(describe_run(method, rows))


def test_size_and_rank_are_said():
    text = describe()
    assert "`lora` at rank 8 changed 2 weights" in text
    assert "10 % of their norm" in text
    assert "4 directions" in text


def test_vectors_alone_have_no_rank():
    row = make_row(kind="q_proj.bias", d_in=None, trained_rank=None, energy_rank=None, amplification=None)
    assert "direction" not in describe([row], method="bitfit")


def test_overlaps_stand_beside_those_of_random_directions():
    overlaps = [Overlap("mean", n, n, 0.5 / n, 0.1 * n) for n in (1, 2, 4)] + [Overlap("q", 1, 1, 0.9, 0.1)]
    text = describe_overlaps("This run", "`x`", overlaps)
    assert "This run and `x`" in text
    assert "0.50 of the first direction (random: 0.10)" in text
    assert "0.12 of the first 4 directions" in text
