"""The order of training examples is a function of seed and step; cutting by length changes padding and nothing else."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.seeds import needs_usual_seeds

from lorasweep.data.batching import (
    EvaluationSampler,
    StepBatchSampler,
    choose_part,
    draw_order,
)


class LengthsOnly:
    """A split of which only lengths and weights matter."""

    name = "validation"

    def __init__(self, lengths, weights=None):
        self.lengths = self.padded_lengths = torch.tensor(lengths)
        self.weights = self.lengths.float() if weights is None else torch.tensor(weights)

    def __len__(self):
        return len(self.lengths)


def sample(num_examples=10, *, batch_size=4, num_steps=12, seed=0, **rest):
    return StepBatchSampler(
        LengthsOnly([7] * num_examples), batch_size=batch_size, num_steps=num_steps, seed=seed, **rest
    )


def indices(sampler):
    return [micro.indices for micro in sampler]


@settings(max_examples=30, deadline=None)
@given(
    num_examples=st.integers(1, 13),
    batch_size=st.integers(1, 30),
    num_steps=st.integers(0, 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_stream_is_one_permutation_after_another(num_examples, batch_size, num_steps, seed):
    batches = indices(sample(num_examples, batch_size=batch_size, num_steps=num_steps, seed=seed))
    assert [len(batch) for batch in batches] == [batch_size] * num_steps
    stream = list(itertools.chain.from_iterable(batches))
    for first in range(0, len(stream) - num_examples + 1, num_examples):
        assert sorted(stream[first : first + num_examples]) == list(range(num_examples))


@pytest.mark.parametrize("start_step", [0, 1, 5, 11, 12])
def test_resumed_run_gets_exactly_the_remaining_batches(start_step):
    resumed = sample(start_step=start_step)
    assert list(resumed) == list(sample())[start_step:]
    assert len(list(resumed)) == 12 - start_step
    assert len(resumed) == 12  # what Lightning counts on, see `StepBatchSampler.__len__`


@needs_usual_seeds
def test_order_is_the_stored_one():
    # A changed order would change every result that was ever recorded with the same seed.
    assert draw_order(8, seed=0, epoch=0) == [5, 1, 4, 2, 3, 7, 6, 0]


def test_a_step_has_the_examples_that_the_seed_drew_however_it_is_cut():
    split = LengthsOnly([3, 9, 1, 7, 5, 2, 8, 6])
    whole = StepBatchSampler(split, batch_size=4, num_steps=6, seed=1)
    for accumulate in (2, 4):
        cut = StepBatchSampler(split, batch_size=4, num_steps=6, seed=1, accumulate=accumulate)
        for step in range(6):
            drawn = [index for micro in cut.get_step(step) for index in micro.indices]
            assert sorted(drawn) == sorted(whole.get_step_indices(step))
            lengths = [[int(split.lengths[index]) for index in micro.indices] for micro in cut.get_step(step)]
            assert all(before[-1] <= after[0] for before, after in itertools.pairwise(lengths))  # little padding
            assert {m.step_weight for m in cut.get_step(step)} == {m.step_weight for m in whole.get_step(step)}


def test_an_evaluation_of_a_part_has_the_same_examples_whatever_its_batches():
    split = LengthsOnly([1 + n * 7 % 40 for n in range(800)])
    parts = [sorted(EvaluationSampler(split, batch_size=size, fraction=0.25).order) for size in (1, 8, 64)]
    assert parts == [choose_part(800, 0.25)] * 3
    assert len(parts[0]) == 200
    assert parts[0] != list(range(200))  # the first examples may all have one label
    assert len(choose_part(200, 0.01)) == 128
    assert choose_part(100, 0.01) == list(range(100))


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), batch_size=st.integers(1, 8))
def test_evaluation_has_every_example_once_within_the_budget(lengths, batch_size):
    sampler = EvaluationSampler(LengthsOnly(lengths), batch_size=batch_size)
    assert sorted(sampler.order) == list(range(len(lengths)))
    assert len(sampler) == len(list(sampler))
    for micro in sampler:
        assert len(micro.indices) * max(lengths[n] for n in micro.indices) <= batch_size * max(lengths)
