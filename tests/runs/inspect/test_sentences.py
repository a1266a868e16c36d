"""Sentences say what the numbers are."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch

from lorasweep.runs.inspect.measure import LayerRow
from lorasweep.runs.inspect.sentences import describe_comparison, describe_run
from lorasweep.runs.inspect.subspaces import Similarity
from lorasweep.runs.inspect.truncation import TruncatedScore, Truncation

RUN = SimpleNamespace(method="lora", record=SimpleNamespace(metric="bits_per_byte"))


def make_row(**values):
    row = LayerRow(
        layer="layers.0.q_proj",
        block=0,
        kind="q_proj",
        d_out=8,
        d_in=8,
        trained_rank=8,
        change_norm=0.3,
        base_norm=4.0,
        relative_norm=0.075,
        norm_share=0.2,
        effective_rank=5.24,
        stable_rank=2.0,
        energy_rank=4,
        base_in_change=0.1,
        base_in_own=2.0,
        base_in_random=0.05,
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


def test_size_rank_place_and_amplification_are_said():
    assert describe() == (
        "`lora` at rank 8 changed 2 weights of the base by 10 % of their norm.",
        "Its effective rank is 5.2 and its stable rank 2.0; 90 % of the squared norm lies in 4 directions "
        "(medians over layers).",
        "Of the squared norm `up_proj` carries the most (80 %) and `q_proj` the least (20 %); "
        "block 1 of 0 to 1 carries 80 %.",
        "In its own directions the change is 3.00 times the base; there the base is 2.0 times what it is in random "
        "directions and 5 % of what it is in its own largest (medians over layers).",
    )


def test_the_rank_that_would_do_and_what_half_of_it_loses_are_said():
    scores = {0: 2.0, 1: 1.6, 2: 1.4, 4: 1.2, 6: 1.004, 8: 1.0}
    assert (
        "Trained at rank 8, 6 would do: cut to that it keeps 99% of its gain; 2 loses 0.400 bits per byte."
        in describe(make_truncation(scores))
    )
    unlimited = [make_row(trained_rank=None)]
    assert "Trained by `lora`, 6 would do" in " ".join(describe(make_truncation(scores), rows=unlimited))
    full = SimpleNamespace(**{**vars(RUN), "method": "full"})
    found = describe_run(full, unlimited, make_truncation(scores), note=None)
    assert "Trained in full, 6 would do" in " ".join(found)


def test_a_change_that_needs_all_its_rank_says_so():
    sentences = describe(make_truncation({0: 2.0, 1: 1.9, 2: 1.0}), rows=[make_row(trained_rank=2)])
    assert "Trained at rank 2, it needs all of it to keep 99% of its gain; 1 loses 0.900 bits per byte." in sentences


def test_a_change_that_needs_its_trained_rank_says_so_though_its_weights_have_more():
    scores = {0: 2.0, 1: 1.9, 2: 1.001, 16: 1.0}
    sentences = describe(make_truncation(scores), rows=[make_row(trained_rank=2)])  # as DoRA
    assert "Trained at rank 2, it needs all of it to keep 99% of its gain; 1 loses 0.900 bits per byte." in sentences


def test_a_change_that_gains_nothing_says_so():
    assert (
        "The whole change scores 1.500 bits per byte and none of it 1.000: "
        "it gains nothing that a smaller rank could keep." in describe(make_truncation({0: 1.0, 1: 1.5}))
    )


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


def test_a_comparison_names_each_side_and_what_random_directions_share():
    found = Similarity(rows=(1, 2), columns=(1, 2), values=torch.tensor([[0.5, 0.6], [0.7, 0.25]]), dimension=10)
    values = {("q", "a"): found, ("q", "output"): found}
    assert describe_comparison("This run", "`x`", values) == (
        "This run and `x` share of their directions (φ, mean over layers) "
        "of the first 1 of A 0.50 (random ones: 0.10); "
        "of the first 1 that they write 0.50 (random ones: 0.10)."
    )
