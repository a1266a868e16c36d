"""`compare` and `status` on a stranger's folder show it or refuse it in one sentence, and write nothing outside it."""

import shutil

import pytest
from tests.files import DELETED, set_values
from tests.hostile.commands import feed

from lorasweep import cli
from lorasweep.outcome import DONE, WRONG_REQUEST

MARKUP = "[/red]<script>alert(1)</script>\x1b[2J"
REFUSED = [
    *({place: name} for place in ("arms/0/name", "trials/0/arm", "trials/0/subject", "settings/1/subject")
      for name in ("../../outside", "..", "a/b", "/tmp/outside", "a\0b", "")),
    *({place: name} for place in ("trials/0/run", "confirm/0/run") for name in ("runs/../../x", "/etc")),
    {"arms/2/subjects/0/arm": "../x"},
    {"retained": [{"name": "../../x", "metric": {"name": "m", "direction": "minimize"}}]},
    {"trials/0/arm": "nobody"},
    {"settings/1/subject": "nobody"},
    {"status": DELETED},
]  # fmt: skip
SHOWN = [
    {"trials/1/params": {"optim.lr": {"a": [1]}, MARKUP: True, "method.targets": MARKUP}},
    {"name": MARKUP, "description": MARKUP, "notes": ["](http://x)", MARKUP], "warnings": [MARKUP]},
    {"definition": {"file": {"settings": {"callbacks.a._target_": "evil.X", "sampler._target_": "evil.S"}}}},
    {"search_metric": {"name": "../../x", "direction": "minimize"}},
]
RUNS = [
    {"answers": {"test": {"problem": [MARKUP]}}},
    {"reason": MARKUP, "notes": [MARKUP]},
    {"config": {"optim": {"_target_": "evil.X"}}},
]


@pytest.mark.parametrize("values", REFUSED, ids=lambda values: next(iter(values)))
def test_a_sweep_that_names_other_places_is_refused(theirs, values, capsys):
    set_values(theirs / "sweep.json", values)
    assert feed("compare", "theirs", capsys=capsys) == WRONG_REQUEST
    assert feed("status", "theirs", capsys=capsys) == WRONG_REQUEST


def check_shown(theirs, capsys):
    """Both commands show the folder, and no text becomes markup of the page or a control character of the terminal."""
    for command in ("status", "compare"):
        assert cli.run([command, "theirs"]) == DONE
        written = capsys.readouterr()
        assert "\x1b[2J" not in written.out + written.err
    assert "<script>alert(1)" not in (theirs / "report/index.html").read_text()


@pytest.mark.parametrize("values", SHOWN, ids=lambda values: next(iter(values)))
def test_texts_of_a_sweep_are_shown_as_texts(theirs, values, capsys):
    set_values(theirs / "sweep.json", values)
    check_shown(theirs, capsys)


@pytest.mark.parametrize("values", RUNS, ids=lambda values: next(iter(values)))
def test_texts_of_a_run_are_shown_as_texts(theirs, values, capsys):
    for name in ("lora-0000", "lora-confirm-0000"):
        set_values(theirs / "runs" / name / "run.json", values)
    check_shown(theirs, capsys)


@pytest.mark.parametrize("place", ["report", "report/tensorboard", "report/tensorboard/arms", "report/index.html"])
def test_links_are_not_followed(theirs, place, capsys):
    path = theirs / place
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(theirs.parent / "outside")
    assert feed("compare", "theirs", capsys=capsys) == WRONG_REQUEST
    assert feed("status", "theirs", capsys=capsys) == DONE


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
