"""The controller proposes and stops alike, whatever the number, the order and the speed of workers."""

import random
import time

import optuna
import pytest
from tests.sweep.controller.conftest import Simulation, outcome

from lorasweep.sweep.controller.controller import Controller

HALF = 6


@pytest.fixture
def open_controller(begin):
    """Opens controllers, and closes them after the test."""
    opened = []

    def make(content, **others):
        opened.append(Controller(begin(content, **others)))
        return opened[-1]

    yield make
    for controller in opened:
        controller.sweep.close()


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_neither_workers_nor_their_order_nor_the_clock_change_a_sweep(open_controller, content, sampler, monkeypatch):
    content["settings"] |= {"sampler": sampler}
    delays, clock, found = random.Random(0), [0.0], []

    def now():
        clock[0] += delays.expovariate(0.01)  # 100 seconds on average between any two looks at the clock
        return clock[0]

    for number, (slots, pick) in enumerate([(1, None), (8, None), (3, random.Random(1)), (3, random.Random(2))]):
        controller = open_controller(content, folder=f"sweep{number}")
        Simulation(controller, slots=slots, pick=pick).run()
        found.append(outcome(controller))
        monkeypatch.setattr(time, "monotonic", now)
    assert all(trials == found[0] for trials in found)


def test_trials_of_a_language_model_wait_for_the_frozen_base_and_are_stopped_if_no_better(open_controller, content):
    content["settings"] |= {"sampler": "qmc"}
    content["arms"] = {"lora": content["arms"]["lora"], "frozen": {"settings": {"method": "frozen"}}}
    controller = open_controller(content)
    base = controller.take(worker="1")
    assert base.arm.name == "frozen"
    assert controller.take(worker="2") is None
    simulation = Simulation(controller)
    simulation.score = lambda assignment, step: 5.0
    controller.report([(base, 0, {"bits_per_byte": 5.0})])
    simulation.tell(base, 0, "complete")
    worse, better = controller.take(worker="2"), controller.take(worker="2")
    reasons = controller.report(
        [(worse, HALF, {"bits_per_byte": 5.1, "loss": 1.0}), (better, HALF, {"bits_per_byte": 4.9, "loss": 9.0})]
    )
    assert [reason is not None for reason in reasons] == [True, False]


def test_a_trial_that_somebody_else_added_to_the_study_is_left_out(begin, content):
    sweep = begin(content)
    sweep.open_study("lora").ask({"optim.lr": optuna.distributions.FloatDistribution(1e-3, 1e-1, log=True)})
    controller = Controller(sweep)
    Simulation(controller).run()
    assert sorted(controller.search.arms["lora"].trials) == list(range(1, 9))
    sweep.close()


def test_the_trials_of_a_dead_worker_are_handed_out_first(open_controller, content):
    content["settings"] |= {"sampler": "qmc"}
    controller = open_controller(content)
    lost, other = controller.take(worker="1"), controller.take(worker="2")
    controller.release_worker("1")
    assert controller.take(worker="3").trial.number == lost.trial.number
    assert controller.take(worker="3").trial.number not in (lost.trial.number, other.trial.number)
