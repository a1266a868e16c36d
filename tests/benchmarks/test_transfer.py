"""The fits behind docs/transfer.md, and that the powers which lorasweep uses are those of the recordings."""

import runpy
import sys
from pathlib import Path

import pytest

from lorasweep.sweep.controller.encoding import BATCH_KEY, POWERS

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(FOLDER))  # for curves.record
    yield runpy.run_path(str(FOLDER / "transfer.py"))
    sys.path.remove(str(FOLDER))


def test_the_best_rate_is_the_lowest_point_of_a_parabola_and_none_at_an_end(script):
    rates = [1e-3 * 2**n for n in range(5)]
    costs = [(n - 2.25) ** 2 for n in range(5)]
    assert script["find_best_rate"](rates, costs) == pytest.approx(1e-3 * 2**2.25)
    assert script["find_best_rate"](rates, range(5)) is None


def test_powers_are_found_whatever_the_offset_of_task_and_seed(script):
    found = [
        script["Best"](
            condition=f"{name}{steps}", seed=seed, steps=steps, batch=8, rate=(1 + seed) * level * steps**-0.5
        )
        for name, level in (("steps", 0.1), ("code", 0.01))
        for steps in (40, 160, 640)
        for seed in (0, 1)
    ]
    power, low, high = script["fit_powers"](found, ("steps",))["steps"]
    assert (power, low, high) == pytest.approx((-0.5, -0.5, -0.5))
    assert script["fit_powers"](found, ("steps", "batch")) == {}  # all have the same batch size


def test_the_powers_of_lorasweep_are_those_of_the_records(script):
    found = script["read_best_rates"]()
    of_text = [best for best in found if best.task == "far"]
    assert script["fit_powers"](of_text, ("steps", "batch"))["batch"][0] == pytest.approx(
        POWERS[BATCH_KEY].value, abs=0.01
    )
    of_all = [best for best in found if best.task in ("far", "near", "sentences")]
    fitted = script["fit_powers"](of_all, ("steps", "batch"))["steps"]
    assert fitted == pytest.approx((POWERS["trainer.max_steps"].value, -0.44, 0.04), abs=0.01)
