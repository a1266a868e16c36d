"""A report's files. Its page is whole on its own, safe with hostile names, and there if parts of a sweep are not."""

import csv
import json
import re
from collections import Counter
from html.parser import HTMLParser
from typing import Any

import pytest
from tests.files import edit_json

from lorasweep.record import json_file
from lorasweep.report.figures import draw_panels
from lorasweep.report.sweep_data import load_sweep_data
from lorasweep.report.write import build_summary, write_report
from lorasweep.results import load_sweep

from .conftest import build_sweep, report

HOSTILE = "</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Collects a page's ids, links, tags with sources, and visible text."""

    def __init__(self, text):
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.figures: list[Any] = []
        self._is_figures = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append((tag, found))
        self.ids += [found["id"] or ""] if "id" in found else []
        self.links += [found["href"] or ""] if tag == "a" else []
        self._is_figures = tag == "script" and found.get("class") == "figure-data"

    def handle_data(self, data):
        if self._is_figures:
            self.figures += json.loads(data)
            self._is_figures = False
        elif self.lasttag not in ("script", "style"):
            self.text += data


def written(sweep):
    report(sweep)
    return Page((sweep / "report/index.html").read_text())


SECTIONS = ["confirmed", "arms", "lr", "trials"]


def count_figures(sweep):
    data = load_sweep_data(sweep)
    return sum(len(panel.figures) for panel in draw_panels(data))


def test_page_has_every_section_and_figure_and_fetches_nothing(sweep):
    page = written(sweep)
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert len(page.figures) == count_figures(sweep) > 0
    assert "93\u00a0%" in page.text
    assert "one seed" in page.text
    assert "The loss became NaN at step 12." in page.text
    assert not [found for tag, found in page.tags if "src" in found]
    hrefs = [found["href"] or "" for _, found in page.tags if "href" in found]
    assert all(re.match(r"#|\.\./runs/|[a-z-]+\.csv$|summary\.json$|data:,$", href) for href in hrefs)
    styles = re.findall(r"<style>(.*?)</style>", (sweep / "report/index.html").read_text(), re.DOTALL)
    assert all("url(" not in style and "@import" not in style for style in styles)


def test_hostile_names_are_text(sweep):
    def spoil(raw):
        raw.update(name=HOSTILE, description=HOSTILE)
        for trial in raw["trials"]:
            if trial["arm"] == "lora":
                trial["reason"] = HOSTILE
                trial["params"][HOSTILE] = HOSTILE

    edit_json(sweep / "sweep.json", spoil)
    page = written(sweep)
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [found for _, found in page.tags if any(name.startswith("on") for name in found)]
    assert HOSTILE in page.text
    # plotly obeys tags in labels: they reach it escaped
    assert page.figures
    assert "<img" not in json.dumps(page.figures)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"full": 0}, "Not asked: no arm has method=full"),
        ({"lora": 0}, "Not asked: no arm has method=lora"),
    ],
)
def test_what_is_missing_is_a_sentence_and_the_rest_still_appears(tmp_path, change, sentence):
    page = written(build_sweep(tmp_path, **change))
    assert sentence in page.text
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS


def test_a_report_reads_each_record_once(confirmed, monkeypatch):
    reads = Counter()
    open_file = json_file.open_inside

    def count(folder, path):
        reads[path] += 1
        return open_file(folder, path)

    monkeypatch.setattr(json_file, "open_inside", count)
    result = load_sweep(confirmed)
    write_report(result.findings)
    assert result.table()
    assert result.figures()
    assert result.recommended("lora").params
    assert set(reads.values()) == {1}
    assert len(reads) == 1 + 25 + 11


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_files_have_a_line_per_trial_evaluation_and_confirm_run(confirmed):
    findings = report(confirmed)
    trials = read_csv(confirmed / "report/trials.csv")
    assert len(trials) == 25
    assert {"method.rank", "method.alpha", "optim.lr", "bits_per_byte", "run", "reason"} <= set(trials[0])
    failed = next(row for row in trials if row["state"] == "failed")
    assert (failed["bits_per_byte"], failed["reason"]) == ("", "The loss became NaN at step 12.")
    curves = read_csv(confirmed / "report/curves.csv")
    assert len(curves) == 1 + 11 * 7 + 6 * 3 + 6 * 7
    assert curves[0] == {"arm": "frozen", "trial": "0", "step": "0", "bits_per_byte": "2.031"}
    runs = read_csv(confirmed / "report/confirmed.csv")
    assert [row["subject"] for row in runs] == ["frozen", *["lora"] * 5, *["full"] * 5]
    assert {row["is_better_than_untrained"] for row in trials if row["arm"] == "full"} == {"True"}
    assert failed["is_better_than_untrained"] == ""
    assert json.loads((confirmed / "report/summary.json").read_text()) == json.loads(
        json.dumps(build_summary(findings))
    )
