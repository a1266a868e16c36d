"""The side by side with TRL trains the same numbers, and the grid of the rate law finds the best u."""

import importlib.util
import math
import sys

import bench_preferences
import pytest
import rate_law

HAS_TRL = importlib.util.find_spec("trl") is not None


def read_cells(shown, method):
    """Returns the cells of the rows of a method, without its name."""
    lines = [line.strip("| ").split(" | ") for line in shown.splitlines() if line.startswith(f"| {method} |")]
    return [line[1:] for line in lines]


@pytest.mark.release
def test_our_way_is_measured_without_trl(monkeypatch, capsys):
    command = ["bench_preferences.py", "--quick", "--parts", "run", "--methods", "lora", "--ways", "ours"]
    monkeypatch.setattr(sys, "argv", command)
    bench_preferences.main()
    ((way, step_s, _, seconds, _, peak_mib, _),) = read_cells(capsys.readouterr().out, "lora")
    assert way == "ours"
    assert 0 < float(step_s) < float(seconds)
    assert int(peak_mib) > 100


@pytest.mark.release
@pytest.mark.skipif(not HAS_TRL, reason="needs TRL")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_losses_and_rewards_are_those_of_trl(method, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_preferences.py", "--quick", "--parts", "parity", "--methods", method])
    bench_preferences.main()
    ((steps, first, last, loss_error, reward_error),) = read_cells(capsys.readouterr().out, method)
    assert int(steps) == 3
    assert float(first) == pytest.approx(math.log(2), abs=1e-3)
    assert float(last) != float(first)
    assert float(loss_error) < 1e-5
    assert float(reward_error) < 1e-4


def test_the_best_u_is_the_vertex_of_a_parabola_and_an_end_is_marked():
    losses = {u: 0.6 + 0.01 * math.log(u / 2e-3) ** 2 for u in (1e-4, 1e-3, 1e-2, 1e-1)}
    assert rate_law.find_best_u(losses) == (pytest.approx(2e-3), "")
    assert rate_law.find_best_u({1e-3: 0.5, 1e-2: 0.6}) == (1e-3, "<")
    assert rate_law.find_best_u({1e-3: 0.7, 1e-2: 0.6}) == (1e-2, ">")
    assert rate_law.find_best_u({1e-4: 0.7, 1e-3: 0.6, 1e-2: math.inf}) == (1e-3, "")
