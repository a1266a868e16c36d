"""The page and the answers of each kind of sweep, as they were when somebody last read them.

After an intended change, renew the files with `LORASWEEP_RENEW_GOLDEN=1 pytest tests/report/test_golden.py` and read
the difference before you commit it.
"""

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.files import edit_json

from lorasweep.report.findings import read_findings
from lorasweep.report.page import render_page

from .conftest import BASE_SCORE, build_rank_sweep, build_sweep, confirm_sweep, scatter_seeds

GOLDEN = Path(__file__).parent / "golden"
ANSWERS = ("failure", "answers", "verdicts")
"""The ids of the parts of the page that are compared for every kind of sweep."""
PAGE = (*ANSWERS, "use", "warnings", "findings", "arms")
"""Those that are compared for the first one."""


class PageText(HTMLParser):
    """Collects the text of some parts of the page: a line for each paragraph, list item and row of a table."""

    def __init__(self, page, shown):
        super().__init__()
        self.lines: list[str] = []
        self._shown = shown
        self._shown_tags: list[str] = []  # the open tags from the shown part on
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        name = dict(attrs).get("id")
        if name in self._shown:
            self.lines.append(f"== {name}")
        if self._shown_tags or name in self._shown:
            self._shown_tags += [tag] if tag not in ("br", "input") else []
            if tag in ("p", "li", "tr", "h2", "dt", "summary", "pre"):
                self.lines.append("")
            elif tag in ("td", "th", "dd"):
                self.lines[-1] += " | "
            elif tag == "small":
                self.lines[-1] += " "

    def handle_endtag(self, tag):
        if self._shown_tags:
            self._shown_tags.pop()

    def handle_data(self, data):
        if self._shown_tags and not {"button", "script"} & {*self._shown_tags}:
            self.lines[-1] += data


def read_page(sweep, shown):
    lines = PageText(render_page(read_findings(sweep), []), shown).lines
    text = "\n".join(squeezed for line in lines if (squeezed := re.sub(r"\s+", " ", line).strip(" |")))
    return text.replace(str(sweep), "SWEEP") + "\n"


def fail_to_learn(sweep):
    def change(raw):
        for trial in raw["trials"]:
            trial["value"] = BASE_SCORE if trial["arm"] == "frozen" else BASE_SCORE + 0.1

    edit_json(sweep / "sweep.json", change)
    return sweep


def measure_margin_in_bits(sweep):
    edit_json(sweep / "sweep.json", lambda raw: raw.update(margin=0.02))
    return sweep


SWEEPS = {
    "open": lambda folder: scatter_seeds(
        build_rank_sweep(folder, {1: 1.9, 4: 1.665, 16: 1.662}, seeds=4, noise=0.0005), "lora-rank-16", 0.012
    ),
    "equivalent_worse_sufficient": lambda folder: build_rank_sweep(
        folder, {4: 1.70, 16: 1.6635, 64: 1.662}, noise=0.0005
    ),
    "better": lambda folder: build_rank_sweep(folder, {4: 1.58, 16: 1.55}, noise=0.0005, examples=12),
    "not_worse": lambda folder: scatter_seeds(
        build_rank_sweep(folder, {16: 1.650}, noise=0.0005), "lora-rank-16", 0.012
    ),
    "worse_at_every_rank_margin_in_bits": lambda folder: measure_margin_in_bits(
        build_rank_sweep(folder, {1: 1.9, 4: 1.8}, noise=0.001)
    ),
    "worse_without_confirm_each": lambda folder: confirm_sweep(build_sweep(folder, lora=6, full=6)),
    "one_seed": lambda folder: build_rank_sweep(folder, {4: 1.7}, seeds=1),
    "not_confirmed": lambda folder: build_sweep(folder, lora=6, full=6),
    "nothing_learned": lambda folder: fail_to_learn(build_sweep(folder, lora=6, full=6)),
}


@pytest.mark.parametrize("kind", SWEEPS)
def test_page_says_what_it_said(tmp_path, kind):
    text = read_page(SWEEPS[kind](tmp_path), PAGE if kind == next(iter(SWEEPS)) else ANSWERS)
    golden = GOLDEN / f"{kind}.txt"
    if os.environ.get("LORASWEEP_RENEW_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")
