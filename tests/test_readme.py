"""README is short and true: each command runs, and what it shows has the shape of what is printed."""

import csv
import re
import shlex
from pathlib import Path

import pytest
import yaml
from tests.small_runs import SMALL_RUN

from lorasweep.cli import run
from lorasweep.outcome import DONE
from lorasweep.sweep.definition.arms import read_definition

pytestmark = pytest.mark.docs
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|text|yaml|python)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
TRAINER = [f"{key}={value}" for key, value in SMALL_RUN.items() if key.startswith("trainer.")]
BUDGETS = {
    "quickstart": [f"{key}={value}" for key, value in SMALL_RUN.items()] + ["sweep.trials=2", "confirm.seeds=2"],
    "mine.yaml": [*TRAINER, "data.max_validation_examples=8", "sweep.trials=2", "confirm.seeds=2"],
}


def test_its_sweep_file_is_a_sweep():
    (content,) = [content for language, content in BLOCKS if language == "yaml"]
    assert [arm.name for arm in read_definition(yaml.safe_load(content)).arms] == ["frozen", "full", "lora"]


def test_every_command_runs_and_prints_what_is_shown(here, capsys, encoder):
    with open("reviews.csv", "w", newline="", encoding="utf-8") as file:
        rows = [
            (f"review number {n} was {'good' if n % 2 else 'bad'}", "positive" if n % 2 else "negative")
            for n in range(200)
        ]
        csv.writer(file).writerows([("text", "label"), *rows])
    shown, number = "", 0
    for language, content in BLOCKS:
        if language == "bash":
            for line in content.splitlines():
                _, command, *words = shlex.split(line.replace(HUB_ID, encoder))
                assert run([command, *words, *(BUDGETS[words[0]] if command in ("plan", "sweep") else ())]) == DONE, (
                    line
                )
            shown = capsys.readouterr().out
        elif language == "text":
            number += 1
            printed = [" ".join(line.split()) for line in shown.splitlines()]
            for line in content.splitlines():
                # digits and answers differ; how a line begins does not
                start = re.split(r"[:?,.]|  ", line.strip())[0]
                assert any(one.startswith(start[:40]) for one in printed), start
    assert number
