"""A report of damaged files is written, with what is missing said in sentences, or refused in one sentence."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tests.fuzzing import damage, damage_bytes, fuzz, refusal_allowed

from lorasweep.report.findings import read_findings
from lorasweep.report.page import render_page
from lorasweep.report.terminal import render_terminal

from .conftest import build_rank_sweep


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a confirmed sweep of two ranks in one arm."""
    return build_rank_sweep(tmp_path_factory.mktemp("small"), {1: 1.8, 4: 1.7}, seeds=2, examples=12)


@st.composite
def damage_file(draw, path, content):
    if path.suffix == ".json":
        return draw(damage(content))
    if path.suffix == ".csv" and draw(st.booleans()):
        cells = [line.split(",") for line in content.decode().splitlines()]
        row, column = draw(st.integers(0, len(cells) - 1)), draw(st.integers(0, len(cells[0]) - 1))
        cells[row][column] = draw(st.sampled_from(["", "nan", "inf", "-1", "1e308", "1e400", "9" * 5000, '"', "\0"]))
        return "\n".join(map(",".join, cells)).encode()
    return draw(damage_bytes(content))


@fuzz
@given(data=st.data())
def test_a_report_of_a_damaged_file_is_shown_or_refused(small, data):
    path = data.draw(st.sampled_from([path for path in sorted(small.rglob("*")) if path.is_file()]))
    content = path.read_bytes()
    path.write_bytes(data.draw(damage_file(path, content)))
    try:
        with refusal_allowed(unchanged=small):
            console = Console(width=120, file=io.StringIO())
            findings = read_findings(small)
            console.print(render_terminal(findings))
            assert render_page(findings, [])
    finally:
        path.write_bytes(content)
