"""What is printed: tables that fit a terminal, JSON and CSV that other programs read."""

from __future__ import annotations

import csv
import io
import json

import pytest
from rich.console import Console

from lorasweep.runs.inspect.formats import as_csv, as_json, render_inspection
from lorasweep.runs.inspect.inspect_run import inspect_run
from lorasweep.runs.inspect.inspect_sweep import inspect_sweep


def printed(renderable, *, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


@pytest.fixture
def inspection(runs):
    return inspect_run(runs["lora"])


def test_the_table_has_a_row_per_kind(inspection):
    text = printed(render_inspection(inspection))
    assert all(kind in text for kind in {row.kind for row in inspection.layers})
    assert all(len(line) <= 80 for line in text.splitlines())
    joined = " ".join(text.split())
    assert all(sentence in joined for sentence in inspection.sentences)


def test_json_and_csv_hold_every_layer(inspection):
    content = json.loads(as_json(inspection))
    rows = list(csv.DictReader(as_csv(inspection).splitlines()))
    layers = [row.layer for row in inspection.layers]
    assert [row["layer"] for row in rows] == [row["layer"] for row in content["by_layer"]] == layers


def test_a_sweep_is_printed_by_arm(sweep):
    found = inspect_sweep(sweep)
    text = printed(render_inspection(found))
    assert text.count("updates by kind of layer") == 2
    assert "Arm `none`" in text
    assert set(json.loads(as_json(found))["arms"]) == {"lora", "full"}
    assert {row["arm"] for row in csv.DictReader(as_csv(found).splitlines())} == {"lora", "full"}
