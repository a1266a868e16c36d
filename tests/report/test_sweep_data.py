"""A sweep's records are joined by subject, and whatever can't be read is a sentence."""

import pytest
from tests.files import edit_json

from lorasweep.report.sweep_data import load_sweep_data

from .conftest import build_rank_sweep


def test_trials_and_reruns_are_joined_with_their_runs(confirmed):
    edit_json(confirmed / "sweep.json", lambda raw: raw["confirm"].reverse())
    data = load_sweep_data(confirmed)
    assert [(arm.name, len(arm.trials), len(arm.confirm_runs)) for arm in data.subjects] == [
        ("frozen", 1, 1),
        ("lora", 18, 5),
        ("full", 6, 5),
    ]
    assert all((t.record.arm, t.record.trial) == (t.arm, t.number) for t in data.trials if t.record)
    assert [run.seed for run in data.subjects[1].confirm_runs] == [0, 1, 2, 3, 4]
    assert all(rerun.record and rerun.is_complete for rerun in data.confirm_runs)
    assert (data.evidence.scores.num_examples, data.evidence.scores.num_groups, data.problems) == (40, 20, ())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "must contain run.json"),
        ("{", "damaged"),
        ('{"format": "lorasweep.run", "version": 1}', "damaged"),
    ],
)
def test_run_that_cannot_be_read_is_a_sentence_and_its_trial_stays(sweep, content, sentence):
    path = sweep / "runs/full-0002/run.json"
    path.unlink() if content is None else path.write_text(content)
    data = load_sweep_data(sweep)
    (problem,) = data.problems
    assert sentence in problem
    assert data.subjects[2].trials[2].record is None
    assert data.subjects[2].trials[2].search_score is not None


def test_arm_without_a_rerun_is_named_and_the_others_are_compared(confirmed):
    def drop(raw):
        raw["confirm"] = [row for row in raw["confirm"] if row["arm"] != "full"]

    edit_json(confirmed / "sweep.json", drop)
    data = load_sweep_data(confirmed)
    assert data.problems == ("`full` has no score on test data.",)
    assert list(data.evidence.means) == ["frozen", "lora"]
    assert [answer.verdict for answer in data.evidence.answers] == ["open"]


def test_each_value_of_confirm_each_is_an_entry_with_its_trials_and_runs(tmp_path):
    data = load_sweep_data(build_rank_sweep(tmp_path, {16: 1.68, 1: 1.75}, seeds=3))

    assert [arm.name for arm in data.subjects] == ["frozen", "full", "lora-rank-1", "lora-rank-16"]
    one, sixteen = data.subjects[2:]
    assert [one.subject.value, sixteen.subject.value] == [1, 16]
    assert {trial.params["method.rank"] for trial in one.trials} == {1}
    assert [run.seed for run in sixteen.confirm_runs] == [0, 1, 2]
    assert len(data.list_trials("lora")) == len(one.trials) + len(sixteen.trials)
    assert len({trial.run for trial in data.trials}) == len(data.trials)
