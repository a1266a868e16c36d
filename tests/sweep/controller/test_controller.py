"""The controller proposes and stops alike, whatever the number and the order of workers, and wherever it is killed."""

import random
import time

import optuna
import pytest
from tests.sweep.conftest import Killed, kill_at
from tests.sweep.controller.conftest import EVERY, LAST, Simulation, outcome, resume

from lorasweep.sweep.controller.controller import Controller
from lorasweep.sweep.controller.lifecycle import reopen_sweep

HALF = LAST // 2


def close(controller):
    controller.sweep.close()


@pytest.fixture
def simulate(begin):
    def run(content, *, folder="sweep", constant_answer=None, **options):
        controller = Controller(begin(content, folder=folder, constant_answer=constant_answer or {}))
        Simulation(controller, **options).run()
        found = outcome(controller)
        close(controller)
        return found

    return run


def test_neither_the_order_of_slots_nor_the_clock_changes_anything(simulate, content, monkeypatch):
    whole = simulate(content, folder="whole")
    delays, clock = random.Random(0), [0.0]

    def now():
        clock[0] += delays.expovariate(0.01)  # 100 seconds on average between any two looks at the clock
        return clock[0]

    monkeypatch.setattr(time, "monotonic", now)
    assert simulate(content, folder="shuffled", shuffle=random.Random(0)) == whole


@pytest.mark.parametrize("sampler", ["gp", "tpe", "random"])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_any_number_of_trials_at_once_gives_the_same_sweep(simulate, content, sampler, slots):
    content["settings"] |= {"sampler": sampler}
    few = simulate(content, folder="few", slots=2)
    assert simulate(content, folder="many", slots=slots) == few


@pytest.mark.parametrize("seed", range(3))
def test_workers_that_end_in_any_order_give_the_same_sweep(simulate, content, seed):
    one = simulate(content, folder="one", slots=1)
    # each worker trains one trial, and a random one of them reports next
    assert simulate(content, folder="three", slots=3, pick=random.Random(seed)) == one


def test_a_trial_that_has_learned_nothing_at_half_is_stopped(begin, content):
    content["settings"] |= {"sampler": "qmc"}
    controller = Controller(begin(content, constant_answer={"bits_per_byte": 5.0, "loss": 1.0}))
    pack = [controller.take() for _ in range(4)]
    scores = [(5.0, 1.0), (6.0, 2.0), (4.0, 2.0), (6.0, 0.5)]
    for step in (EVERY, HALF):
        reasons = controller.report(
            [
                (assignment, step, {"bits_per_byte": value, "loss": loss})
                for assignment, (value, loss) in zip(pack, scores, strict=True)
            ]
        )
        assert [reason is not None for reason in reasons] == (
            [True, True, False, False] if step == HALF else [False] * 4
        )
    assert all("has learned nothing" in reason for reason in reasons[:2])
    simulation = Simulation(controller)
    for assignment, reason in zip(pack[:2], reasons[:2], strict=True):
        controller.tell(assignment, simulation.record(assignment, HALF, "stopped", reason=reason))
    close(controller)
    again = resume(controller.sweep.path)
    trials = again.search.arms["lora"].trials
    assert [(trials[n].state, trials[n].reason) for n in range(2)] == [("stopped", reasons[n]) for n in range(2)]
    assert [trials[n].state for n in (2, 3)] == ["running"] * 2
    close(again)


def test_trials_of_a_language_model_wait_for_the_frozen_base_and_are_stopped_if_no_better(begin, content):
    content["settings"] |= {"sampler": "qmc"}
    content["arms"] = {"lora": content["arms"]["lora"], "frozen": {"settings": {"method": "frozen"}}}
    controller = Controller(begin(content), session="s")
    # as in a sweep that got the frozen arm after others had begun
    assert controller.search.find_untrained_scores(controller.search.arms["lora"].arm) == {}
    base = controller.take(worker="s-1", request=1)
    assert base.arm.name == "frozen"
    assert controller.take(worker="s-2", request=1) is None
    controller.report([(base, 0, {"bits_per_byte": 5.0})])
    controller.tell(base, Simulation(controller, curve=lambda a, step: 5.0).record(base, 0, "complete"))
    worse, better = (controller.take(worker="s-2", request=number) for number in (2, 3))
    reasons = controller.report(
        [(worse, HALF, {"bits_per_byte": 5.1, "loss": 1.0}), (better, HALF, {"bits_per_byte": 4.9, "loss": 9.0})]
    )
    assert [reason is not None for reason in reasons] == [True, False]
    close(controller)


@pytest.mark.parametrize(("count", "after"), [(count, count % 2 == 0) for count in range(1, 40, 4)])
def test_a_controller_killed_at_any_write_ends_with_the_same_trials(
    begin, simulate, content, monkeypatch, count, after
):
    content["arms"]["lora"]["trials"] = 4
    answer = {"bits_per_byte": 1 / HALF + 0.016}  # some trials are stopped
    whole = simulate(content, folder="whole", slots=1, constant_answer=answer)
    assert {state for _, _, _, state, _ in whole} == {"complete", "stopped"}
    controller = Controller(begin(content, folder="killed", constant_answer=answer))
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


def test_a_restarted_controller_leaves_a_trial_to_the_worker_that_trains_it(begin, content):
    content["settings"] |= {"sampler": "qmc"}
    first = Controller(begin(content), session="s")
    held = first.take(worker="s-1", request=1)
    close(first)
    second = Controller(reopen_sweep(first.sweep.path), session="s")
    assert second.take(worker="s-2", request=1).trial.number != held.trial.number
    assert second.report([(held, EVERY, {"bits_per_byte": 3.0})]) == [None]
    close(second)
