"""Replays sweeps on shares of the training data that predict the smallest rank at the full amount.

    python benchmarks/bench_growth.py [--replays 300]

Tables (`benchmarks/answers/growth/`, made by `record_answers.py`): whole documents of `stdlib_docs`, 16 of them in the
32, and these in the 64, with steps in proportion to their blocks, and the same validation and test documents. A replay
trains a sweep at each amount as in `bench_answers.py`, with its own searches, but the same confirm seeds and test
documents. From the two smaller amounts alone, two rules predict the smallest rank that is enough at the full amount
(less than the margin of 5 % behind the best larger rank):

- `line`: each rank's share of full's gain goes on along the line through both amounts, over log2(examples).
- `same`: the smallest rank at the larger of the two amounts stays.

`said` is the share of replays in which the slope of the next smaller rank than the predicted one is settled, and
`line_if_said` how often the line is right then. Truth is the mean over all seeds and documents at each best rate.
`covered` is the share of slopes whose interval has the true slope, at 95 % for all ranks together.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Mapping

import numpy as np
from bench_answers import FOLDER, RANKS, Confirmation, build_arms, choose_settings, confirm, name_subject, read_table

from lorasweep.config.compose import compose_sweep
from lorasweep.report.evidence.estimates import estimate_ratio
from lorasweep.report.evidence.evidence import Evidence
from lorasweep.report.evidence.growth import estimate_slopes

MARGIN = 0.05
EXAMPLES = {16: 1719, 32: 2825, 64: 5241}
"""Training blocks of 64 tokens by number of documents."""


def find_smallest(shares: Mapping[int, float]) -> int:
    """Returns the smallest rank whose share is less than the margin below that of the best larger rank."""
    return next(r for r in RANKS if r == RANKS[-1] or shares[r] >= max(shares[o] for o in RANKS if o > r) - MARGIN)


def collect(stage: Confirmation) -> Evidence:
    """Returns the shares of full's gain of a replayed confirm stage, with their intervals."""
    scores, sign = stage.scores, float(stage.table.sign)
    gain = {"frozen": sign, "full": -sign}
    found = {name: estimate_ratio(scores, {"frozen": sign, name: -sign}, gain) for name in map(name_subject, RANKS)}
    shares = {name: share for name, share in found.items() if share is not None}
    return Evidence(shares=shares, base="frozen", full="full", scores=scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replays", type=int, default=300)
    args = parser.parse_args()
    looks = compose_sweep({}).confirm.list_looks()
    tables = {number: read_table(f"growth_docs_{number}", FOLDER / "growth") for number in EXAMPLES}
    arms = {number: build_arms(table) for number, table in tables.items()}
    true = {
        number: {rank: table.sign * (table.base - table.best[rank]) / table.gain for rank in RANKS}
        for number, table in tables.items()
    }
    first, second, last = EXAMPLES
    steps = [float(np.log2(EXAMPLES[b] / EXAMPLES[a])) for a, b in itertools.pairwise(EXAMPLES)]
    truth = find_smallest(true[last])
    for number in EXAMPLES:
        shares = ", ".join(f"rank {rank} {100 * share:.1f} %" for rank, share in true[number].items())
        print(f"{EXAMPLES[number]:,} blocks: {shares}; smallest rank {find_smallest(true[number])}")
    slopes = {rank: (true[second][rank] - true[first][rank]) / steps[0] for rank in RANKS}
    print("true slopes, points a doubling:", {rank: round(100 * slope, 2) for rank, slope in slopes.items()})
    ahead = {rank: true[second][rank] + slopes[rank] * steps[1] for rank in RANKS}
    print(f"the line through the true shares predicts {find_smallest(ahead)}; true is {truth}")
    right: dict[str, list[bool]] = {"line": [], "same": [], "line_if_said": [], "same_if_said": []}
    said, covered, settled = [], [], []
    for replay in range(args.replays):
        found = []
        for number in (first, second):
            rng = np.random.default_rng((replay, number))
            chosen = choose_settings(tables[number], arms[number], ranks=RANKS, number=replay, rng=rng)
            shared = np.random.default_rng(replay)  # the same confirm seeds and test documents at both amounts
            found.append(collect(confirm(tables[number], chosen, looks=looks, rng=shared)))
        estimated = estimate_slopes(found, [EXAMPLES[first], EXAMPLES[second]], sign=tables[first].sign)
        if len(estimated) < len(RANKS):
            continue
        now = {rank: found[1].shares[name_subject(rank)][0] for rank in RANKS}
        line = {rank: now[rank] + estimated[name_subject(rank)].value * steps[1] for rank in RANKS}
        predicted = find_smallest(line)
        decisive = estimated[name_subject(RANKS[max(RANKS.index(predicted) - 1, 0)])]
        right["line"].append(predicted == truth)
        right["same"].append(find_smallest(now) == truth)
        said.append(decisive.is_settled)
        if decisive.is_settled:
            right["line_if_said"].append(right["line"][-1])
            right["same_if_said"].append(right["same"][-1])
        for rank in RANKS:
            low, high = estimated[name_subject(rank)].interval or (-np.inf, np.inf)
            covered.append(low <= slopes[rank] <= high)
            settled.append(estimated[name_subject(rank)].is_settled)
    print(f"{len(said)} replays; said {statistics.fmean(said):.3f}; settled slopes {statistics.fmean(settled):.3f}")
    print({name: round(statistics.fmean(values), 3) if values else None for name, values in right.items()})
    print(f"covered {statistics.fmean(covered):.3f}")


if __name__ == "__main__":
    main()
