"""The report in the terminal."""

import io
import re

import pytest
from rich.console import Console

from lorasweep.record import read_run, read_sweep, write_record
from lorasweep.report.facts import read_findings
from lorasweep.report.terminal import render_terminal
from lorasweep.report.text import list_notes


def shown(renderable, *, width=200):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_findings_are_shown_if_asked_for(sweep):
    findings = read_findings(sweep)
    first, *_ = list_notes(findings)
    assert first not in shown(render_terminal(findings), width=1000)
    assert first in shown(render_terminal(findings, verbose=True), width=1000)


def test_an_interval_stays_in_one_line(confirmed):
    findings = read_findings(confirmed)
    wide, narrow = (shown(render_terminal(findings), width=width) for width in (200, 70))
    intervals = re.findall(r"\[\S+,\S+\]", wide)
    assert intervals
    assert [one for one in intervals if one not in narrow] == []


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
