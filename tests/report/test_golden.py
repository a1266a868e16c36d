"""The page and the answers of each kind of sweep, as they were when somebody last read them.

After an intended change, renew the files with `LORASWEEP_RENEW_GOLDEN=1 pytest tests/report/test_golden.py` and read
the difference before you commit it.
"""

import html
import os
import re
from pathlib import Path

import pytest
from tests.files import edit_json

from lorasweep.report.facts import read_findings
from lorasweep.report.page import render_page

from .conftest import BASE_SCORE, build_rank_sweep, build_sweep, confirm_sweep, scatter_seeds

GOLDEN = Path(__file__).parent / "golden"
ANSWERS = ("failure", "answers")
"""The ids of the parts of the page that are compared for every kind of sweep."""
PAGE = (*ANSWERS, "use", "warnings", "findings", "arms")
"""Those that are compared for the first one."""


def read_page(sweep, shown):
    """Returns the text of some parts of the page: a line for each paragraph, list item and row of a table."""
    page, lines = render_page(read_findings(sweep), []), []
    for name in shown:
        part = re.search(rf'<(\w+) id="{name}".*?</\1>', page, re.DOTALL)
        text = re.sub(r"\s+|<button.*?</button>", " ", part[0] if part else "")
        text = re.sub(r"<(p|li|tr|h2|dt|summary|pre)\b[^>]*>", "\n", text)
        text = re.sub(r"<[^>]*>", "", re.sub(r"<(td|th|dd)\b[^>]*>", " | ", text))
        text = re.sub(" +", " ", text)
        lines += [f"== {name}", *(line for row in text.splitlines() if (line := row.strip(" |")))] if part else []
    return html.unescape("\n".join(lines)).replace(str(sweep), "SWEEP") + "\n"


def fail_to_learn(sweep):
    def change(raw):
        for trial in raw["trials"]:
            trial["search_score"] = BASE_SCORE if trial["arm"] == "frozen" else BASE_SCORE + 0.1

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
