"""The order of training examples is a function of seed and step; cutting by length changes padding and nothing else."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.seeds import needs_usual_seeds

from lorasweep.data.batching import (
    EvaluationSampler,
    LengthBuckets,
    StepBatchSampler,
    choose_part,
    draw_order,
)


class LengthsOnly:
    """A split of which only lengths and weights matter."""

    name = "validation"

    def __init__(self, lengths, weights=None):
        self.lengths = self.padded_lengths = self.row_lengths = torch.tensor(lengths)
        self.weights = self.lengths.float() if weights is None else torch.tensor(weights)

    def __len__(self):
        return len(self.lengths)


def sample(num_examples=10, *, batch_size=4, num_steps=12, seed=0, **rest):
    return make_sampler([7] * num_examples, batch_size=batch_size, num_steps=num_steps, seed=seed, **rest)


def make_sampler(lengths, **settings):
    return StepBatchSampler(LengthsOnly(lengths), group_by_length=True, **settings)


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
    assert draw_order(8, seed=0, epoch=0).tolist() == [5, 1, 4, 2, 3, 7, 6, 0]


def test_a_step_has_the_examples_that_the_seed_drew_however_it_is_cut():
    lengths = [3, 9, 1, 7, 5, 2, 8, 6]
    whole = make_sampler(lengths, batch_size=4, num_steps=6, seed=1)
    for accumulate in (2, 4):
        cut = make_sampler(lengths, batch_size=4, num_steps=6, seed=1, accumulate=accumulate)
        for step in range(6):
            drawn = [index for micro in cut.get_step(step) for index in micro.indices]
            assert sorted(drawn) == sorted(whole.get_step_indices(step))
            assert {m.step_weight for m in cut.get_step(step)} == {m.step_weight for m in whole.get_step(step)}


LENGTHS = [3 + n * 37 % 61 for n in range(997)]


def make_buckets(lengths=LENGTHS, *, batch_size=8, group_by_length=True):
    return LengthBuckets(torch.tensor(lengths), batch_size=batch_size, group_by_length=group_by_length)


def test_buckets_have_every_example_once_and_the_length_of_their_longest_row():
    buckets = make_buckets()
    assert len(buckets) > 4
    assert sorted(itertools.chain.from_iterable(members.tolist() for members in buckets.members)) == list(
        range(len(LENGTHS))
    )
    longest = [max(LENGTHS[index] for index in members.tolist()) for members in buckets.members]
    for length, bound in zip(longest, buckets.lengths, strict=True):
        assert length <= bound < length + 8
        assert bound % 8 == 0 or bound == max(LENGTHS)
    assert all(len(members) % 8 == 0 for members in buckets.members[:-1])  # the longest take what is left
    padded = sum(len(members) * bound for members, bound in zip(buckets.members, buckets.lengths, strict=True))
    assert padded < 1.25 * sum(LENGTHS)  # of the 8 positions that rounding adds at most, half are added in the mean


@pytest.mark.parametrize(
    ("lengths", "group"), [([7] * 997, True), (LENGTHS[:60], True), (LENGTHS, False)], ids=["equal", "few", "off"]
)
def test_rows_of_one_length_and_small_data_keep_their_order(lengths, group):
    buckets = make_buckets(lengths, group_by_length=group)
    assert [members.tolist() for members in buckets.members] == [list(range(len(lengths)))]
    assert buckets.lengths == [max(lengths)]
    assert buckets.choose(123) == (0, 123)


def test_an_epoch_of_steps_uses_each_example_once_whatever_the_seed():
    for seed in (0, 1):
        sampler = make_sampler(LENGTHS, batch_size=8, num_steps=1000, seed=seed)
        stream = [sampler.get_step_indices(step) for step in range(1000)]
        for epoch in range(8):
            first, end = (number * len(LENGTHS) // 8 for number in (epoch, epoch + 1))
            drawn = Counter(itertools.chain.from_iterable(stream[first:end]))
            # a batch that ends an epoch of the longest rows begins the next one
            assert all(count <= 2 for count in drawn.values())
            assert sum(count - 1 for count in drawn.values()) < 8
            assert len(LENGTHS) - len(drawn) < 8


def test_the_seed_chooses_the_rows_of_a_step_and_not_its_length():
    first, other = (make_sampler(LENGTHS, batch_size=8, num_steps=300, seed=seed) for seed in (0, 1))
    steps = [(first.get_step(step), other.get_step(step)) for step in range(300)]
    assert all(one[0].length == two[0].length for one, two in steps)
    assert sum(one[0].indices == two[0].indices for one, two in steps) < 3
    lengths = [one[0].length for one, _ in steps]
    rounds = [lengths[n : n + len(first.buckets)] for n in range(0, 120, len(first.buckets))]
    assert len({tuple(each) for each in rounds}) > 1  # the order changes
    assert all(max(each) == max(LENGTHS) for each in rounds[:-1])  # long batches are spread evenly


def test_micro_batches_of_a_step_have_one_length():
    sampler = make_sampler(LENGTHS, batch_size=8, num_steps=40, seed=0, accumulate=3)
    for step in range(40):
        micros = sampler.get_step(step)
        assert [len(micro.indices) for micro in micros] == [3, 3, 2]
        [bound] = {micro.length for micro in micros}
        assert all(LENGTHS[index] <= bound for micro in micros for index in micro.indices)


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
