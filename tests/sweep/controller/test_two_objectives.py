"""A search with a second objective: which trials are proposed, run again and confirmed, and what may be changed."""

from __future__ import annotations

import json
import math
import random

import optuna
import pytest
from optuna.trial import TrialState, create_trial
from tests.sweep.conftest import Killed, kill_at
from tests.sweep.controller.conftest import Simulation, make_arm, outcome
from tests.sweep.controller.test_proposals import SAMPLERS, SPACE

from lorasweep.config.components import Component
from lorasweep.errors import ConfigError
from lorasweep.record import TrialRow, read_sweep
from lorasweep.results import load_sweep
from lorasweep.selection import find_winner, list_candidates, list_front
from lorasweep.sweep.controller import history as history_file
from lorasweep.sweep.controller.history import History
from lorasweep.sweep.controller.lifecycle import reopen_sweep
from lorasweep.sweep.controller.proposals import propose
from lorasweep.sweep.status import read_status, render_status

TWO = {"sweep.second_objective": "trainable_params", "pruner": "none"}
slow_gp = pytest.param("gp", marks=pytest.mark.slow)
ASKED = {**SAMPLERS, "nsga": Component(target="optuna.samplers.NSGAIISampler", arguments={"population_size": 4})}


def score(rank, lr):
    """A higher rank is better; the best learning rate is 0.01 at every rank."""
    return 1 / rank + (math.log10(lr) + 2) ** 2


@pytest.fixture
def two(content):
    """The simulated sweep with two objectives."""
    kept = {key: value for key, value in content["settings"].items() if not key.startswith("pruner")}
    content["settings"] = kept | TWO | {"sampler": "tpe"}
    return content


@pytest.fixture
def simulate(begin, open_controller):
    def run(content, *, folder="sweep", **options):
        controller = open_controller(begin(content, folder=folder))
        Simulation(controller, curve=curve, **options).run()
        controller.finish()
        found = outcome(controller), controller.sweep.record.trials
        controller.sweep.close()
        return found

    return run


def curve(assignment, step):
    return score(assignment.params["method.rank"], assignment.params["optim.lr"]) + 1 / step


def search(sampler, *, trials, seed=0, direction="minimize"):
    """Returns the trials of an arm, each of which ends before the next begins; some don't fit, run or fail."""
    arm = make_arm(SPACE, ASKED[sampler], trials=trials, seed=seed, second_objective="trainable_params")
    history = []
    for number in range(trials):
        params, kept = propose(arm, history, number=number, direction=direction)
        settings = {"params": params, "distributions": SPACE, "user_attrs": json.loads(json.dumps(kept))}
        rank, sign = params["method.rank"], 1 if direction == "minimize" else -1
        told = {
            3: {"state": TrialState.PRUNED, "constraints": {"memory": 1.0}, "intermediate_values": {2: 1.0}},
            4: {"state": TrialState.RUNNING, "intermediate_values": {2: 0.0}},
            5: {"state": TrialState.FAIL},
        }.get(number, {"values": [sign * score(rank, 10 * params["optim.lr"]), 1000.0 * rank]})
        history.append(create_trial(**settings, **told))
    return [trial.params for trial in history]


@pytest.mark.parametrize("sampler", ["tpe", slow_gp, "qmc", "random", "nsga"])
def test_every_sampler_proposes_the_same_again_after_trials_of_all_states(sampler):
    found = search(sampler, trials=10)
    assert search(sampler, trials=10) == found
    assert search(sampler, trials=10, seed=1) != found


@pytest.mark.parametrize("sampler", ["tpe", slow_gp, "nsga"])
def test_higher_scores_may_be_better(sampler):
    found = search(sampler, trials=10, direction="maximize")
    for mine, mirrored in zip(found, search(sampler, trials=10), strict=True):
        assert mine == pytest.approx(mirrored, rel=1e-6)


