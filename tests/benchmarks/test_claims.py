"""The sweeps behind docs/claims.md are valid, and its results were made by the commands that stand beside them."""

from __future__ import annotations

import csv
import runpy
from pathlib import Path

import pytest

from lorasweep.sweep.definition.arms import read_definition

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "claims.py"))
SWEEPS = Path(__file__).parents[2] / "sweeps"
CLAIMS, WITH_DATA, RESULTS = (SCRIPT[name] for name in ("CLAIMS", "WITH_DATA", "RESULTS"))


@pytest.mark.parametrize("name", CLAIMS)
def test_the_sweep_of_a_claim_is_valid_and_has_a_frozen_base(name):
    sweep, *overrides = CLAIMS[name]
    assert read_definition(SWEEPS / f"{sweep}.yaml", overrides).arms[0].name == "frozen"


def test_each_result_has_the_command_of_today():
    rows = {row["name"]: row["command"] for row in csv.DictReader((RESULTS / "runs.csv").read_text().splitlines())}
    assert set(rows) == {path.name for path in RESULTS.iterdir() if path.is_dir()}
    for name, command in rows.items():
        today = " ".join(["lorasweep sweep", *(CLAIMS | WITH_DATA)[name]])
        assert command == today.replace("{data}", "DATA").replace("{minilm}", "MINILM")
