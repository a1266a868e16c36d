"""How a step is cut follows from the rows' lengths and the number of slots, once for the whole of a run."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
import torch

from lorasweep.training.inputs import resolve_accumulate


@dataclass(frozen=True, eq=False)
class Rows:
    lengths: torch.Tensor

    @property
    def weights(self) -> torch.Tensor:
        return torch.ones(len(self.lengths))

    def __len__(self) -> int:
        return len(self.lengths)


LENGTHS = torch.arange(1, 65).repeat(4)


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_the_same_lengths_and_slots_are_cut_alike_whatever_the_clocks_say(make_config, monkeypatch, slots):
    config = make_config({"trainer.batch_size": 16}).trainer
    state = torch.get_rng_state()
    first = resolve_accumulate(config, Rows(LENGTHS), slots=slots)
    for clock in ("perf_counter", "monotonic", "process_time"):
        monkeypatch.setattr(time, clock, lambda: -1.0)
    assert resolve_accumulate(config, Rows(LENGTHS.clone()), slots=slots) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_more_slots_are_cut_more_often(make_config):
    config = make_config({"trainer.batch_size": 16}).trainer
    cuts = [resolve_accumulate(config, Rows(LENGTHS), slots=slots) for slots in (1, 2, 4, 8)]
    assert cuts == sorted(cuts)
    assert cuts[0] < cuts[-1]
