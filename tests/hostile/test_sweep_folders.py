"""`compare` and `status` on a stranger's folder show it or refuse it in one sentence, and write nothing outside it."""

import math
import os
import shutil

import pytest
from tests.files import DELETED, set_values
from tests.fuzzing import feed

from lorasweep.outcome import DONE, WRONG_REQUEST

LONG, NAN = "x" * 1_000_000, math.nan
DEEP = f"<<{'[' * 150}{']' * 150}>>"
LORA, TEST = {"arm": "lora", "key": "method.rank"}, "bits_per_byte"
REFUSED = [
    *({place: name} for place in ("arms/0/name", "trials/0/arm", "trials/0/subject", "settings/1/subject")
      for name in ("../../outside", "..", "a/b", "/tmp/outside", "a\0b", "", LONG)),
    *({place: name} for place in ("trials/0/run", "confirm/0/run") for name in ("runs/..", "runs/../../x", "/etc")),
    {"arms/2/subjects/0/arm": "../x"},
    {"retained": [{"name": "../../x", "metric": {"name": "m", "direction": "minimize"}}]},
    {"trials/0/arm": "nobody"},
    {"settings/1/subject": "nobody"},
    {"arms": lambda arms: arms + arms},
    {"arms": lambda arms: arms * 50},
    {"arms/2/subjects": [LORA | {"value": value} for value in ("a b", "a_b")]},
    {"arms/2/subjects": [LORA | {"value": value} for value in range(1001)]},
    {"arms/2/space": {str(key): [1, 2] for key in range(1001)}},
    {"arms": []},
    {"trials/1/params": {"a": LONG}},
    {"trials/1/params": {"method.rank": 10**400}},
    {"looks": [1] * 2000},
    {"looks": [2**62]},
    {"looks": [0]},
    {"looks": [5, 3]},
    {"confirm_seeds": list(range(1001))},
    {"questions/0/reference": None},
    {"questions": lambda questions: questions[:1] * 701},
    {"questions/0/subjects": ["lora"] * 1001},
    {"trials/0/number": 2**63},
    {"makespan_s": 1e308},
    {"trials/0/values": {"1": 1e308}},
    *({"confirm/1/test_scores": {TEST: value}} for value in (NAN, 1e308, "x")),
    {"settings/1/regret": 1e308},
    {"settings/1/rate_costs": {"half": "<<1e400>>"}},
    {"status": DELETED},
    {"definition": f"<<{'[' * 100_000}>>"},
]  # fmt: skip
SHOWN = [
    *({"trials/1/search_score": value} for value in (NAN, 1e308, -1e308, 1e-320, None)),
    *({"confirm/1/test_scores": scores} for scores in ({}, {TEST: None}, {TEST: 1e-320}, {"other": 1.0})),
    {f"confirm/{run}/test_scores": {TEST: (-1) ** run * 1e99} for run in range(5)},
    {"trials/1/values": {}},
    {"makespan_s": None, "telemetry": {"wall_s": 0, "cpu_s": None}},
    {"trials/1/params": {"optim.lr": {"a": [1]}, "method.alpha": [[2]], "": "x" * 90_000, "\x1b[2J": True}},
    {"trials/2/params": {"method.rank": "x", "method.alpha": [1], "optim.lr": -1}},
    {"trials/2/params": {"method.rank": 2**62, "optim.lr": 0}},
    {"arms/2/space": {"method.rank": {"low": NAN, "high": "x"}, "optim.lr": "x", "a": []}},
    {"name": "[/red]<script>\x1b[2J", "description": LONG, "notes": ["](http://x)"] * 1000, "warnings": ["\x1b[2J"]},
    {"definition": {"file": {"settings": {"callbacks.a._target_": "evil.X", "sampler._target_": "evil.S"}}}},
    {"definition": {"file": None}},
    {"trials": [], "confirm": [], "settings": [], "questions": [], "looks": []},
    {"questions/0/subjects": ["nobody"], "questions/0/reference": "nobody"},
    {"looks_done": [{"seeds": 9, "open": [], "next": ["x"] * 1000}]},
    {"unknown": DEEP},
    {"search_metric": {"name": "../../x", "direction": "minimize"}},
    {"status": "running", "trials/1/state": "running"},
]  # fmt: skip
RUNS = [
    {"wall_s": None, "tokens_per_s": None, "trainable_fraction": NAN},
    {"best": {"bits_per_byte": None, "step": None}},
    {"best": {"bits_per_byte": 1e308}},
    {"config": {"optim": [1], "method": "x"}},
    {"config": DEEP},
    {"answers": {"test": {"problem": ["\x1b[2J"]}}},
    {"test": {"bits_per_byte": None}},
    {"steps_done": 2**63},
    {"reason": LONG, "notes": [LONG]},
    {"status": DELETED},
]
SCORES = ["", "a,b\n1,2\n", "row,score,weight,group\n1,1e308,1,a\n2,nan,1,b\n", "row,score\n" + "9" * 5000, "\0" * 99]


