"""The evidence of one sweep: arms, pairs and shares of full fine-tuning's gain. Last of this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorasweep.report.evidence.estimates import Interval, bootstrap_interval, estimate_ratio, estimate_sum
from lorasweep.report.evidence.scores import ConfirmScores
from lorasweep.report.evidence.verdicts import Pair, compare_pairs


@dataclass(frozen=True, kw_only=True)
class ArmEvidence:
    """One arm's reruns on test data."""

    name: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    spread: float | None
    """Standard deviation over seeds; None for one seed."""
    interval: Interval | None
    """95 %: t over seeds, and a bootstrap over examples where they are known."""
    seed_interval: Interval | None
    """95 % over seeds alone: what another training on the same test data might score."""
    bootstrap_interval: Interval | None
    """The plain bootstrap's, for comparison: too narrow with few seeds."""
    uses_examples: bool
    share_of_full_gain: float | None
    """(base - arm) / (base - full) on test data."""
    share_interval: Interval | None


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the confirm stage shows; no arms where there was none."""

    arms: tuple[ArmEvidence, ...] = ()
    pairs: tuple[Pair, ...] = ()
    num_examples: int = 0
    """Test examples that the intervals take for a sample; 0 where single examples have no score."""
    base: str | None = None
    """The arm that is the frozen base, and `full` the best that is full fine-tuning, where there is one."""
    full: str | None = None
    notes: tuple[str, ...] = ()
    """What the numbers can't say, in sentences."""

    def arm(self, name: str) -> ArmEvidence | None:
        """Returns the evidence on an arm."""
        return next((arm for arm in self.arms if arm.name == name), None)

    def pair(self, first: str, second: str) -> Pair | None:
        """Returns the verdict on a pair, in whichever order it is named."""
        return next((pair for pair in self.pairs if {pair.first, pair.second} == {first, second}), None)

    @property
    def num_compared(self) -> int:
        """How many pairs were tested."""
        return sum(pair.verdict != "not tested" for pair in self.pairs)


def weigh_evidence(scores: ConfirmScores, methods: Sequence[tuple[str, str]], *, sign: int) -> Evidence:
    """Returns what the confirm stage shows.

    Args:
        scores: Its numbers.
        methods: Name and method of every arm of the sweep, in its order.
        sign: 1 where lower scores are better, else -1.
    """
    names = [name for name, _ in methods if scores.values.get(name)]
    base, full = (_best_of(method, methods, scores, sign=sign) for method in ("frozen", "full"))
    return Evidence(
        arms=tuple(arm for arm in (_weigh_arm(scores, name, base, full, sign=sign) for name in names) if arm),
        pairs=compare_pairs(scores, names, sign=sign),
        num_examples=scores.num_examples,
        base=base,
        full=full,
        notes=(*_notes(scores, names), *scores.problems),
    )


def _best_of(method: str, methods: Sequence[tuple[str, str]], scores: ConfirmScores, *, sign: int) -> str | None:
    found = [(name, estimate_sum(scores, {name: 1.0})) for name, kind in methods if kind == method]
    means = {name: sign * estimate.value for name, estimate in found if estimate}
    return min(means, key=means.__getitem__, default=None)


def _weigh_arm(
    scores: ConfirmScores, name: str, base: str | None, full: str | None, *, sign: int
) -> ArmEvidence | None:
    estimate = estimate_sum(scores, {name: 1.0})
    if estimate is None:
        return None
    alone = estimate_sum(_without_examples(scores), {name: 1.0})
    share = _share(scores, name, base, full, sign=sign)
    seeds = sorted(scores.values[name])
    return ArmEvidence(
        name=name,
        seeds=tuple(seeds),
        values=tuple(scores.values[name][seed] for seed in seeds),
        mean=estimate.value,
        spread=estimate.spread,
        interval=estimate.interval,
        seed_interval=alone.interval if alone else None,
        bootstrap_interval=bootstrap_interval(scores, name),
        uses_examples=estimate.uses_examples,
        share_of_full_gain=share[0] if share else None,
        share_interval=share[1] if share else None,
    )


def _without_examples(scores: ConfirmScores) -> ConfirmScores:
    return ConfirmScores(values=scores.values, chanceless=scores.chanceless, deviations={}, num_examples=0, problems=())


def _share(
    scores: ConfirmScores, name: str, base: str | None, full: str | None, *, sign: int
) -> tuple[float, Interval | None] | None:
    if base is None or full is None:
        return None
    gain = estimate_sum(scores, {base: float(sign), full: -float(sign)})
    if gain is None or gain.value <= 0:
        return None
    if name in (base, full):
        # by definition, without error
        return (0.0, None) if name == base else (1.0, None)
    return estimate_ratio(scores, {base: 1.0, name: -1.0}, {base: 1.0, full: -1.0})


def _notes(scores: ConfirmScores, names: Sequence[str]) -> list[str]:
    chance = [name for name in names if name not in scores.chanceless]
    single = [name for name in chance if len(scores.values[name]) == 1]
    notes = []
    if single:
        listed = ", ".join(f"`{name}`" for name in single)
        notes.append(f"One seed says nothing about another: there is no verdict on {listed}. Confirm on two or more.")
    if names and not scores.num_examples:
        notes.append("Single test examples have no scores here, so intervals are over seeds alone, on this test data.")
    return notes
