"""What a rank of the tests of several processes runs; not a test. Prints nothing: what is to be seen is on disk."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from lorasweep.config.compose import compose_run
from lorasweep.data.tasks import LanguageModelling
from lorasweep.errors import LoraSweepError
from lorasweep.models.load import fingerprint_weights
from lorasweep.training import (
    Benches,
    RunPlace,
    build_workbench,
    follow_runs,
    join_ranks,
    lead_run,
    release_followers,
    share_bench,
    train_run,
)

OUT = Path(sys.argv[2])
SETTINGS = {
    "data.block_length": 32,
    "data.max_validation_blocks": 5,
    "data.max_test_blocks": 4,
    "trainer.batch_size": 5,
    "trainer.eval_batch_size": 4,
    "trainer.max_steps": 4,
    "trainer.eval_every_steps": 2,
    "trainer.precision": "fp32",
    "trainer.device": "cpu",
    "trainer.progress": False,
    "optim.lr": 1e-3,
    "optim.clip_norm": 0.5,
}


def config_of(**settings):
    return compose_run(SETTINGS | {"trainer.devices": "auto"} | {k.replace("__", "."): v for k, v in settings.items()})


def joined():
    config = config_of()
    ranks = join_ranks(config.trainer)
    return ranks, share_bench(ranks, lambda: build_workbench(config))


def note(ranks, name, **values):
    (OUT / f"{name}.{ranks.rank}.json").write_text(json.dumps(values))


def meet():
    """The whole of the API: agreeing, failing, and meeting again."""
    ranks = join_ranks(config_of().trainer)
    seen = {
        "size": ranks.size,
        "broadcast": ranks.broadcast({"from": ranks.rank}),
        "gather": ranks.gather("x" * (ranks.rank + 1)),
        "any": [ranks.any(ranks.rank == 1), ranks.any(False)],
        "errors": [],
    }
    for error in (LoraSweepError("on purpose"), KeyError("unforeseen")):
        try:
            with ranks.together():
                ranks.connect()
                if ranks.rank == 1:
                    raise error
                ranks.sum([torch.ones(3)])  # waits for a rank that never comes
        except Exception as raised:
            seen["errors"].append([type(raised).__name__, str(raised)])
    ranks.connect()
    values = [torch.full((2, 2), float(ranks.rank + 1)), torch.tensor([1]), torch.ones(3, 2).t()]
    ranks.sum(values)
    seen["sum"] = [value.tolist() for value in values]
    note(ranks, "meet", **seen)
    ranks.leave()


def train():
    """Every strategy, method and number of micro-batches; then what ends a run early."""
    ranks, bench = joined()
    for method in ("lora", "full"):
        for strategy in ("ddp", "fsdp") if ranks.size > 1 else ("auto",):
            for accumulate in (1, 3):
                config = config_of(method=method, trainer__strategy=strategy, trainer__accumulate=accumulate)
                place = RunPlace(folder=OUT / f"{method}-{strategy}-{accumulate}")
                train_run(config, place, bench=bench)
    note(ranks, "base", same=fingerprint_weights(bench.base.model) == bench.base.fingerprint)
    ranks.leave()


def end():
    """A run that is paused, stopped and gone on with, out of memory on one rank, and diverges on one."""
    ranks, bench = joined()
    outcomes = {}

    def attempt(name, config, **hooks):
        try:
            record = train_run(config, RunPlace(folder=OUT / name), bench=bench, **hooks)
            outcomes[name] = [record.status, record.steps_done, record.batching.get("too_large")]
        except Exception as error:
            outcomes[name] = [type(error).__name__, str(error)]

    attempt("paused", config_of(), on_evaluation=lambda step, value: not (ranks.rank == 0 and step == 2))
    for strategy in ("ddp", "fsdp"):
        config = config_of(method="full", trainer__strategy=strategy, trainer__max_steps=6)
        attempt(f"whole-{strategy}", config)
        steps = iter(range(1, 9))
        attempt(f"stopped-{strategy}", config, stop_requested=lambda steps=steps: next(steps) == 3 and ranks.rank == 1)
        attempt(f"stopped-{strategy}", config, resume=True)
        steps = iter(range(1, 9))
        attempt(f"moved-{strategy}", config, stop_requested=lambda steps=steps: next(steps) == 3)

    true_losses = LanguageModelling._token_losses

    def damage(action):
        LanguageModelling._token_losses = lambda task, model, batch: action(model, true_losses(task, model, batch))

    def too_large(model, losses):
        if ranks.rank == 1 and model.training and len(losses) > 1:
            raise torch.OutOfMemoryError("out of memory on one rank")
        return losses

    for strategy in ("ddp", "fsdp"):
        damage(too_large)
        config = config_of(trainer__strategy=strategy, trainer__batch_size=8)
        attempt(f"memory-{strategy}", config)
        damage(lambda model, losses: losses * (float("nan") if ranks.rank == 1 and model.training else 1))
        attempt(f"nan-{strategy}", config)
    damage(lambda model, losses: losses)
    note(ranks, "end", **outcomes)
    ranks.leave()


def follow():
    """A sweep's runs: the first rank leads, the other follows, whatever becomes of them."""
    ranks = join_ranks(config_of().trainer)
    benches = Benches()
    if ranks.is_first:
        ended = []
        for number, settings in enumerate(({}, {"optim__lr": 1e30}, {"method": "frozen"})):
            try:
                record = lead_run(config_of(**settings), RunPlace(folder=OUT / f"run-{number}"), benches=benches)
                ended.append(record.status)
            except LoraSweepError as error:
                ended.append(type(error).__name__)
        release_followers()
        note(ranks, "follow", ended=ended)
    else:
        note(ranks, "follow", followed=follow_runs(benches))
    ranks.leave()


def killed():
    """The second rank dies in the second half of a run."""
    ranks, bench = joined()

    def stop():
        if ranks.rank == 1 and (OUT / "killed" / "last").exists() and "--die" in sys.argv:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    outcome = "complete"
    try:
        config = config_of(trainer__max_steps=6)
        train_run(config, RunPlace(folder=OUT / "killed"), bench=bench, stop_requested=stop, resume=True)
    except LoraSweepError as error:
        outcome = type(error).__name__
    note(ranks, "killed", outcome=outcome)
    ranks.leave()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
