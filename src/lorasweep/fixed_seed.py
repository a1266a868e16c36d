"""Random numbers that are the same at each call and do not depend on a run's seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fixed_seed() -> Iterator[None]:
    """Seeds torch's CPU generator with 0 for a `with` block, and restores its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield
