"""The page of several sweeps: one table, every sweep's section, links that lead somewhere."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import unquote

import pytest

from lorasweep.errors import RecordError
from lorasweep.report import COMPARE_FILE, write_comparison, write_report

from .conftest import build_sweep, confirm_sweep, edit_json
from .test_page import HOSTILE, Page


def compared(*sweeps: Path) -> Page:
    for sweep in sweeps:
        write_report(sweep)
    path = sweeps[0] / "report" / COMPARE_FILE
    write_comparison(sweeps, path)
    return Page(path.read_text())


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Returns two sweeps, the first confirmed, in folders whose names need quoting."""
    second = build_sweep(tmp_path / "b ü" / "s", name="other", full=0)
    return [confirm_sweep(build_sweep(tmp_path / "a" / "s", name="one")), second]


def test_page_has_one_table_and_a_section_per_sweep(pair: list[Path]) -> None:
    page = compared(*pair)
    assert [name for name in page.ids if name.startswith(("together", "scores", "sweep"))] == [
        *("together", "scores-0", "sweep-1", "sweep-2")
    ]
    assert "means over 5 fresh seeds" in page.text
    assert "without full fine-tuning" in page.text
    assert len(page.figures) == 2
    # a colour per sweep, and intervals where there are any
    assert [trace["name"] for trace in page.figures[0]["data"]] == ["one", "other"]


def test_links_lead_to_runs_and_reports_of_both_sweeps(pair: list[Path]) -> None:
    page = compared(*pair)
    here = pair[0] / "report"
    links = [link for link in page.links if not link.startswith("#")]
    assert len({link for link in links if link.endswith("index.html")}) == 2
    assert any("runs" in link for link in links)
    assert all((here / unquote(link)).exists() for link in links)
    points = [link for figure in page.figures for trace in figure["data"] for link in trace["customdata"]]
    assert all((here / unquote(link)).is_dir() for link in points)


def test_sweeps_with_different_metrics_have_a_figure_each_and_a_sentence(pair: list[Path]) -> None:
    edit_json(pair[1] / "sweep.json", lambda raw: raw.update(metric="loss"))
    for path in pair[1].glob("runs/*/run.json"):
        edit_json(path, lambda raw: raw.update(metric="loss"))
    page = compared(*pair)
    assert "different metrics (bits per byte, loss): scores can't be compared" in page.text
    assert [name for name in page.ids if name.startswith("scores")] == ["scores-0", "scores-1"]


def test_sweeps_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    sweeps = [build_sweep(tmp_path / name, lora=2) for name in ("x", "y")]
    page = compared(*sweeps)
    assert f"quickstart ({sweeps[1]})" in page.text


def test_sweep_in_which_nothing_ended_well_still_has_its_section(pair: list[Path]) -> None:
    edit_json(pair[1] / "sweep.json", lambda raw: [trial.update(state="failed") for trial in raw["trials"]])
    page = compared(*pair)
    assert "No trial is complete, so there is no score to compare." in page.text
    assert "no complete trial" in page.text


def test_hostile_names_are_text(pair: list[Path]) -> None:
    edit_json(pair[1] / "sweep.json", lambda raw: raw.update(name=HOSTILE, description=HOSTILE))
    page = compared(*pair)
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert HOSTILE in page.text
    assert "<img" not in json.dumps(page.figures)


def test_page_fetches_nothing(pair: list[Path]) -> None:
    assert not [found for _, found in compared(*pair).tags if "src" in found]


def test_folder_that_is_no_sweep_is_refused_before_anything_is_written(pair: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"must contain sweep\.json"):
        write_comparison([pair[0], tmp_path], tmp_path / "compare.html")
    assert not (tmp_path / "compare.html").exists()


def test_scores_shown_begin_near_the_lowest(pair: list[Path]) -> None:
    low, high = compared(*pair).figures[0]["layout"]["xaxis"]["range"]
    assert 1.3 < low < high < 2.1
