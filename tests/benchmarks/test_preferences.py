"""Our way beside TRL's is measured, and the grid of the rate law finds the best u."""

import math
import sys

import bench_preferences
import pytest
import rate_law


@pytest.mark.release
def test_our_way_is_measured_without_trl(monkeypatch, capsys):
    command = ["bench_preferences.py", "--quick", "--parts", "run", "--methods", "lora", "--ways", "ours"]
    monkeypatch.setattr(sys, "argv", command)
    bench_preferences.main()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| lora |")]
    _, way, step_s, _, seconds, _, peak_mib, _ = line.strip("| ").split(" | ")
    assert way == "ours"
    assert 0 < float(step_s) < float(seconds)
    assert int(peak_mib) > 100


def test_the_best_u_is_the_vertex_of_a_parabola_and_an_end_is_marked():
    losses = {u: 0.6 + 0.01 * math.log(u / 2e-3) ** 2 for u in (1e-4, 1e-3, 1e-2, 1e-1)}
    assert rate_law.find_best_u(losses) == (pytest.approx(2e-3), "")
    assert rate_law.find_best_u({1e-3: 0.5, 1e-2: 0.6}) == (1e-3, "<")
    assert rate_law.find_best_u({1e-3: 0.7, 1e-2: 0.6}) == (1e-2, ">")
    assert rate_law.find_best_u({1e-4: 0.7, 1e-3: 0.6, 1e-2: math.inf}) == (1e-3, "")