def test_a_sampler_sees_the_score_and_the_logarithm_of_the_cost_and_no_partial_results(monkeypatch):
    monkeypatch.setattr(history_file, "MAX_HISTORY_TRIALS", 4)
    point = {"method.rank": 1, "method.alpha_over_rank": 1, "optim.lr": 1e-3}

    def make(**told):
        return create_trial(params=point, distributions=SPACE, **told)

    values = [(3.0, 9.0), (9.0, 3.0), (4.0, 9.0), (9.0, 4.0), (5.0, 5.0), (8.0, 8.0), (7.0, 7.0)]
    running = make(state=TrialState.RUNNING, intermediate_values={2: 0.0})
    history = History(SPACE, [running, *(make(values=pair) for pair in values)], directions=["minimize", "minimize"])
    assert history.num_values == 7
    shown = [(trial.values[0], math.expm1(trial.values[1])) for trial in history.list_results()]
    # two of the Pareto front, which are the best, and the last two
    assert shown == [pytest.approx(values[i]) for i in (0, 4, 5, 6)]
    assert [trial.state for trial in history.list_running()] == [TrialState.RUNNING]


@pytest.mark.parametrize("sampler", ["tpe", slow_gp])
def test_the_order_of_slots_changes_nothing_and_the_front_is_found(simulate, two, sampler):
    two["settings"]["sampler"] = sampler
    two["arms"]["lora"]["trials"] = 12
    whole, rows = simulate(two, folder="whole")
    assert simulate(two, folder="shuffled", shuffle=random.Random(0)) == (whole, rows)
    assert [row.second_value for row in rows] == [1000.0 * row.params["method.rank"] for row in rows]
    assert all(row.state == "complete" for row in rows)
    by_rank = {rank: min(row.value for row in rows if row.params["method.rank"] == rank) for rank in (1, 2, 4, 8)}
    assert by_rank[1] > by_rank[2] > by_rank[4] > by_rank[8]  # so each rank's best is on the front


@pytest.mark.parametrize(("count", "after"), [(count, count % 2 == 0) for count in range(1, 60, 12)])
def test_a_controller_killed_at_any_write_ends_with_the_same_trials(
    begin, open_controller, resume, simulate, two, monkeypatch, count, after
):
    two["arms"]["lora"]["trials"] = 4
    whole, _ = simulate(two, folder="whole", slots=1)
    controller = open_controller(begin(two, folder="killed"))
    simulation = Simulation(controller, slots=1, curve=curve)
    kill_at(monkeypatch, controller.sweep.storage, count, after=after)
    try:
        simulation.run()
    except Killed:
        controller.sweep.close()
        controller = resume(controller.sweep.path)
        Simulation(controller, slots=1, steps=simulation.steps, curve=curve).run()
    assert outcome(controller) == whole
    controller.sweep.close()


@pytest.fixture
def made_up(three_arms, runs):
    """A sweep with all stages and made-up runs, in which each rank has a cost."""
    three_arms["settings"] |= TWO | {"confirm.seeds": 2, "confirm.candidates": 3, "confirm.select_seeds": 2}
    three_arms["settings"]["sampler"] = "tpe"
    runs.score = lambda config, step: score(getattr(config.method, "rank", 16), config.optim.lr) + 1 / (1 + step)
    return three_arms


def test_a_sweep_that_is_stopped_again_and_again_ends_as_if_it_was_not(begin, work, packs, made_up, finish):
    whole, stopped = (
        begin(made_up, "worker.pack_size=3", "confirm.seeds=1", folder=name) for name in ("whole", "stopped")
    )
    assert work(whole)
    assert not work(stopped, stop_at=2)
    assert finish(stopped.path, stop_at=12) > 1
    records = read_sweep(whole.path), read_sweep(stopped.path)
    for stage in ("trials", "select", "confirm"):
        assert getattr(records[0], stage) == getattr(records[1], stage)


def test_both_values_are_in_the_study_the_table_of_trials_and_the_status(begin, work, packs, made_up):
    folder = begin(made_up)
    assert work(folder)
    result = load_sweep(folder.path)
    study = result.study("lora")
    assert study.directions == [optuna.study.StudyDirection.MINIMIZE] * 2
    assert study.metric_names == ["bits_per_byte", "trainable_params"]
    table = result.trials_dataframe()
    lora = table[table.arm == "lora"]
    assert [trial.values for trial in study.trials] == lora[["bits_per_byte", "trainable_params"]].to_numpy().tolist()
    assert [*lora.trainable_params] == [1000.0 * rank for rank in lora["method.rank"]]
    front = {
        trial.number for trial in list_front((t for t in result.record.trials if t.arm == "lora"), record=result.record)
    }
    assert front == {trial.number for trial in study.best_trials}
    (title, *_) = render_status(read_status(folder.path)).renderables
    assert "bits_per_byte (minimize) and trainable_params (minimize)" in title.plain


