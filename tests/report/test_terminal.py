"""The report in the terminal."""

import io

import pytest
from rich.console import Console
from tests.files import edit_json

from lorasweep.errors import ConfigError
from lorasweep.record import read_run, read_sweep, write_record
from lorasweep.report.findings import read_findings
from lorasweep.report.sweep_data import load_sweep_data
from lorasweep.report.terminal import render_spread, render_terminal

from .conftest import build_rank_sweep


def shown(renderable, *, width=200):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_findings_are_shown_if_asked_for(sweep):
    findings = read_findings(sweep)
    assert findings.notes[0] not in shown(render_terminal(findings), width=1000)
    assert findings.notes[0] in shown(render_terminal(findings, verbose=True), width=1000)


@pytest.mark.parametrize(("cut_off", "is_shown"), [(3, True), (1, False), (0, False)])
def test_many_answers_that_were_cut_off_are_said_beside_the_scores(confirmed, cut_off, is_shown):
    run = next(run for run in read_sweep(confirmed).confirm if run.arm == "lora")
    record = read_run(confirmed / run.run)
    record.answers = {"test": {"examples": 10, "cut_off": cut_off, "left_out": 0}}
    write_record(record, confirmed / run.run)
    findings = read_findings(confirmed)
    sentence = f"{cut_off} of 10 generated answers were cut off at `data.answers.max_new_tokens`"
    assert (sentence in shown(render_terminal(findings), width=1000)) is is_shown
    assert (sentence in shown(render_terminal(findings, verbose=True), width=1000)) is (cut_off > 0)


def test_several_sweeps_have_a_row_per_subject_with_the_spread_of_their_scores(tmp_path):
    folders = [build_rank_sweep(tmp_path / name, {4: score, 16: 1.7}) for name, score in (("one", 1.75), ("two", 1.78))]
    sweeps = [load_sweep_data(folder) for folder in folders]
    text = shown(render_spread(sweeps))
    values = [sweep.evidence.shares["lora-rank-4"][0] for sweep in sweeps]
    mean, half = sum(values) / 2, abs(values[0] - values[1]) / 2**0.5
    row = next(line for line in text.splitlines() if line.strip().startswith("lora-rank-4"))
    assert row.split()[1:] == [*(f"{value:.3f}" for value in values), f"{mean:.3f}", "±", f"{half:.3f}"]
    edit_json(folders[1] / "sweep.json", lambda raw: raw.update(metric="loss"))
    with pytest.raises(ConfigError, match="must have the same metric"):
        render_spread([sweeps[0], load_sweep_data(folders[1])])
