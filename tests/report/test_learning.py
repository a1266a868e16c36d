"""A sweep that learned nothing says so first, and recommends nothing."""

import io
import json
import math

import pytest
from rich.console import Console
from tests.files import edit_json

from lorasweep.errors import RecordError
from lorasweep.report.caveats import judge_learning
from lorasweep.report.recommend import find_recommended_run, read_recommended
from lorasweep.report.sweep_data import load_sweep_data
from lorasweep.report.terminal import render_terminal
from lorasweep.report.text import list_warnings

from .conftest import BASE_SCORE, confirm_winners, report

MAJORITY = 0.69


def classify(sweep, accuracy):
    """Makes a sweep one of a classifier, with an accuracy for each trial."""
    scores = {}

    def change_sweep(raw):
        raw.update(search_metric={"name": "accuracy", "direction": "maximize"}, margin=0.01)
        for trial in (trial for trial in raw["trials"] if trial["search_score"] is not None):
            trial["search_score"] = scores[trial["run"]] = accuracy(trial)

    def change_run(raw, score):
        raw.update(metric="accuracy", direction="maximize", best={"accuracy": score} if score else {})
        constant = {"accuracy": MAJORITY, "f1": 0.0, "matthews": 0.0, "loss": 0.62}
        raw["data"] = {split: {"examples": 500, "constant_answer": constant} for split in ("validation", "test")}

    edit_json(sweep / "sweep.json", change_sweep)
    confirm_winners(sweep)
    for run in sweep.glob("runs/*"):
        score = scores.get(f"runs/{run.name}")
        edit_json(run / "run.json", lambda raw, score=score: change_run(raw, score))
        (run / "test_scores.csv").unlink(missing_ok=True)
    return sweep


def test_trials_that_score_like_the_majority_class_are_the_headline_everywhere(sweep):
    findings = report(classify(sweep, lambda trial: MAJORITY))
    headline = "Nothing learned: no trial is better than the majority class (0.690)."
    assert json.loads((sweep / "report/summary.json").read_text())["headline"] == headline
    page = (sweep / "report/index.html").read_text()
    assert f"<h2>{headline}</h2>" in page
    assert page.index(headline) < page.index("<nav")
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(render_terminal(findings))
    assert console.export_text().startswith(headline)


def test_what_the_longer_answer_scores_is_said_once_and_a_damaged_record_does_not_matter(sweep):
    facts = {"longer_accuracy": 0.61, "chosen_tokens": 30.4, "rejected_tokens": 20.6}
    runs = sorted(sweep.glob("runs/*/run.json"))
    for number, run in enumerate(runs):
        shown = facts | ({"chosen_tokens": "many"} if number == 0 else {})
        edit_json(run, lambda raw, shown=shown: raw["data"].update(validation={"examples": 9, **shown}))
    found = [text for text in list_warnings(report(sweep)) if "longer answer" in text]
    assert len(found) == 1
    assert all(word in found[0] for word in ("0.610 on validation data", "30 scored tokens", "rejected ones 21"))


def test_an_arm_that_learned_nothing_beside_one_that_did_is_a_warning(sweep):
    classify(sweep, lambda trial: 0.8 if trial["arm"] == "lora" else MAJORITY)
    findings = report(sweep)
    assert (findings.learning.state, findings.learning.failed) == ("learned", ("full",))
    warning, *_ = list_warnings(findings)
    assert warning == "`full` learned nothing: no trial is better than the majority class (0.690)."
    assert warning in json.loads((sweep / "report/summary.json").read_text())["warnings"]
    page = (sweep / "report/index.html").read_text()
    assert '<li class="problem"><code>full</code> learned nothing' in page
    assert 'id="failure"' not in page


def set_test_scores(sweep, score):
    def change(raw):
        for row in raw["confirm"]:
            (old,) = row["test_scores"].values()
            name = raw["search_metric"]["name"]
            row["test_scores"] = {name: old if row["arm"] == "frozen" else score(row["seed"])}

    edit_json(sweep / "sweep.json", change)


def test_gains_that_test_data_do_not_show_are_said(confirmed):
    assert judge_learning(load_sweep_data(confirmed)).state == "learned"
    set_test_scores(confirmed, lambda seed: BASE_SCORE + 0.1 * (seed - 2))
    findings = report(confirmed)
    assert findings.learning.state == "not shown"
    summary = json.loads((confirmed / "report/summary.json").read_text())
    assert "on test data no method is shown to be better than the frozen base" in summary["headline"]
    # nothing is recommended: no settings, and no command that trains or exports them
    assert summary["recommended"] == []
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(render_terminal(findings, verbose=True))
    for text in (console.export_text(), (confirmed / "report/index.html").read_text().partition("<nav")[0]):
        assert "--from" not in text
        assert "export" not in text
    assert {answer.missing for answer in findings.answers} <= {"not learned", "no rank"}
    with pytest.raises(RecordError, match="must be a sweep that learned something"):
        read_recommended(confirmed)
    # who names an arm exports it nevertheless, with a warning
    run, said = find_recommended_run(confirmed / "lora")
    assert run.parent == confirmed / "runs"
    assert "WARNING: nothing is shown to be learned" in said


def test_dpo_that_hardly_left_the_loss_of_its_base_is_a_warning(confirmed):
    losses = {"lora": 0.69, "full": 0.31, "frozen": math.log(2)}

    def change(raw):
        for row in raw["confirm"]:
            row["test_scores"] |= {"loss": losses[row["arm"]], "chosen_shift": 0.0}

    edit_json(confirmed / "sweep.json", change)
    (warning,) = (text for text in list_warnings(report(confirmed)) if text.startswith("Hardly trained"))
    assert all(part in warning for part in ("0.690 for `lora`", "0.693 without training"))
    assert "`full`" not in warning


@pytest.mark.parametrize(("spread", "is_shown"), [(0.01, True), (0.1, False)])
def test_test_scores_are_compared_with_the_majority_class_of_test_data(confirmed, spread, is_shown):
    classify(confirmed, lambda trial: 0.72)
    set_test_scores(confirmed, lambda seed: 0.75 + spread * (seed - 2))
    learning = judge_learning(load_sweep_data(confirmed))
    assert learning.state == ("learned" if is_shown else "not shown")
    report(confirmed)
    marked = "shown to be better than the majority class" in (confirmed / "report/index.html").read_text()
    assert marked is not is_shown
