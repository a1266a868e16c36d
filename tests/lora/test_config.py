from __future__ import annotations

import dataclasses

import pytest

from lorasweep.errors import ConfigError
from lorasweep.lora import LoraConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "`method.rank >= 1` must hold, but got 0. Use `method=frozen`"),
        ({"rank": -1}, "`method.rank >= 1` must hold, but got -1"),
        ({"rank": 2.5}, "`method.rank >= 1` must hold, but got 2.5"),
        ({"rank": True}, "`method.rank >= 1` must hold, but got True"),
        ({"rank_pattern": {"q": 0}}, "`method.rank >= 1` must hold, but got 0"),
        ({"alpha": float("nan")}, "`method.alpha` must be a finite number >= 0, but got nan"),
        ({"alpha": -1.0}, "but got -1.0"),
        ({"alpha_pattern": {"q": float("inf")}}, "but got inf"),
        ({"dropout": 1.0}, "`0 <= method.dropout < 1` must hold, but got 1.0"),
        ({"targets": ()}, "`method.targets` must name at least one layer"),
        ({"targets": ""}, "`method.targets` must name at least one layer"),
        ({"scaling": "alpha"}, "`method.scaling` must be one of .*'alpha_over_rank'.*, but got 'alpha'"),
        ({"init": "pisa"}, "`method.init` must be one of .*'pissa'"),
        ({"variant": "adora"}, "`method.variant` must be one of"),
        ({"bias": "some"}, "`method.bias` must be one of"),
        ({"layers": (-1,)}, "`method.layers` must be indices >= 0, but got -1"),
        ({"layers": ("1",)}, "`method.layers` must be indices >= 0, but got '1'"),
        ({"init": "orthogonal", "rank": 3}, "`method.rank` must be even with `method.init=orthogonal`, but got 3"),
        ({"init": "pissa", "alpha": 0.0}, "`method.alpha > 0` must hold with `method.init=pissa`"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**changes)


def test_can_be_a_key() -> None:
    assert len({LoraConfig(rank_pattern={"q": 2}), LoraConfig(rank_pattern={"q": 2}), LoraConfig()}) == 2


def test_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoraConfig().rank = 4
