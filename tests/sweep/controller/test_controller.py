"""The controller proposes, packs and stops alike, whatever the order and the speed of workers."""

import random
import time
from contextlib import suppress

import optuna
import pytest
from optuna.storages import JournalStorage
from tests.sweep.conftest import Killed
from tests.sweep.controller.conftest import Simulation, outcome

from lorasweep.record import read_sweep
from lorasweep.sweep.controller.controller import Controller
from lorasweep.sweep.controller.folder import find_checkpoint
from lorasweep.sweep.controller.lifecycle import reopen_sweep

HALF = 6


@pytest.fixture
def open_controller(begin):
    """Opens controllers, and closes them after the test."""
    opened = []

    def make(content, num_workers=None, **others):
        opened.append(Controller(begin(content, **others), num_workers=num_workers))
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

    ways = [(1, 1, None), (8, 1, None), (3, 3, random.Random(1)), (3, 3, random.Random(2))]
    for number, (slots, workers, pick) in enumerate(ways):
        controller = open_controller(content, folder=f"sweep{number}")
        Simulation(controller, slots=slots, workers=workers, pick=pick).run()
        found.append(outcome(controller))
        monkeypatch.setattr(time, "monotonic", now)
    assert all(trials == found[0] for trials in found)


def test_trials_of_a_language_model_wait_for_the_frozen_base_and_are_stopped_if_no_better(open_controller, content):
    content["settings"] |= {"sampler": "qmc"}
    content["arms"] = {"lora": content["arms"]["lora"], "frozen": {"settings": {"method": "frozen"}}}
    controller = open_controller(content)
    simulation = Simulation(controller, slots=2)
    (base,) = simulation.take("1")
    assert base.arm.name == "frozen"
    assert simulation.take("2") == []
    simulation.score = lambda assignment, step: 5.0
    controller.report([(base, 0, {"bits_per_byte": 5.0})])
    simulation.tell(base, 0, "complete")
    worse, better = simulation.take("2")
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


TWO_ARMS = {"settings": {"method": "lora", "method.rank": 2}, "space": {"optim.lr": [0.01, 0.02, 0.05]}, "trials": 5}


@pytest.mark.parametrize(
    ("slots", "workers", "sizes"), [(4, 1, [4, 3, 3, 3]), (8, 1, [7, 6]), (8, 3, [5, 4, 4]), (1, 1, [1] * 13)]
)
def test_packs_of_a_round_are_even_and_the_same_whoever_asks(open_controller, content, slots, workers, sizes):
    content["settings"]["sampler"] = "qmc"
    content["arms"]["other"] = TWO_ARMS
    found = []
    for number, pick in enumerate([random.Random(1), random.Random(2)]):
        controller = open_controller(content, folder=f"sweep{number}", num_workers=workers)
        simulation = Simulation(controller, slots=slots, workers=3, pick=pick)
        simulation.run()
        found.append(simulation.taken)
    assert [len(pack) for pack in found[0]] == sizes
    assert found[0] == found[1]
    assert {name.split("-")[0] for pack in found[0] for name in pack} == {"lora", "other"}


def test_a_round_begins_when_the_earlier_round_of_all_arms_that_share_packs_has_ended(open_controller, content):
    content["settings"]["sampler"] = "tpe"
    content["arms"]["other"] = TWO_ARMS
    simulation = Simulation(open_controller(content), slots=7)
    first = simulation.take("1")
    assert simulation.taken == [[f"lora-000{n}" for n in range(4)] + [f"other-000{n}" for n in range(3)]]
    assert simulation.take("2") == []
    while first:
        simulation.advance(first)
    assert len(simulation.take("2")) == 4 + 2


def test_the_pack_of_a_dead_worker_is_handed_out_first_and_whole(open_controller, content):
    content["settings"]["sampler"] = "qmc"
    simulation = Simulation(open_controller(content), slots=3)
    lost, other = simulation.take("1"), simulation.take("2")
    simulation.controller.release_worker("1")
    for worker in ("3", "4"):
        simulation.take(worker)
    assert simulation.taken[2] == simulation.taken[0]
    assert not {*simulation.taken[3]} & {*simulation.taken[0], *simulation.taken[1]}
    assert {assignment.trial.pack for assignment in lost} != {assignment.trial.pack for assignment in other}


def test_a_process_that_is_killed_while_it_hands_out_a_pack_makes_the_same_packs_later(begin, content, monkeypatch):
    content["settings"]["sampler"] = "qmc"
    whole, sweep = Controller(begin(content, folder="whole")), begin(content)
    expected = Simulation(whole, slots=3)
    expected.run()
    whole.sweep.close()
    create = JournalStorage.create_new_trial
    for _ in range(8):

        def create_once(*arguments, **named):
            monkeypatch.setattr(JournalStorage, "create_new_trial", die)
            return create(*arguments, **named)

        def die(*_, **__):
            raise Killed

        monkeypatch.setattr(JournalStorage, "create_new_trial", create_once)
        simulation = Simulation(Controller(sweep), slots=3)
        with suppress(Killed):
            simulation.run()
            break
        sweep.close()
        sweep = reopen_sweep(sweep.path)
    packs = {trial.run: trial.pack for trial in read_sweep(sweep.path).trials}
    sweep.close()
    assert packs == {f"runs/{name}": pack[0] for pack in expected.taken for name in pack}


def test_a_pack_that_has_a_checkpoint_gets_no_trial_that_a_grown_sweep_adds(begin, content):
    content["settings"]["sampler"] = "qmc"
    sweep = begin(content, "arms.lora.trials=3")
    pack = Simulation(Controller(sweep), slots=8).take()
    checkpoint = find_checkpoint(sweep.path, pack[0].trial.pack)
    checkpoint.parent.mkdir()
    checkpoint.touch()
    sweep.close()
    grown = reopen_sweep(sweep.path, changes={"arms.lora.trials": 8})
    simulation = Simulation(Controller(grown), slots=8)
    simulation.run()
    grown.close()
    assert simulation.taken == [[f"lora-000{n}" for n in range(3)], [f"lora-000{n}" for n in range(3, 8)]]
