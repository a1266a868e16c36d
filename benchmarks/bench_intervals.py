"""Measures intervals and verdicts on planted scores: how often 95 % intervals hold the truth, and verdicts are false.

Each run has noise of its seed (standard deviation 1), its examples have a hardness that all runs share (4 for a group,
1 for an example), and each subject finds some groups harder than others do (2). Groups have 5 to 40 examples, or
uneven sizes: lognormal with standard deviation 1. Each repeat draws other seeds and groups.

The second table is about whole confirm stages: full, a frozen base, and four ranks, tested at the looks 3, 6 and 10.
A stage ends when nothing is open. `false` is the share of stages with any false verdict at any look: a rank called as
good as full, or sufficient, that is worse than the margin, or the other way round. `as good` and `rank` are the shares
in which the question is settled for the largest rank, and the smallest sufficient rank is known.

    python benchmarks/bench_intervals.py --repeats 1000
"""

from __future__ import annotations

import argparse

import numpy as np

from lorasweep.config.data import ScoreMetric
from lorasweep.config.sweep import Margin
from lorasweep.record import Question
from lorasweep.report.evidence.estimates import ConfirmScores, estimate_sum
from lorasweep.report.evidence.questions import (
    NEGATIVE_VERDICTS,
    POSITIVE_VERDICTS,
    AnswerRow,
    MarginScale,
    answer_questions,
)

MARGIN = 0.05
METRIC = ScoreMetric(name="loss", direction="minimize")
LOOKS = (3, 6, 10)
TRUTHS = {
    "saturating": (0.20, 0.07, 0.02, 0.0),
    "at the margin": (0.0501, 0.0501, 0.0501, 0.0501),
    "a peak in the middle": (0.0501, 0.0, 0.03, 0.0501),
    "as good as full": (0.0, 0.0, 0.0, 0.0),
}
"""How much worse each rank is than full fine-tuning, in shares of its gain."""
NOISES = (0.005, 0.02, 0.05)
"""The standard deviation over seeds, in shares of full's gain."""
RANKS = ("rank-1", "rank-4", "rank-16", "rank-64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    repeats = parser.parse_args().repeats
    print("| seeds | groups | mean | difference | uneven groups: mean | uneven groups: difference |")
    print("|---|---|---|---|---|---|")
    for seeds in (3, 5, 10):
        for groups in (10, 16, 50):
            shares = [share for uneven in (False, True) for share in cover(seeds, groups, repeats, uneven=uneven)]
            print(f"| {seeds} | {groups} | {' | '.join(f'{share:.1%}' for share in shares)} |")
    print("\n| true loss of each rank | noise | false | as good | rank |\n|---|---|---|---|---|")
    for name, truth in TRUTHS.items():
        for noise in NOISES:
            found = " | ".join(f"{share:.1%}" for share in judge(truth, noise, repeats))
            print(f"| {name} | {noise / MARGIN:g} margins | {found} |")


def cover(seeds: int, groups: int, repeats: int, *, uneven: bool) -> tuple[float, float]:
    """Returns how often the interval of a mean, and of the difference of two equal subjects, holds the truth."""
    rng, hits = np.random.default_rng(0), np.zeros(2)
    for _ in range(repeats):
        sizes = rng.lognormal(2.5, 1.0, groups) if uneven else rng.integers(5, 41, groups)
        sizes = np.maximum(np.round(sizes), 1.0)
        hardness = rng.normal(0, 4, groups) + rng.normal(0, 1, groups) / np.sqrt(sizes)
        values = {
            subject: {seed: own + rng.normal(0, 1) + rng.normal(0, 1, groups) / np.sqrt(sizes) for seed in range(seeds)}
            for subject in ("a", "b")
            for own in [hardness + rng.normal(0, 2, groups)]
        }
        scores = ConfirmScores(values=values, shares=sizes / sizes.sum(), num_examples=int(sizes.sum()), problems=())
        for place, sums in enumerate(({"a": 1.0}, {"a": 1.0, "b": -1.0})):
            found = estimate_sum(scores, sums)
            interval = found.find_interval() if found else None
            hits[place] += interval is not None and interval[0] <= 0 <= interval[1]
    return float(hits[0] / repeats), float(hits[1] / repeats)


def judge(truth: tuple[float, ...], noise: float, repeats: int) -> tuple[float, float, float]:
    """Returns how often a stage has a false verdict, settles the largest rank, and knows the smallest sufficient."""
    rng, counts = np.random.default_rng(1), np.zeros(3)
    scale = MarginScale(margin=Margin(value=MARGIN, is_share_of_gain=True), metric=METRIC, base="frozen", full="full")
    questions = [
        Question(name="as_good_as_full", arm="lora", key="method.rank", subjects=list(RANKS), reference="full"),
        Question(name="smallest", arm="lora", key="method.rank", subjects=list(RANKS), reference=None),
    ]
    means = dict(zip(RANKS, truth, strict=True)) | {"full": 0.0}
    for _ in range(repeats):
        runs = {name: mean + rng.normal(0, noise, LOOKS[-1]) for name, mean in means.items()}
        is_false, answers = False, []
        for look in LOOKS:
            values = {name: {seed: found[seed : seed + 1] for seed in range(look)} for name, found in runs.items()}
            values["frozen"] = {seed: np.ones(1) for seed in range(look)}
            scores = ConfirmScores(values=values, shares=np.ones(1), num_examples=0, problems=())
            answers = answer_questions(questions, scores, scale, looks=LOOKS)
            is_false |= any(_is_false(answer, means) for answer in answers)
            if all(answer.is_settled for answer in answers):
                break
        chain = [answer.verdict for answer in answers if answer.name == "smallest"]
        place = chain.index("sufficient") if "sufficient" in chain else len(chain)
        largest = next(one for one in answers if (one.name, one.subject) == ("as_good_as_full", RANKS[-1]))
        counts += (is_false, largest.is_settled, place == 0 or chain[place - 1] == "insufficient")
    is_false_share, as_good, rank = counts / repeats
    return float(is_false_share), float(as_good), float(rank)


def _is_false(answer: AnswerRow, means: dict[str, float]) -> bool:
    loss = max(means[answer.subject] - means[other] for other in answer.compared_with)
    if answer.verdict in ("better", "worse"):
        return loss >= 0 if answer.verdict == "better" else loss <= 0
    if answer.verdict in POSITIVE_VERDICTS:
        return loss > MARGIN
    return answer.verdict in NEGATIVE_VERDICTS and loss <= MARGIN


if __name__ == "__main__":
    main()
