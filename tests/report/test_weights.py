"""What the report reads of inspections, draws of them, and says where they are missing, stale or damaged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lorasweep.report.figures.weights import draw_weights, read_arm
from lorasweep.report.sweep_data import load_sweep_data

from .conftest import edit_json, inspect_winners


@pytest.fixture
def inspected(sweep: Path) -> Path:
    """Returns the folder of a sweep whose winners were inspected."""
    inspect_winners(sweep)
    return sweep


def winner(sweep: Path, arm: str) -> Path:
    best = next(one.best for one in load_sweep_data(sweep).arms if one.name == arm)
    assert best
    return sweep / best.run / "inspect"


def test_a_sweep_that_was_not_inspected_says_how(sweep: Path) -> None:
    panel = draw_weights(load_sweep_data(sweep))
    assert panel.figures == ()
    assert panel.text == f"The winners' weights were not inspected. Type `lorasweep inspect {sweep}`."


def test_a_winner_is_read_with_its_numbers(inspected: Path) -> None:
    lora = read_arm("lora", winner(inspected, "lora"))
    assert (lora.enough_rank, lora.sentences) == (4, ("At 4.",))
    # relative to each layer's first
    assert lora.spectrum == {1: 1, 2: 0.5, 3: 0.25, 4: 0.125}
    # the bias counts in neither
    assert lora.share_by_kind == pytest.approx({"q": 0.3, "up": 0.6})
    assert lora.share_by_block == pytest.approx({0: 0.4, 1: 0.5})
    assert [*lora.truncation] == [0, 2, 4]


def test_figures_show_spectra_ranks_places_and_subspaces(inspected: Path) -> None:
    panel = draw_weights(load_sweep_data(inspected))
    spectra, truncation, kinds, blocks, similarity = panel.figures
    assert [trace.name for trace in spectra.data] == ["lora", "full"]
    lines = {trace.name: list(trace.x) for trace in truncation.data if trace.name}
    assert lines == {"lora": ["0", "2", "4"], "full": ["0", "2", "16"]}
    assert list(truncation.layout.xaxis.categoryarray) == ["0", "2", "4", "16"]
    assert [list(trace.x) for trace in truncation.data if trace.mode == "markers"] == [["4"], ["16"]]
    assert dict(zip(kinds.data[0].y, kinds.data[0].x, strict=True)) == pytest.approx({"q": 0.3, "up": 0.6})
    assert list(blocks.data[0].y) == pytest.approx([0.4, 0.5])
    assert list(map(list, similarity.data[0].z)) == [[0.5], [0.25]]
    lora, full, together = panel.notes
    assert re.fullmatch(r"lora: At 4\. Numbers in `runs/lora-\d+/inspect/`\.", lora)
    assert full.startswith("full: At 16.")
    assert together == "`lora` and `full` share."


def test_an_inspection_without_scores_has_no_figure_of_them(inspected: Path) -> None:
    for arm in ("lora", "full"):
        (winner(inspected, arm) / "truncation.csv").unlink()
        edit_json(winner(inspected, arm) / "summary.json", lambda raw: raw.update(enough_rank=None))
    assert len(draw_weights(load_sweep_data(inspected)).figures) == 4


def test_an_inspection_of_a_trial_that_is_no_winner_any_more_is_left_out(inspected: Path) -> None:
    def improve(raw: dict[str, Any]) -> None:
        other = [t for t in raw["trials"] if t["arm"] == "lora" and t["state"] == "complete"]
        max(other, key=lambda trial: float(trial["value"]))["value"] = 0.5

    edit_json(inspected / "sweep.json", improve)
    panel = draw_weights(load_sweep_data(inspected))
    assert [trace.name for trace in panel.figures[0].data] == ["full"]
    assert len(panel.figures) == 4  # without similarity
    assert "another winner" in panel.notes[-1]


@pytest.mark.parametrize(("name", "content"), [("summary.json", "{"), ("layers.csv", None), ("spectra.json", "{}")])
def test_a_damaged_inspection_is_a_sentence(inspected: Path, name: str, content: str | None) -> None:
    path = winner(inspected, "full") / name
    path.unlink() if content is None else path.write_text(content)
    panel = draw_weights(load_sweep_data(inspected))
    assert [trace.name for trace in panel.figures[0].data] == ["lora"]
    assert "can't be read" in panel.notes[-1]


@pytest.mark.parametrize("name", ["summary.json", "similarity.csv"])
def test_a_damaged_comparison_of_winners_is_a_sentence(inspected: Path, name: str) -> None:
    (inspected / "inspect" / name).write_text("x\n1\n")
    panel = draw_weights(load_sweep_data(inspected))
    assert len(panel.figures[0].data) == 2
    assert "can't be read" in panel.notes[-1]