@pytest.mark.parametrize("values", REFUSED, ids=lambda values: next(iter(values)))
def test_a_sweep_that_names_other_places_or_takes_too_long_is_refused(theirs, values, capsys):
    set_values(theirs / "sweep.json", values)
    assert feed("compare", "theirs", capsys=capsys) == WRONG_REQUEST
    assert feed("status", "theirs", capsys=capsys) == WRONG_REQUEST


@pytest.mark.parametrize("values", SHOWN, ids=lambda values: next(iter(values)))
def test_odd_values_of_a_sweep_are_shown(theirs, values, capsys):
    set_values(theirs / "sweep.json", values)
    assert feed("status", "theirs", capsys=capsys) == DONE
    assert feed("compare", "theirs", capsys=capsys) == DONE


@pytest.mark.parametrize("values", RUNS, ids=lambda values: next(iter(values)))
def test_odd_values_of_a_run_are_shown(theirs, values, capsys):
    for run in ("lora-0000", "lora-confirm-0000"):
        set_values(theirs / "runs" / run / "run.json", values)
    assert feed("compare", "theirs", capsys=capsys) == DONE


@pytest.mark.parametrize("content", SCORES)
def test_wrong_scores_of_examples_are_said(theirs, content, capsys):
    (theirs / "runs/lora-confirm-0000/test_scores.csv").write_text(content)
    (theirs / "runs/lora-0000/steps.jsonl").write_text('{"step": NaN}\n' + content)
    assert feed("compare", "theirs", capsys=capsys) == DONE


@pytest.mark.parametrize("place", ["report", "report/tensorboard", "report/tensorboard/arms", "report/index.html"])
def test_links_are_not_followed(theirs, place, capsys):
    path = theirs / place
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(theirs.parent / "outside")
    assert feed("compare", "theirs", capsys=capsys) == WRONG_REQUEST
    assert feed("status", "theirs", capsys=capsys) == DONE


@pytest.mark.parametrize(
    ("name", "codes"),
    [("sweep.json", [WRONG_REQUEST] * 2), (".lock", [DONE, DONE]), ("report/index.html", [DONE, DONE]),
     ("runs/lora-0000/run.json", [DONE, DONE]), ("runs/lora-0000/steps.jsonl", [DONE, DONE]),
     ("runs/lora-confirm-0000/test_scores.csv", [DONE, DONE]), ("journal.log", [DONE, DONE])],
)  # fmt: skip
def test_pipes_are_not_opened(theirs, name, codes, capsys):
    (theirs / name).unlink()
    os.mkfifo(theirs / name)
    assert [feed(command, "theirs", capsys=capsys) for command in ("status", "compare")] == codes


@pytest.mark.parametrize("name", ["test_scores.csv", "test_answers.csv"])
def test_a_table_of_30_gb_is_not_read(theirs, name, capsys):
    path = theirs / "runs/lora-confirm-0000" / name
    path.touch()
    os.truncate(path, 30 * 2**30)  # takes no space on the disk
    assert feed("compare", "theirs", capsys=capsys) == DONE


def test_another_file_does_not_come_into_the_page_by_a_link(theirs, capsys):
    private = theirs.parent / "scores.csv"
    private.write_text(
        "row,prompt,reference,answer,score,weight,group\n0,a-secret-4711,a-secret-4711,a-secret-4711,1,1,0\n"
    )
    for path in (theirs / "base_answers.csv", *(run / "test_answers.csv" for run in theirs.glob("runs/*-confirm-*"))):
        path.symlink_to(private)
    elsewhere = theirs / "runs/lora-0001"
    shutil.move(elsewhere, theirs.parent / "out")
    elsewhere.symlink_to(theirs.parent / "out")
    set_values(theirs.parent / "out" / "run.json", {"notes": ["a-secret-4711"], "reason": "a-secret-4711"})
    assert feed("compare", "theirs", capsys=capsys) == DONE
    assert "a-secret-4711" not in (theirs / "report/index.html").read_text()


def test_a_record_of_more_than_100_mb_is_refused(theirs, capsys):
    os.truncate(theirs / "sweep.json", 2**30)  # takes no space on the disk
    assert feed("compare", "theirs", capsys=capsys) == WRONG_REQUEST
