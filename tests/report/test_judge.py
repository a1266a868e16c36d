"""Verdicts on scores of runs that were trained elsewhere."""

import json
import random
import re
from pathlib import Path

import pandas
import pytest

import lorasweep
from lorasweep.errors import ConfigError
from lorasweep.record import TEST_SCORES_FILE, read_sweep
from lorasweep.report.evidence.evidence import answer_sweep, read_confirm_scores

from .conftest import build_rank_sweep


def make_scores(means, *, seeds=5, noise=0.004, examples=0):
    """Returns a table of accuracies: `means` by arm, plus the noise of each seed, which all arms share."""
    rng = random.Random(3)
    common = [rng.gauss(0, noise) for _ in range(seeds)]
    rows = []
    for arm, mean in means.items():
        for seed in range(seeds):
            score = mean + common[seed] + rng.gauss(0, noise / 10)
            for example in range(examples) or [None]:
                of_example = {} if example is None else {"example": example, "group": example // 2}
                rows.append({"arm": arm, "seed": seed, "score": score, **of_example})
    return pandas.DataFrame(rows)


def judge(scores, **settings):
    given = {"margin": 0.01, "maximize": True, "metric": "accuracy", **settings}
    return {answer.subject: answer for answer in lorasweep.judge(scores, **given).answers}


@pytest.mark.parametrize("examples", [0, 20])
def test_arms_are_compared_with_the_reference_on_the_same_seeds(examples):
    means = {"full": 0.85, "lora": 0.851, "bitfit": 0.80, "dora": 0.88, "frozen": 0.5}
    answers = judge(make_scores(means, examples=examples))
    verdicts = {name: answer.verdict for name, answer in answers.items()}
    assert verdicts == {"lora": "equivalent", "bitfit": "worse", "dora": "better"}
    assert answers["bitfit"].value == pytest.approx(-0.05, abs=0.002)
    assert judge(make_scores(means), maximize=False)["bitfit"].verdict == "better"
    shares = judge(make_scores(means), margin="5%")
    assert shares["lora"].value == pytest.approx(0.351 / 0.35, abs=0.01)
    assert judge(make_scores(means), reference="bitfit")["full"].verdict == "better"


def test_one_seed_is_never_a_verdict_and_one_run_of_the_base_counts_for_every_seed():
    answer = judge(make_scores({"full": 0.9, "lora": 0.5}, seeds=1))["lora"]
    assert (answer.verdict, answer.num_seeds) == ("open", 1)
    scores = make_scores({"full": 0.85, "lora": 0.851, "frozen": 0.5})
    found = lorasweep.judge(scores[(scores["arm"] != "frozen") | (scores["seed"] == 0)], margin="5%", maximize=True)
    assert found.answers[0].verdict == "equivalent"
    assert "`frozen` has one run, whose score counts for every seed." in found.notes


def test_a_sweep_of_ours_gets_its_own_verdicts(tmp_path):
    folder = build_rank_sweep(tmp_path, {1: 1.8, 4: 1.67, 16: 1.662}, examples=40)
    sweep = read_sweep(folder)
    rows = []
    for one in sweep.confirm:
        arm = next(arm for arm in sweep.arms if arm.name == one.arm)
        examples = pandas.read_csv(folder / one.run / TEST_SCORES_FILE)
        value = one.params.get(arm.key) if arm.key else None
        named = {"row": "example"}
        rows.append(examples.rename(columns=named).assign(arm=one.arm, seed=one.seed, value=value))
    found = lorasweep.judge(
        pandas.concat(rows),
        margin=sweep.margin,
        maximize=False,
        key="rank",
        looks=sweep.looks,
        metric=sweep.search_metric.name,
    )
    expected = [one for one in answer_sweep(sweep, read_confirm_scores(sweep, folder)) if one.name != "pair"]

    def list_verdicts(answers):
        return sorted((one.name, one.subject, one.verdict, round(one.value, 6), one.num_seeds) for one in answers)

    assert len(found.answers) > 3
    assert list_verdicts(found.answers) == list_verdicts(expected)


def test_the_guides_table_of_the_trainers_runs_is_judged(here):
    for arm, score in (("lora-r8", 0.85), ("lora-r1", 0.6), ("full-r0", 0.85)):
        for seed in range(3):
            folder = here / "runs" / arm / str(seed)
            folder.mkdir(parents=True)
            log = [{"eval_accuracy": 0.5}, {"eval_accuracy": score + seed / 1000}, {"loss": 1.0}]
            (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    page = (Path(__file__).parents[2] / "docs" / "evidence.md").read_text(encoding="utf-8")
    names = {}
    exec(compile(re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)[1], "evidence.md", "exec"), names)
    found = names["result"]
    verdicts = {answer.subject: answer.verdict for answer in found.answers if answer.name == "as_good_as_full"}
    assert verdicts == {"lora-rank-8": "equivalent", "lora-rank-1": "worse"}


def test_printing_shows_the_table_and_the_notes():
    shown = str(lorasweep.judge(make_scores({"full": 0.85, "lora": 0.85}), margin=0.01, maximize=True))
    assert re.search(r"as_good_as_full +lora +full +equivalent", shown)
    assert "Intervals are over seeds alone" in shown


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda rows: rows.drop(columns="seed"), {}, "columns arm, seed and score, but lack seed"),
        (lambda rows: rows, {"reference": "fulll"}, "`reference`.* must be one of full or lora, but got 'fulll'"),
        (lambda rows: pandas.concat([rows, rows]), {}, "several with arm full, seed 0. If they differ in a setting"),
        (lambda rows: rows.assign(score=float("nan")), {}, "row 1 must have a finite number as its score"),
        (lambda rows: rows.assign(weight=-1.0), {}, "row 1 must have a finite number as its weight"),
        (lambda rows: rows.assign(weight=0.0), {}, "must have a positive sum"),
        (lambda rows: rows.assign(seed=float("nan")), {}, "must have an arm and a seed"),
        (lambda rows: rows, {"looks": [0, 3]}, "at least 1, but got"),
        (lambda rows: rows, {"margin": "5%"}, "no arm is named by `base`"),
        *((lambda rows: rows, {"margin": margin}, "`margin` must be a positive") for margin in ("wide", "nan")),
        (lambda rows: rows[rows["arm"] == "full"], {}, "another arm beside full"),
    ],
)
def test_wrong_scores_are_refused_in_one_sentence(change, settings, message):
    with pytest.raises(ConfigError, match=message):
        judge(change(make_scores({"full": 0.9, "lora": 0.9})), **settings)
