"""The sweeps behind docs/claims.md are valid, and each of its tests can fail."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from lorasweep.sweep.definition.arms import read_definition

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "claims.py"))
SWEEPS = Path(__file__).parents[2] / "sweeps"
CLAIMS, STATEMENTS = SCRIPT["CLAIMS"], SCRIPT["STATEMENTS"]


@pytest.mark.parametrize("name", CLAIMS)
def test_the_sweep_of_a_claim_is_valid_and_has_a_frozen_base(name):
    sweep, *overrides = CLAIMS[name]
    assert read_definition(SWEEPS / f"{sweep}.yaml", overrides).arms[0].name == "frozen"


def make_rows(verdict, share):
    subjects = {
        *(f"lora-rank-{rank}" for rank in (1, 2, 8, 32, 160)),
        *(f"lora-alpha-{alpha}" for alpha in (1, 8, 16, 64)),
        *("attention", "rslora", "loraplus", "dora", "intrinsic-dim-1000"),
    }
    return [
        {
            "question": "as_good_as_full",
            "subject": name,
            "verdict": verdict,
            "value": str(share),
            "low": str(share - 0.01),
            "high": str(share + 0.01),
        }
        for name in sorted(subjects)
    ]


@pytest.mark.parametrize("claim", STATEMENTS, ids=lambda claim: claim.statement)
def test_each_claim_can_hold_or_fail(claim):
    worlds = [("equivalent", 1.0), ("worse", 0.5), ("better", 1.2), ("worse", 0.95)]
    outcomes = {
        claim.judge([make_rows(*first), make_rows(*second)][: len(claim.results)])
        for first in worlds
        for second in worlds
    }
    # equal rows for every subject can't show a difference between subjects
    assert False in outcomes or True in outcomes
    assert claim.judge([[] for _ in claim.results]) is None
