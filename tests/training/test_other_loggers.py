"""The how-to's command logs every run that trains to W&B and MLflow, without a network."""

import re
import shlex
import sqlite3
from collections import defaultdict
from pathlib import Path

import pytest
from tests.small_runs import TWO_STEPS

from lorasweep.cli import run
from lorasweep.config.build import dotted_items
from lorasweep.outcome import DONE
from lorasweep.record import read_run

pytest.importorskip("wandb", reason="needs wandb: pip install '.[loggers]'")
pytest.importorskip("mlflow", reason="needs mlflow: pip install '.[loggers]'")
PAGE = (Path(__file__).parents[2] / "docs" / "how-to.md").read_text(encoding="utf-8")
(COMMAND,) = re.findall(r"^lorasweep (sweep .*wandb.*)$", PAGE, flags=re.MULTILINE)
BUDGET = [f"{key}={value}" for key, value in TWO_STEPS.items()]
KEYS = ("method.name", "method.rank", "optim.lr", "seeds.data_order")
SEARCH = [
    *("sweep.trials=2", "confirm.seeds=1", "worker.pack_size=2"),
    *("arms.full=null", "arms.lora.method.rank=[1,4]"),
]


@pytest.mark.release  # W&B starts a process for each run, and MLflow makes a database
@pytest.mark.filterwarnings("ignore")  # warnings of wandb and mlflow
def test_each_run_is_logged_with_its_settings_and_scores(here, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert run([*shlex.split(COMMAND), *BUDGET, *SEARCH, "sweep.output=s"]) == DONE
    runs = {folder.name: read_run(folder) for folder in Path("s/runs").iterdir()}
    packed = [name for name, record in runs.items() if record.pack and record.pack["slots"] == 2]
    assert len({runs[name].config["optim"]["lr"] for name in packed}) > 1
    # W&B's offline files have names and values as text
    for name, record in runs.items():
        (file,) = Path("s/runs", name).glob("wandb/offline-run-*/*.wandb")
        text = file.read_text(encoding="utf-8", errors="ignore")
        rate, rank = record.config["optim"]["lr"], record.config["method"].get("rank")
        score = record.last[record.metric]
        expected = [f'"lr":{rate},', f"validation/{record.metric}", str(score), *([f'"rank":{rank},'] if rank else ())]
        assert [part for part in expected if part not in text] == [], name
    logged = defaultdict(dict)
    with sqlite3.connect("mlflow.db") as database:
        for table in ("params", "latest_metrics"):
            query = f"select r.name, x.key, x.value from {table} x join runs r using (run_uuid)"
            for name, key, value in database.execute(query):
                logged[name][key] = value
    assert logged.keys() == runs.keys()
    for name, record in runs.items():
        settings = {key: str(value) for key, value in dotted_items(record.config) if key in KEYS}
        assert {key: logged[name].get(key.replace(".", "/")) for key in settings} == settings
        assert logged[name][f"validation/{record.metric}"] == record.last[record.metric]
