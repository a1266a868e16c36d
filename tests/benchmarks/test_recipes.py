"""TRL and lorasweep train the same file to the same losses, with the same layers and factors of LoRA."""

import importlib.util
import sys

import bench_recipes
import pytest


@pytest.mark.release
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL")
@pytest.mark.parametrize("file", bench_recipes.FILES)
def test_trl_trains_the_same_file_to_the_same_losses(file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_recipes.py", "--files", file])
    bench_recipes.main()
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {file} |")]
    _, steps, first, last, error, layers, params = row.strip("| ").split(" | ")
    assert int(steps) == bench_recipes.NUM_STEPS
    assert float(first) != float(last)
    assert float(error) < 1e-4
    assert (layers.split()[0], params.split()[0]) == ("equal", "equal")
