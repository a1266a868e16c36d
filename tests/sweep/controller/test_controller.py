"""The controller decides jointly, reversibly and repeatably, whatever the order of slots and wherever it is killed."""

import random
import time

import optuna
import pytest
from tests.sweep.conftest import Killed, kill_at
from tests.sweep.controller.conftest import EVERY, Simulation, outcome, resume

from lorasweep.errors import Diverged
from lorasweep.sweep.controller.controller import Controller
from lorasweep.sweep.controller.lifecycle import reopen_sweep


def close(controller):
    controller.sweep.close()


@pytest.fixture
def simulate(begin):
    def run(content, *, folder="sweep", constant_answer=None, **options):
        controller = Controller(begin(content, folder=folder, constant_answer=constant_answer))
        Simulation(controller, **options).run()
        found = outcome(controller)
        close(controller)
        return found

    return run


@pytest.mark.parametrize("pruner", ["halving", "none"])
def test_neither_the_order_of_slots_nor_the_clock_changes_anything(simulate, content, monkeypatch, pruner):
    content["settings"] = {k: v for k, v in content["settings"].items() if not k.startswith("pruner")}
    content["settings"] |= {"pruner": pruner}
    whole = simulate(content, folder="whole")
    delays, clock = random.Random(0), [0.0]

    def now():
        clock[0] += delays.expovariate(0.01)  # 100 seconds on average between any two looks at the clock
        return clock[0]

    monkeypatch.setattr(time, "monotonic", now)
    assert simulate(content, folder="shuffled", shuffle=random.Random(0)) == whole


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_resumed_sweep_decides_by_the_constant_answer_and_the_losses(begin, content, is_killed):
    content["settings"] |= {"sampler": "qmc"}
    controller = Controller(begin(content, constant_answer=5.0))
    pack = [controller.take() for _ in range(6)]
    evaluations = [
        (a, EVERY, 5.0 + a.trial.number) for a in pack
    ]  # the first trial is best by the metric, the last by loss
    losses = {a: 1.0 - 0.1 * a.trial.number for a in pack}
    expected = [False, False, False, False, True, True]
    if not is_killed:
        assert controller.report(evaluations, losses=losses) == expected
    else:
        trials = controller.search.arms["lora"]
        for assignment, step, value in evaluations[:3]:
            trials.store(trials.trials[assignment.trial.number], step, value, loss=losses[assignment])
    close(controller)
    again = resume(controller.sweep.path)
    pack = [again.take() for _ in range(6)]
    evaluations = [(a, EVERY, 5.0 + a.trial.number) for a in pack]
    assert again.report(evaluations, losses={a: 1.0 - 0.1 * a.trial.number for a in pack}) == expected
    close(again)


@pytest.mark.parametrize(("unlearned", "is_warned"), [(3, False), (4, True)])
def test_a_search_whose_trials_have_learned_nothing_says_so_once(begin, content, unlearned, is_warned):
    content["settings"] |= {"sampler": "qmc", "pruner.min_survivors": 7}
    controller = Controller(begin(content, constant_answer=5.0))
    before = list(controller.sweep.record.warnings)
    pack = [controller.take() for _ in range(6)]
    values = [9.0] * unlearned + [1.0] * (6 - unlearned)
    evaluations = [(a, EVERY, value) for a, value in zip(pack, values, strict=True)]
    controller.report(evaluations[:3])
    assert controller.sweep.record.warnings == before  # three trials are too few
    controller.report(evaluations[3:])
    found = controller.sweep.record.warnings[len(before) :]
    assert len(found) == is_warned
    if is_warned:
        for part in ("trials of `lora`", "5.000", "trainer.max_steps", "optim.lr"):
            assert part in found[0]
    close(controller)
    again = resume(controller.sweep.path)
    assert again.sweep.record.warnings[len(before) :] == found
    again.report([(again.take(), 2 * EVERY, 1.0)])
    assert again.sweep.record.warnings == before  # a trial has learned since
    close(again)


def test_a_paused_trial_goes_on_when_it_comes_into_the_better_part(begin, content):
    content["settings"] |= {"sampler": "qmc", "pruner.rungs": [0.17]}
    controller = Controller(begin(content))
    # Of three trials the first goes on at first; the second follows when three worse ones have come.
    first = [controller.take() for _ in range(3)]
    assert controller.report([(a, EVERY, float(i)) for i, a in enumerate(first)]) == [True, False, False]
    simulation = Simulation(controller, curve=lambda a, step: 9.0)
    for assignment in first[1:]:
        controller.tell(assignment, simulation.record(assignment, EVERY, "paused"))
    others = [controller.take() for _ in range(3)]
    assert [a.trial.number for a in others] == [3, 4, 5]
    assert controller.report([(a, EVERY, 10.0 + a.trial.number) for a in others]) == [False, False, False]
    assert controller.take().trial.number == 1
    close(controller)


def test_an_adaptive_sampler_proposes_half_before_all_of_them_are_compared(begin, content):
    controller = Controller(begin(content))
    first = list(iter(controller.take, None))
    assert len(first) == 4
    simulation = Simulation(controller)
    simulation.advance(first[1:])
    assert controller.take() is None  # one of them has no value of the first rung
    simulation.advance(first[:1])
    assert len({a.trial.number for a in iter(controller.take, None)} - {a.trial.number for a in first}) == 4
    close(controller)


@pytest.mark.parametrize(("count", "after"), [(count, count % 2 == 0) for count in range(1, 60, 5)])
def test_a_controller_killed_at_any_write_ends_with_the_same_trials(
    begin, simulate, content, monkeypatch, count, after
):
    content["arms"]["lora"]["trials"] = 4
    whole = simulate(content, folder="whole", slots=1)
    controller = Controller(begin(content, folder="killed"))
    simulation = Simulation(controller, slots=1)
    kill_at(monkeypatch, controller.sweep.storage, count, after=after)
    try:
        simulation.run()
    except Killed:
        close(controller)
        controller = resume(controller.sweep.path)
        Simulation(controller, slots=1, steps=simulation.steps).run()
    assert outcome(controller) == whole
    close(controller)


def test_a_trial_that_somebody_else_added_to_the_study_is_left_out(begin, content):
    sweep = begin(content)
    sweep.open_study("lora").ask({"optim.lr": optuna.distributions.FloatDistribution(1e-3, 1e-1, log=True)})
    sweep.close()
    controller = resume(sweep.path)
    Simulation(controller).run()
    assert sorted(controller.search.arms["lora"].trials) == list(range(1, 9))
    close(controller)


def test_a_restarted_controller_leaves_a_promoted_trial_to_the_worker_that_trains_it(begin, content):
    content["settings"] |= {"sampler": "qmc", "pruner.rungs": [0.17]}
    first = Controller(begin(content), session="s")
    pack = [first.take(worker="s-1", request=number) for number in range(6)]
    values = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    assert first.report([(a, EVERY, v) for a, v in zip(pack, values, strict=True)]) == [False] * 4 + [True] * 2
    simulation = Simulation(first)
    for assignment in pack[:4]:
        first.tell(assignment, simulation.record(assignment, EVERY, "paused"))
    for assignment in pack[4:]:  # so that the best of the others goes on
        first.tell_failure(assignment, Diverged("the loss became NaN."))
    promoted = first.take(worker="s-1", request=7)
    assert promoted.trial.number == 3
    close(first)
    second = Controller(reopen_sweep(first.sweep.path), session="s")
    assert second.take(worker="s-2", request=1).trial.number != 3
    assert second.report([(promoted, 2 * EVERY, 3.0)]) == [True]
    close(second)
