"""A controller without a worker: trials are advanced by hand, in any order."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache

import pytest

from lorasweep.config.compose import compose_run, compose_sweep
from lorasweep.config.data import ScoreMetric
from lorasweep.record import RunRecord, Trial, write_record
from lorasweep.sweep.controller.controller import Assignment, Controller
from lorasweep.sweep.controller.encoding import History
from lorasweep.sweep.controller.proposals import propose
from lorasweep.sweep.definition.arms import Arm

EVERY = 2


@dataclass
class Simulation:
    """Workers that hold packs and train none: a value is a function of the settings and the step."""

    controller: Controller
    slots: int = 4
    workers: int = 1
    pick: random.Random | None = None
    """Chooses the worker that reports next; without it the first one."""
    score_on_test: Callable[[Assignment], float] = lambda assignment: 1.0
    packs: dict[str, list[Assignment]] = field(default_factory=dict)
    """The trials that each worker trains now."""
    steps: Counter[Assignment] = field(default_factory=Counter)
    taken: list[list[str]] = field(default_factory=list)
    """The names of the runs of each pack, in order."""

    def take(self, worker=""):
        """Returns the next pack of a worker, with the same number of slots for all arms."""
        pack = self.controller.take(worker=worker, slots=defaultdict(lambda: self.slots))
        if pack:
            self.taken.append([assignment.run_folder.path.name for assignment in pack])
        return pack

    def run(self):
        names = [str(number) for number in range(self.workers)]
        while True:
            for name in names:
                if not self.packs.get(name):
                    self.packs[name] = self.take(name)
            if not (busy := [name for name in names if self.packs[name]]):
                return
            self.advance(self.packs[self.pick.choice(busy) if self.pick else busy[0]])

    def advance(self, pack):
        """Trains a pack up to the next evaluation, reports it, and tells which trials ended."""
        self.steps.update(dict.fromkeys(pack, EVERY))
        scores = [(a, self.steps[a], {"bits_per_byte": self.score(a, self.steps[a])}) for a in pack]
        for (assignment, step, _), reason in zip(scores, self.controller.report(scores), strict=True):
            last = assignment.config.num_steps
            if step >= last or reason:
                pack.remove(assignment)
                self.tell(assignment, min(step, last), "complete" if step >= last else "stopped", reason=reason)

    def score(self, assignment, step):
        return abs(assignment.trial.shown_params.get("optim.lr", 0.01) - 0.02) + 1 / (step or 1)

    def tell(self, assignment, step, status, **fields):
        value = {"bits_per_byte": self.score(assignment, step), "step": step}
        record = RunRecord(
            status=status,
            config=asdict(assignment.config),
            metric="bits_per_byte",
            direction="minimize",
            best=value,
            last=value,
            test={"bits_per_byte": self.score_on_test(assignment)} if assignment.reads_test else {},
            steps_done=step,
            **fields,
        )
        assignment.run_folder.path.mkdir(parents=True, exist_ok=True)
        write_record(record, assignment.run_folder.path)
        self.controller.tell(assignment, record)


@pytest.fixture
def content():
    """One arm of 8 trials, to change."""
    return {
        "name": "simulated",
        "settings": {
            "data.block_length": 32,
            "trainer.max_steps": 12,
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


def make_arm(space, sampler, *, name="lora", trials=16, seed=0, confirm_each=None):
    sweep_config = default_sweep_config()
    sweep_config = replace(sweep_config, sampler=sampler, sweep=replace(sweep_config.sweep, seed=seed))
    base = compose_run({})
    return Arm(
        name=name,
        space=space,
        settings={},
        corner_configs=(base,),
        trials=trials,
        sweep_config=sweep_config,
        confirm_each=confirm_each,
    )


def ask_for_proposal(arm, trials, *, number=None, **how):
    """The parameters that an arm's sampler proposes after these trials, which are numbered in their order."""
    metric = ScoreMetric(name="loss", direction=how.get("direction", "minimize"))
    history = History(arm, number_trials(trials), metric=metric)
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
