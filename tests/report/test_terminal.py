"""The report in the terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from lorasweep.report import render_terminal
from lorasweep.report.summary import summarize

from .conftest import build_rank_sweep, edit_json


def shown(renderable: RenderableType, *, width: int = 200) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_findings_are_shown_if_asked_for(sweep: Path) -> None:
    finding = summarize(sweep).sentences[0].split(".")[0]
    assert finding not in shown(render_terminal(sweep), width=1000)
    assert finding in shown(render_terminal(sweep, verbose=True), width=1000)


def test_a_value_without_a_complete_trial_shows_its_best_so_far(tmp_path: Path) -> None:
    sweep = build_rank_sweep(tmp_path, {1: 1.8, 16: 1.662})

    def pause(raw: dict[str, Any]) -> None:
        raw.update(settings=[], confirm=[])
        for trial in raw["trials"]:
            trial["state"] = "paused" if trial["params"].get("method.rank") == 1 else trial["state"]

    edit_json(sweep / "sweep.json", pause)
    assert re.search(r"1\.80+ \(paused\)", shown(render_terminal(sweep)))