def test_the_front_runs_again_before_better_trials_and_the_best_mean_wins(begin, work, packs, made_up):
    folder = begin(made_up, "arms.lora.trials=12")
    assert work(folder)
    record = read_sweep(folder.path)
    lora = [row for row in record.trials if row.arm == "lora"]
    front = list_front(lora, record=record)
    assert len(front) == 3  # one of each rank
    assert {row.trial for row in record.select if row.arm == "lora"} == {row.number for row in front}
    assert {row.trial for row in record.confirm if row.arm == "lora"} == {front[0].number}
    # every trial of `full` has the same cost, so its front is one trial, and the next best scores run again too
    full = sorted((row for row in record.trials if row.arm == "full"), key=lambda row: row.value)
    assert {row.trial for row in record.select if row.arm == "full"} == {row.number for row in full[:3]}


def test_candidates_are_the_front_and_then_the_best_scores_and_the_best_score_is_first():
    values = [(1.0, 8.0), (1.1, 8.0), (1.0, 4.0), (3.0, 1.0), (2.0, 4.0), (1.05, 8.0)]
    rows = [
        TrialRow(arm="a", number=n, state="complete", params={"n": n}, value=one, second_value=cost, run="r")
        for n, (one, cost) in enumerate(values)
    ]
    record = type("Record", (), {"direction": "minimize", "second_objective": "trainable_params", "select": []})()
    record.candidates = 4
    assert [row.number for row in list_candidates(rows, record=record)] == [2, 3, 0, 5]
    assert find_winner("a", rows, record=record).number == 2
    assert [row.number for row in list_front(rows, record=record)] == [2, 3]
    record.direction = "maximize"
    assert [row.number for row in list_front(rows, record=record)] == [3]


def test_other_objectives_are_refused_once_the_sweep_has_begun_and_it_may_grow(begin, work, packs, made_up):
    folder = begin(made_up)
    assert work(folder)
    for other in ("none", "tokens_trained"):
        match = r"`sweep.second_objective` must stay 'trainable_params'.*" + other + r".*Start a new sweep\.$"
        with pytest.raises(ConfigError, match=match):
            reopen_sweep(folder.path, changes={"sweep.second_objective": other})
    before = read_sweep(folder.path).trials
    assert work(reopen_sweep(folder.path, changes={"arms.lora.trials": 25}))
    record = read_sweep(folder.path)
    assert record.trials[: len(before)] == before
    grown = [row for row in record.trials if row.arm == "lora"]
    assert len(grown) == 25
    assert all(row.second_value == 1000 * row.params["method.rank"] for row in grown)
    assert record.arms[-1].importance.keys() == {"method.rank", "optim.lr"}  # of the score


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("pruner=halving",), r"`pruner` must be `none` with `sweep.second_objective=trainable_params`.*'halving'"),
        (("pruner._target_=optuna.pruners.MedianPruner",), r"`pruner` must be `none`"),
        (("arms.lora.sweep.second_objective=none",), r"`sweep.second_objective` must be the same for all arms"),
        (("sweep.second_objective=wall_s",), r"trainable_params.*tokens_trained.*'wall_s'"),
    ],
)
def test_objectives_that_cannot_be_are_refused_in_one_sentence(begin, made_up, overrides, message):
    with pytest.raises(ConfigError, match=message):
        begin(made_up, *overrides)


def test_tokens_are_a_cost_too(begin, work, runs, made_up):
    folder = begin(made_up, "sweep.second_objective=tokens_trained", "confirm.seeds=0")
    assert work(folder)
    assert {row.second_value for row in read_sweep(folder.path).trials} == {0.0}  # made-up runs train on no tokens
