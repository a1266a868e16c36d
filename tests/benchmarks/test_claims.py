"""The sweeps behind docs/claims.md are valid, and each of its tests can fail."""

import random

import pytest
from claims import CLAIMS, SWEEPS

from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.sweep_file import find_sweep_file


@pytest.mark.parametrize("name", SWEEPS)
def test_the_sweep_of_a_claim_is_valid_and_has_a_frozen_base(name):
    sweep, *overrides = SWEEPS[name]
    assert read_definition(find_sweep_file(sweep), overrides).arms[0].name == "frozen"


SUBJECTS = [
    "full",
    *(f"lora-rank-{rank}" for rank in (1, 2, 4, 8, 16, 32, 64, 160)),
    *(f"lora-alpha-{alpha}" for alpha in (1, 8, 16, 64)),
    *("attention", "rslora", "loraplus", "dora", "intrinsic-dim-1000"),
]


def draw_rows(drawn):
    rows = []
    for name in SUBJECTS:
        share = drawn.uniform(0.7, 1.1)
        verdict = drawn.choice(["equivalent", "not worse", "better", "worse", "open"])
        interval = {"low": str(share - 0.01), "high": str(share + 0.01)}
        rows += [
            {"question": question, "subject": name, "verdict": verdict, "value": str(share)} | interval
            for question in ("as_good_as_full", "forgotten_of_code")
        ]
        enough = drawn.choice(["sufficient", "insufficient", "open"])
        rows.append({"question": "smallest_rank", "subject": name, "verdict": enough, "value": str(share)} | interval)
    return rows


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.statement)
def test_each_claim_can_hold_and_can_fail(claim):
    drawn = random.Random(0)
    outcomes = {claim.judge([draw_rows(drawn) for _ in claim.results]) for _ in range(2000)}
    assert {True, False} <= outcomes
    assert claim.judge([[] for _ in claim.results]) is None
