"""The report in the terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from lorasweep.report import render_terminal
from lorasweep.report.summary import summarize
from lorasweep.report.sweep_data import load_sweep_data
from lorasweep.report.terminal import describe_differences

from .conftest import build_rank_sweep, build_sweep, edit_json


def shown(renderable: RenderableType, *, width: int = 200) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_findings_are_shown_if_asked_for(sweep: Path) -> None:
    finding = summarize(sweep).sentences[0].split(".")[0]
    assert finding not in shown(render_terminal(sweep), width=1000)
    assert finding in shown(render_terminal(sweep, verbose=True), width=1000)


def test_markup_in_names_is_shown_not_obeyed(sweep: Path) -> None:
    edit_json(sweep / "sweep.json", lambda raw: raw.update(name="[red]bold[/red]"))
    assert "[red]bold[/red]" in shown(render_terminal(sweep))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": {"test": {"fingerprint": "b"}}}, "different test data"),
        ({"data": {"validation": {"fingerprint": "b"}}}, "different validation data"),
        ({"base": {"fingerprint": "b"}}, "different base models"),
        ({"data": {"test": {"fingerprint": "a"}}, "base": {"fingerprint": "a"}}, None),
    ],
)
def test_why_scores_of_two_sweeps_cannot_be_compared_is_said(
    tmp_path: Path, change: dict[str, object], sentence: str | None
) -> None:
    same = {"data": {"test": {"fingerprint": "a"}, "validation": {"fingerprint": "a"}}, "base": {"fingerprint": "a"}}
    sweeps = [build_sweep(tmp_path / name, lora=2) for name in ("one", "two")]
    for sweep, values in zip(sweeps, (same, change), strict=True):
        for path in sweep.glob("runs/*/run.json"):
            edit_json(path, lambda raw, values=values: raw.update(values))
    said = [text for text in describe_differences([load_sweep_data(s) for s in sweeps]) if "different" in text]
    assert len(said) == (1 if sentence else 0)
    assert sentence is None or sentence in said[0]


def test_a_value_without_a_complete_trial_shows_its_best_so_far(tmp_path: Path) -> None:
    sweep = build_rank_sweep(tmp_path, {1: 1.8, 16: 1.662})

    def pause(raw: dict[str, Any]) -> None:
        raw.update(settings=[], confirm=[])
        for trial in raw["trials"]:
            trial["state"] = "paused" if trial["params"].get("method.rank") == 1 else trial["state"]

    edit_json(sweep / "sweep.json", pause)
    assert re.search(r"1\.80+ \(paused\)", shown(render_terminal(sweep)))
