"""Other random numbers for all tests, because a test that holds for one seed only is not a test."""

import os

import pytest
import torch

UNSHIFTED = os.environ.get("LORASWEEP_TEST_SEED", "0") == "0"
needs_usual_seeds = pytest.mark.skipif(not UNSHIFTED, reason="it knows the values of a seed, or starts a process")
"""Marks a test that can't hold with shifted seeds, which other processes do not have."""


def shift_seeds(offset):
    """Adds a number to each seed of torch that a test or the tested code sets from now on, in this process.

    `make test LORASWEEP_TEST_SEED=3` does so. Equal seeds stay equal.
    """
    if not offset:
        return
    set_global_seed = torch.manual_seed

    class Generator(torch.Generator):
        def manual_seed(self, seed):
            super().manual_seed(int(seed) + offset)
            return self

    torch.Generator = Generator
    torch.manual_seed = torch.random.manual_seed = lambda seed: set_global_seed(int(seed) + offset)
