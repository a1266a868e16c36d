"""The order of training blocks: a function of seed and step, covering every example once per pass."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasweep.data.batching import StepBatchSampler, draw_order


def sample(num_examples=10, *, batch_size=4, num_steps=12, seed=0, **rest):
    return StepBatchSampler(num_examples, batch_size=batch_size, num_steps=num_steps, seed=seed, **rest)


@settings(max_examples=30, deadline=None)
@given(
    num_examples=st.integers(1, 13),
    batch_size=st.integers(1, 30),
    num_steps=st.integers(0, 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_stream_is_one_permutation_after_another(num_examples, batch_size, num_steps, seed):
    batches = list(sample(num_examples, batch_size=batch_size, num_steps=num_steps, seed=seed))
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


def test_passes_and_seeds_have_different_orders():
    orders = [draw_order(50, seed=seed, number=number) for seed in range(3) for number in range(3)]
    assert len(set(map(tuple, orders))) == 9


def test_order_is_the_stored_one():
    # A changed order would change every result that was ever recorded with the same seed.
    assert draw_order(8, seed=0, number=0) == [5, 1, 4, 2, 3, 7, 6, 0]


def test_micro_batches_together_are_the_step_batch():
    micro = list(sample(accumulate=2))
    assert [first + second for first, second in zip(micro[::2], micro[1::2], strict=True)] == list(sample())
    assert {len(batch) for batch in micro} == {2}
    assert len(sample(accumulate=2)) == len(micro) == 24


def test_batches_do_not_depend_on_what_was_asked_before():
    sampler = sample()
    backwards = [sampler.indices_of_step(step) for step in reversed(range(12))]
    assert backwards[::-1] == list(sampler)


def test_shared_random_stream_is_left_alone():
    before = torch.get_rng_state()
    list(sample())
    assert torch.equal(torch.get_rng_state(), before)
