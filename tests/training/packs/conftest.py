"""Packs of runs on a small random Llama, which trains faster than the embedded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import SHORT_RUN

from lorasweep.config.compose import compose_run
from lorasweep.config.run import RunConfig
from lorasweep.training.inputs import RunInputs, build_inputs


@pytest.fixture(scope="session")
def make_config(quantisable_model: Path) -> Callable[..., RunConfig]:
    def make(settings=None):
        given = settings or {}
        small = {} if "model" in given else {"model": "causal_lm", "model.path": str(quantisable_model)}
        return compose_run({**SHORT_RUN, **small, **given})

    return make


@pytest.fixture(scope="session")
def inputs(make_config: Callable[..., RunConfig]) -> RunInputs:
    return build_inputs(make_config())
