"""A controller without a worker: trials are advanced by hand, in any order, and the process may die at any write."""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache

import pytest

from lorasweep.config.compose import compose_sweep
from lorasweep.record import RunRecord, Trial, write_record
from lorasweep.sweep.controller.controller import Assignment, Controller
from lorasweep.sweep.controller.encoding import History
from lorasweep.sweep.controller.lifecycle import reopen_sweep
from lorasweep.sweep.controller.proposals import propose
from lorasweep.sweep.definition.arms import Arm
from lorasweep.sweep.workers.worker import find_ended_run

EVERY, LAST = 2, 12


@dataclass
class Simulation:
    """Trains packs of so many slots without training: a value is a function of the settings and the step."""

    controller: Controller
    slots: int = 4
    shuffle: random.Random | None = None
    """Puts the slots into another order before each report."""
    pick: random.Random | None = None
    """Chooses the one slot that reports next; without it all slots report together, as in a pack."""
    curve: Callable[[Assignment, int], float] = lambda a, step: (
        9.0 if a.config.method.name == "frozen" else abs(a.trial.shown_params.get("optim.lr", 0.01) - 0.02) + 1 / step
    )
    score_on_test: Callable[[Assignment], float] = lambda assignment: 1.0
    steps: dict[str, int] = field(default_factory=dict)
    """Steps done of each run, by its folder's name; what checkpoints are in a real sweep."""

    def run(self):
        running = []
        while True:
            while len(running) < self.slots and (assignment := self.controller.take()) is not None:
                record = find_ended_run(assignment)
                if record is None:
                    running.append(assignment)
                else:
                    self.controller.tell(assignment, record)
            if not running:
                return
            if self.pick is not None:
                chosen = [running.pop(self.pick.randrange(len(running)))]
                self.advance(chosen)
                running += chosen
            else:
                self.advance(running)

    def advance(self, running):
        """Trains slots up to the next evaluation, reports it, and tells how the trials ended or were stopped."""
        if self.shuffle is not None:
            self.shuffle.shuffle(running)
        reached = {a: min(self.steps.get(a.run_folder.path.name, 0) + EVERY, LAST) for a in running}
        reasons = self.controller.report(
            [(a, reached[a], {"bits_per_byte": self.curve(a, reached[a])}) for a in running]
        )
        ended = []
        for assignment, reason in zip(running, reasons, strict=True):
            step = reached[assignment]
            self.steps[assignment.run_folder.path.name] = step
            if step < LAST and reason is None:
                continue
            ended.append(assignment)
            status = "complete" if step == LAST else "stopped"
            self.controller.tell(assignment, self.record(assignment, step, status, reason=reason))
        running[:] = [assignment for assignment in running if assignment not in ended]

    def record(self, assignment, step, status, *, reason=None):
        best = min(self.curve(assignment, s) for s in range(EVERY, step + 1, EVERY) or (0,))
        record = RunRecord(
            status=status,
            reason=reason,
            config=asdict(assignment.config),
            metric="bits_per_byte",
            direction="minimize",
            best={"bits_per_byte": best, "step": step},
            last={"bits_per_byte": self.curve(assignment, step or 1), "step": step},
            test={"bits_per_byte": self.score_on_test(assignment)} if assignment.reads_test else {},
            steps_planned=LAST,
            steps_done=step,
            trainable_params=1000 * getattr(assignment.config.method, "rank", 0),
        )
        assignment.run_folder.path.mkdir(parents=True, exist_ok=True)
        write_record(record, assignment.run_folder.path)
        return record


@pytest.fixture
def content():
    """One arm of 8 trials, to change."""
    return {
        "name": "simulated",
        "settings": {
            "data.block_length": 32,
            "trainer.max_steps": LAST,
            "trainer.eval_every_steps": EVERY,
            "confirm.seeds": 0,
        },
        "arms": {
            "lora": {
                "settings": {"method": "lora"},
                "space": {"method.rank": [1, 2, 4, 8], "optim.lr": {"low": 1e-3, "high": 1e-1, "log": True}},
                "trials": 8,
            }
        },
    }


def resume(path):
    """Returns the controller of a sweep that is opened again, as by a new process."""
    return Controller(reopen_sweep(path))


def make_arm(space, sampler, *, name="lora", trials=16, seed=0, confirm_each=None):
    sweep_config = default_sweep_config()
    sweep_config = replace(sweep_config, sampler=sampler, sweep=replace(sweep_config.sweep, seed=seed))
    return Arm(name=name, settings={}, space=space, trials=trials, sweep_config=sweep_config, confirm_each=confirm_each)


def ask_for_proposal(arm, trials, *, number=None, **how):
    """The parameters that an arm's sampler proposes after these trials, which are numbered in their order."""
    history = History(arm, number_trials(trials), direction=how.get("direction", "minimize"))
    return propose(arm, history, number=len(trials) if number is None else number)[0]


def make_trial(params, *, state="complete", **fields):
    return Trial(arm="lora", number=0, run="", params=dict(params), state=state, **fields)


def number_trials(trials):
    return [replace(trial, number=number) for number, trial in enumerate(trials)]


@cache
def default_sweep_config():
    return compose_sweep({})


def outcome(controller):
    """What a sweep came to: each trial's proposal, values and end, in order."""
    return [
        (name, trial.number, sorted(trial.params.items()), trial.state, sorted(trial.values.items()))
        for name, trials in controller.search.arms.items()
        for trial in trials.trials.values()
    ]
