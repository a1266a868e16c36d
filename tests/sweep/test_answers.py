"""Generated answers in a sweep: one sentence for a wrong request, verdicts about the chosen metric, and a page."""

import csv
import json
import re

import pytest
import yaml
from tests.word_chats import make_word_chats

import lorasweep
from lorasweep.cli import run
from lorasweep.outcome import DONE, WRONG_REQUEST
from lorasweep.record import read_run, read_sweep
from lorasweep.report.page import list_generated_examples
from lorasweep.report.sweep_data import load_sweep_data

ARMS = {
    "full": {"settings": {"method": "full"}},
    "lora": {"settings": {"method": "lora", "method.rank": 2}},
}
OWN = """
def raises(answer, reference, example):
    raise OSError("gone")

def loss(answer, reference, example):
    return 1

def only_equal(answer, reference, example):
    return 1 / (answer == reference)
"""


@pytest.fixture
def content(here):
    (here / "own.py").write_text(OWN)
    settings = make_word_chats(here) | {"trainer.max_steps": 10, "trainer.eval_every_steps": 10}
    settings |= {"confirm.seeds": 2, "confirm.margin": 0.5}
    content = {"name": "words", "settings": settings, "arms": ARMS}
    (here / "words.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return content


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.answers.score=bleu"], "`data.answers.score` must be one of exact_match, last_number, but got 'bleu'"),
        (["data.answers.score._target_=own.raises"], "`raises` raised OSError: gone"),
        (["data.answers.score._target_=own.loss"], "`data.answers.score` must have another name"),
        (["confirm.metric=last_number"], "`confirm.metric` must be one of auto, bits_per_byte, exact_match, but got"),
        (["confirm.metric=exact_match", "data.answers.score=null"], "`data.answers.score` measures generated answers"),
        (["arms.lora.data.answers.score=last_number"], "`data.answers` must be the same for all arms"),
        (["data.answers.max_new_tokens=0"], "`data.answers.max_new_tokens >= 1` must hold"),
        (["data.answers.score=last_number", "data.max_length=2"], "data.max_length"),
        (["data=stdlib_docs", "data.answers.score=exact_match"], "`data.answers` is a setting of `data=chat`"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_exit_code_2(content, tmp_path, capsys, overrides, said):
    assert run(["sweep", "words.yaml", "sweep.output=new", *overrides]) == WRONG_REQUEST
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not (tmp_path / "new").exists()


def test_verdicts_are_about_the_chosen_metric_and_the_page_shows_both_and_the_answers(content, tmp_path):
    settings = content["settings"] | {"confirm.metric": "exact_match"}
    folder = lorasweep.run_sweep(content | {"settings": settings}, output=tmp_path / "new", progress=None).folder
    record = read_sweep(folder)
    answers = [read_run(folder / trial.run).answers["test"] for trial in record.confirm]
    is_many = any(one["cut_off"] > 0.1 * one["examples"] for one in answers)
    assert any("generated answers are cut off" in warning for warning in record.warnings) is is_many
    assert [metric.name for metric in record.test_metrics] == ["exact_match", "bits_per_byte"]
    assert (record.search_metric.name, record.verdict_metric.direction) == ("bits_per_byte", "maximize")
    for trial in record.confirm:
        of_run = read_run(folder / trial.run)
        assert trial.test_scores == of_run.test
        assert of_run.score == of_run.best["bits_per_byte"]
    data = load_sweep_data(folder)
    assert data.problems == ()
    full = [trial.test_scores["exact_match"] for trial in record.confirm if trial.arm == "full"]
    assert data.evidence.means["full"].value == pytest.approx(sum(full) / 2)
    assert data.evidence.scores.num_examples == read_run(folder / record.confirm[0].run).answers["test"]["examples"]
    assert data.other_means["full"].value > 1  # bits per byte
    summary = json.loads((folder / "report" / "summary.json").read_text())
    assert any("exact match (`confirm.metric`)" in sentence for sentence in summary["sentences"])
    (row,) = [row for answer in summary["answers"] for row in answer["rows"] if row["name"] == "as_good_as_full"]
    assert -1 <= row["value"] <= 1
    with (folder / "report" / "confirmed.csv").open() as file:
        assert {"test/exact_match", "test/bits_per_byte"} <= next(csv.DictReader(file)).keys()
    examples = list_generated_examples(data)
    assert len(examples) == 5
    # no arm is frozen, so the base answered once
    assert {tuple(example.texts) for example in examples} == {("base", "full", "lora")}
    page = (folder / "report" / "index.html").read_text()
    section = page[page.index('<section id="generated">') :]
    assert "&lt;user&gt; w" in section
    assert "<user>" not in page
    assert len(re.findall("<dt>reference</dt>", section)) == 5


def test_train_says_which_answers_have_no_score(content, tmp_path, capsys):
    words = [f"{key}={value}" for key, value in content["settings"].items() if not key.startswith("confirm")]
    words = [word for word in words if not word.startswith(("data.answers.score", "model="))]
    words += ["data.answers.score={_target_: own.only_equal}", "data.answers.on_validation=true", "output=new"]
    assert run(["train", *words]) == DONE
    assert "`only_equal` raised ZeroDivisionError" in capsys.readouterr().err.splitlines()[-1]


def test_a_score_that_fails_later_costs_only_itself(content, tmp_path):
    settings = content["settings"] | {"data.answers.score": {"_target_": "own.only_equal"}, "confirm.seeds": 1}
    folder = lorasweep.run_sweep(content | {"settings": settings}, output=tmp_path / "new", progress=None).folder
    data = load_sweep_data(folder)
    assert data.evidence.means.keys() == {"full", "lora"}  # by the loss
    assert any("ZeroDivisionError" in problem for problem in data.problems)
    assert "ZeroDivisionError" in (folder / "report" / "index.html").read_text()

    settings |= {"confirm.metric": "only_equal"}
    folder = lorasweep.run_sweep(content | {"settings": settings}, output=tmp_path / "other", progress=None).folder
    for trial in read_sweep(folder).confirm:
        assert (trial.state, trial.test_scores) == ("failed", {})
        assert "ZeroDivisionError" in trial.reason
        of_run = read_run(folder / trial.run)
        assert of_run.test["bits_per_byte"] > 0
        assert "test_answers.csv" in of_run.files
        assert any((folder / trial.run / "best").iterdir())
