"""A sweep's folder from a stranger: names are text everywhere, damage is one sentence, nothing is written elsewhere."""

from __future__ import annotations

import copy
import io
import json
import math
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lorasweep.console import PlainConsole
from lorasweep.errors import RecordError
from lorasweep.report import render_terminal, write_comparison, write_report

from .conftest import build_sweep, confirm_sweep, edit_json, inspect_winners
from .test_page import Page

EVIL = (
    "</script></style><script>alert(1)</script><img src=x onerror=alert(1)>'\"><svg/onload=alert(1)>"
    "[red]`|\n![i](http://e.example/x)<http://e.example>\x1b]0;owned\x07\u202e\u2028{{7*7}}{% raw %}\ud800\0"
)
ORDERS = ("\x1b", "\x07", "\u202e", "\u2028", "\ud800", "\0")
NUM_MUTANTS = 12
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**30, 10**400, 1e308, math.nan, -math.inf, "", "a\0b", "\ud800", EVIL, "../../etc", "/etc"),
    *("A" * 5000, [], {}, [[]], {"a": {"b": 1}}, [1, "x", None], {EVIL: EVIL}),
)


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


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in items:
        yield from leaves(item, (*path, key))


def replaced(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.deepcopy(content)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return changed


def report_or_sentence(sweep: Path) -> bool:
    """Whether the report could be written; where not, one sentence says why."""
    try:
        write_report(sweep)
        show(sweep, sweep)
    except RecordError:
        return False
    return True


def everything_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "report" not in path.parts}


@pytest.mark.slow
def test_any_value_in_a_sweeps_record_is_reported_or_one_sentence(small: Path) -> None:
    path, rng = small / "sweep.json", random.Random("sweep.json")
    content, before = json.loads(path.read_text()), everything_in(small.parent)
    places = list(leaves(content))
    written = 0
    for _ in range(NUM_MUTANTS):
        path.write_text(json.dumps(replaced(content, rng.choice(places), rng.choice(VALUES))))
        written += report_or_sentence(small)
    assert 0 < written < NUM_MUTANTS
    assert everything_in(small.parent) == before


def test_a_link_that_leads_outside_of_the_sweep_is_not_followed(small: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    (small / "runs/lora-0001").rename(outside)
    (small / "runs/lora-0001").symlink_to(outside)
    before = sorted((path, path.stat().st_mtime_ns) for path in outside.rglob("*"))
    write_report(small)
    assert "is not read: its folder lies outside the sweep's" in show(small)
    assert sorted((path, path.stat().st_mtime_ns) for path in outside.rglob("*")) == before
