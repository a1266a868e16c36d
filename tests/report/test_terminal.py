"""The report in the terminal."""

import io

import pytest
from rich.console import Console
from tests.files import edit_json

from lorasweep.errors import ConfigError
from lorasweep.report import render_terminal
from lorasweep.report.summary import summarize
from lorasweep.report.terminal import render_spread

from .conftest import build_rank_sweep


def shown(renderable, *, width=200):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_findings_are_shown_if_asked_for(sweep):
    finding = summarize(sweep).sentences[0].split(".")[0]
    assert finding not in shown(render_terminal(sweep), width=1000)
    assert finding in shown(render_terminal(sweep, verbose=True), width=1000)


def test_several_sweeps_have_a_row_per_subject_with_the_spread_of_their_scores(tmp_path):
    sweeps = [build_rank_sweep(tmp_path / name, {4: score, 16: 1.7}) for name, score in (("one", 1.75), ("two", 1.78))]
    text = shown(render_spread(sweeps))
    values = []
    for sweep in sweeps:
        values.append(summarize(sweep).data.evidence.shares["lora-rank-4"][0])
    mean, half = sum(values) / 2, abs(values[0] - values[1]) / 2**0.5
    row = next(line for line in text.splitlines() if line.strip().startswith("lora-rank-4"))
    assert row.split()[1:] == [*(f"{value:.3f}" for value in values), f"{mean:.3f}", "±", f"{half:.3f}"]
    edit_json(sweeps[1] / "sweep.json", lambda raw: raw.update(metric="loss"))
    with pytest.raises(ConfigError, match="must have the same metric"):
        render_spread(sweeps)
