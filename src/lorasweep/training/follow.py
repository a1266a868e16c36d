"""The runs of a sweep on several ranks: the first one talks to the study and says what to train, the others follow."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from lorasweep.config.run import RunConfig
from lorasweep.errors import ConfigError, RanksLost
from lorasweep.record import RunRecord
from lorasweep.training.callbacks import GoesOn, go_on
from lorasweep.training.ranks import IDLE, Ranks, current_ranks
from lorasweep.training.run import never_stop, train_run
from lorasweep.training.run_log import RunPlace
from lorasweep.training.workbench import Benches, Workbench


@dataclass(frozen=True, kw_only=True)
class _Order:
    """What the first rank tells the others to train with it."""

    config: RunConfig
    place: RunPlace
    resume: bool


def lead_run(
    config: RunConfig,
    place: RunPlace,
    *,
    benches: Benches,
    on_evaluation: GoesOn = go_on,
    stop_requested: Callable[[], bool] = never_stop,
    resume: bool = False,
) -> RunRecord:
    """Trains a run as `train_run` does, with the ranks that follow; called by the first rank, or by a process alone."""
    ranks = current_ranks()
    ranks.broadcast(_Order(config=config, place=place, resume=resume))
    bench = share_bench(ranks, lambda: benches.of(config))
    return train_run(
        config, place, bench=bench, on_evaluation=on_evaluation, stop_requested=stop_requested, resume=resume
    )


def release_followers() -> None:
    """Lets the ranks that follow end; called by the first rank, whatever became of its runs."""
    with suppress(RanksLost):
        current_ranks().broadcast(None)


def follow_runs(benches: Benches, *, stop_requested: Callable[[], bool] = never_stop) -> int:
    """Takes part in every run that the first rank leads until it releases this one; returns how many there were.

    A run that fails does so on every rank. What becomes of it is the first one's to say.

    Raises:
        RanksLost: The process of another rank is gone.
    """
    ranks = current_ranks()
    nothing: _Order | None = None
    followed = 0
    while (order := ranks.broadcast(nothing, timeout=IDLE)) is not None:
        followed += 1
        config = order.config
        try:
            bench = share_bench(ranks, lambda config=config: benches.of(config))  # type: ignore[misc]
            train_run(config, order.place, bench=bench, stop_requested=stop_requested, resume=order.resume)
        except RanksLost:
            raise
        except Exception:  # the first rank has it too
            continue
    return followed


def share_bench(ranks: Ranks, load: Callable[[], Workbench]) -> Workbench:
    """Returns base model and data on each rank, read by one rank of each node first, and the same on all of them.

    Raises:
        ConfigError: They can't be had, or are not the same on all.
    """
    bench = ranks.in_turn(load)
    if ranks.size == 1:
        return bench
    with ranks.together():
        own = {
            "model.path": bench.base.fingerprint,
            "data.train": bench.parts.train.fingerprint,
            "data.validation": bench.parts.validation.fingerprint,
            "trainer.precision": bench.precision,
            "model.attention": None if bench.attention is None else bench.attention.name,
        }
        for rank, other in enumerate(ranks.gather(own)):
            differing = [key for key, value in own.items() if other[key] != value]
            if differing:
                raise ConfigError(
                    f"`{differing[0]}` must be the same for every process of a run, but rank {ranks.rank} has "
                    f"{own[differing[0]]!r} and rank {rank} {other[differing[0]]!r}. Put the same files on every node."
                )
    return bench
