"""The side by side with TRL trains the same numbers, and the grid of the rate law finds the best u."""

import csv
import importlib.util
import json
import math
import sys

import bench_preferences
import pytest
import rate_law
import trl_dpo

HAS_TRL = importlib.util.find_spec("trl") is not None


def test_without_trl_one_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match=r"pip install trl"):
        trl_dpo.import_trl()


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


def test_a_grid_continues_its_table(tmp_path, monkeypatch, capsys):
    for number, split in enumerate(("train", "validation", "test")):
        rows = [{**row, "prompt": f"{number} {row['prompt']}"} for row in bench_preferences.make_pairs(6)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"data.{split}={tmp_path / split}.jsonl" for split in ("train", "validation", "test")]
    settings = ["data=preferences", "data.template=plain", *data, "trainer.max_steps=2", "trainer.batch_size=2"]
    table = tmp_path / "grid.csv"

    def run(*values):
        command = ["rate_law.py", "--ranks", "1", "4", "--alphas", "4", "--betas", "0.1", "0.5", "--u", *values]
        monkeypatch.setattr(sys, "argv", [*command, "--threads", "1", "--table", str(table), *settings])
        rate_law.main()
        with table.open(newline="") as file:
            return list(csv.DictReader(file))

    first, shown = run("1e-3"), capsys.readouterr().out
    assert len(first) == 4
    assert {float(row["lr"]) for row in first} == {5e-4}
    assert shown.count("Point(") == 4
    again = run("1e-3", "1e-2")
    assert len(again) == 8
    assert all(row in again for row in first)
    assert capsys.readouterr().out.count("Point(") == 4
