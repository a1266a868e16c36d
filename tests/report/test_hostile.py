"""A sweep's folder from a stranger: names are text everywhere, damage is one sentence, nothing is written elsewhere."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lorasweep.report import render_terminal, write_comparison, write_report
from lorasweep.terminal import PlainConsole

from .conftest import build_sweep, confirm_sweep, edit_json, inspect_winners
from .test_page import Page

EVIL = (
    "</script></style><script>alert(1)</script><img src=x onerror=alert(1)>'\"><svg/onload=alert(1)>"
    "[red]`|\n![i](http://e.example/x)<http://e.example>\x1b]0;owned\x07\u202e\u2028{{7*7}}{% raw %}\ud800\0"
)
ORDERS = ("\x1b", "\x07", "\u202e", "\u2028", "\ud800", "\0")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A confirmed and inspected sweep of few trials."""
    sweep = confirm_sweep(build_sweep(tmp_path / "outer" / "sweep", lora=3, full=2), seeds=2, examples=5)
    inspect_winners(sweep)
    return sweep


def spoil_sweep(raw: dict[str, Any]) -> None:
    raw.update(name=EVIL, description=EVIL, metric=EVIL, notes=[EVIL], warnings=[EVIL], started_at=EVIL, source=EVIL)
    for arm in raw["arms"]:
        arm.update(name=arm["name"] + EVIL, sampler=EVIL, pruner=EVIL, settings={EVIL: EVIL})
        arm["space"][EVIL] = [EVIL, 1]
        arm["importance"][EVIL] = 0.5
    for trial in raw["trials"]:
        trial.update(arm=trial["arm"] + EVIL, reason=EVIL)
        trial["params"][EVIL] = EVIL
    raw["trials"][1].update(state="failed")
    for row in raw["confirm"]:
        row.update(arm=row["arm"] + EVIL, reason=EVIL)


def spoil_run(raw: dict[str, Any]) -> None:
    raw.update(metric=EVIL, reason=EVIL, notes=[EVIL], arm=EVIL, base={"path": EVIL, "fingerprint": EVIL})
    raw["best"][EVIL], raw["test"][EVIL] = 1.5, 1.5
    raw["config"][EVIL] = EVIL
    raw["files"][EVIL] = {"bytes": 1, "sha256": EVIL}


@pytest.fixture
def spoilt(small: Path) -> Path:
    """The same sweep with hostile text wherever a record holds text."""
    edit_json(small / "sweep.json", spoil_sweep)
    for record in small.glob("runs/*/run.json"):
        edit_json(record, spoil_run)
    for summary in small.rglob("inspect/summary.json"):
        edit_json(summary, lambda raw: raw.update(sentences=[EVIL]))
    return small


def show(*sweeps: Path) -> str:
    file = io.StringIO()
    console = PlainConsole(file=file, width=200)
    console.print(render_terminal(*sweeps))
    return file.getvalue()


def is_harmless(page: Page, own: dict[str, int]) -> bool:
    counts: dict[str, int] = {}
    for tag, found in page.tags:
        assert not [name for name in found if name.startswith("on")]
        assert not [value for value in found.values() if value and value.lower().startswith("javascript:")]
        counts[tag] = counts.get(tag, 0) + 1
    return all(counts.get(tag, 0) == own.get(tag, 0) for tag in ("script", "img", "svg", "style", "iframe", "link"))


def test_hostile_text_in_every_field_injects_nothing_into_the_pages(small: Path) -> None:
    write_report(small)
    clean = Page((small / "report/index.html").read_text())
    own = {tag: sum(tag == name for name, _ in clean.tags) for tag in ("script", "style", "img", "svg", "link")}
    edit_json(small / "sweep.json", spoil_sweep)
    for record in small.glob("runs/*/run.json"):
        edit_json(record, spoil_run)
    write_report(small)
    write_comparison([small, small], small / "report" / "compare.html")
    for name in ("index.html", "compare.html"):
        text = (small / "report" / name).read_text()
        page = Page(text)
        figures = sum(tag == "script" and found.get("class") == "figure-data" for tag, found in page.tags)
        clean_figures = sum(tag == "script" and found.get("class") == "figure-data" for tag, found in clean.tags)
        assert is_harmless(page, {**own, "script": own["script"] - clean_figures + figures})
        assert "<script>alert(1)</script>" in page.text
        assert not [c for c in ORDERS if c in text.replace(json.dumps("\u2028"), "")[:0] + page.text]
        drawn = json.dumps(page.figures, ensure_ascii=False)
        assert "<img" not in drawn
        assert not [c for c in ORDERS if c in drawn]


def test_hostile_text_gives_the_terminal_no_orders(spoilt: Path) -> None:
    for text in (show(spoilt), show(spoilt, spoilt)):
        assert not [c for c in ORDERS if c in text]
        assert r"\x1b]0;owned" in text


def test_hostile_text_is_no_markup_in_tensorboard(spoilt: Path) -> None:
    write_report(spoilt)
    events = EventAccumulator(str(spoilt / "report" / "tensorboard"))
    events.Reload()
    text = events.Tensors("report/text_summary")[0] if "report/text_summary" in events.Tags()["tensors"] else None
    content = text or events.Tensors(events.Tags()["tensors"][-1])[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TensorBoard's own copy of html5lib
        from tensorboard.plugin_util import markdown_to_safe_html  # noqa: PLC0415
    html = markdown_to_safe_html(content.tensor_proto.string_val[0])
    tags = [tag for tag, _ in Page(html).tags]
    assert "td" in tags
    assert not {"a", "img", "script", "svg"} & set(tags)


def test_a_link_that_leads_outside_of_the_sweep_is_not_followed(small: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    (small / "runs/lora-0001").rename(outside)
    (small / "runs/lora-0001").symlink_to(outside)
    before = sorted((path, path.stat().st_mtime_ns) for path in outside.rglob("*"))
    write_report(small)
    assert "is not read: its folder lies outside the sweep's" in show(small)
    assert sorted((path, path.stat().st_mtime_ns) for path in outside.rglob("*")) == before
