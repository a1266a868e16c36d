"""Draws the figures of docs/claims.md and prints its tables, from the CSV files in docs/claims.

python benchmarks/draw_claims.py
"""

from __future__ import annotations

import argparse

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from claims import CLAIMS, RESULTS, WITH_DATA
from matplotlib.axes import Axes

METRIC = "bits per byte"
COLOURS = plt.get_cmap("viridis")(np.linspace(0.1, 0.85, 4))


def read(name: str, table: str) -> pd.DataFrame:
    return pd.read_csv(RESULTS / name / f"{table}.csv")


def read_differences(name: str, *, to: str) -> pd.DataFrame:
    """Returns how much worse each arm is than the arm `to`: difference, low, high and verdict, by name."""
    pairs = read(name, "pairs")
    columns = ["difference", "low", "high", "verdict"]
    forward = pairs[pairs.second == to].set_index("first")[columns]
    backward = pairs[pairs["first"] == to].set_index("second")[columns]
    backward = backward.assign(
        difference=-backward.difference,
        low=-backward.high,
        high=-backward.low,
        verdict=backward.verdict.replace({"better": "worse", "worse": "better"}),
    )
    return pd.concat([forward, backward])


def read_means(name: str) -> pd.Series:
    """Returns the mean score of each confirmed arm on test data."""
    confirmed = read(name, "confirmed")
    return confirmed.groupby("arm", sort=False)[confirmed.columns[3]].mean()


def draw_rates(axes: Axes, name: str, arms: dict[str, str]) -> None:
    """Draws the validation score of each arm over its learning rates; a dot marks the best."""
    trials = read(name, "trials")
    for colour, (arm, label) in zip(COLOURS, arms.items(), strict=False):
        rows = trials[trials.arm == arm].sort_values("optim.lr")
        axes.plot(rows["optim.lr"], rows["bits_per_byte"], color=colour, label=label)
        best = rows.loc[rows["bits_per_byte"].idxmin()]
        axes.plot(best["optim.lr"], best["bits_per_byte"], "o", color=colour)
    low = trials[trials.arm.isin(arms)]["bits_per_byte"].min()
    frozen = trials[trials.arm == "frozen"]["bits_per_byte"].iloc[0]
    axes.axhline(frozen, color="grey", linestyle=":", linewidth=1)
    axes.set(xscale="log", xlabel="learning rate", ylim=(low - 0.1 * (frozen - low), frozen + 0.3 * (frozen - low)))
    axes.legend(frameon=False, fontsize=8)


def draw_shares(axes: Axes, names: dict[str, str], prefix: str) -> None:
    """Draws the share of full's gain of the arms whose names are a prefix and a number, over this number."""
    for (name, label), colour, shift in zip(names.items(), ("C3", "C0"), (0.97, 1.03), strict=True):
        rows = read(name, "shares").set_index("arm").filter(like=prefix, axis=0) * 100
        numbers = rows.index.str.extract(r"(\d+)$", expand=False).astype(int) * shift
        errors = np.abs(rows[["low", "high"]].to_numpy().T - rows.share_of_full_gain.to_numpy())
        axes.errorbar(numbers, rows.share_of_full_gain, yerr=errors, fmt="o", capsize=3, color=colour, label=label)
    axes.set(xscale="log", ylabel="share of full's gain, %")
    axes.legend(frameon=False, loc="lower right")


def draw_rank() -> None:
    """Claim 2: the share of full's gain that each rank keeps."""
    figure, axes = plt.subplots(figsize=(6, 3.4))
    axes.axhspan(95, 105, color="grey", alpha=0.15, label="margin")
    draw_shares(axes, {"rank-far": "far", "rank-near": "near"}, "lora-rank")
    axes.set_xlabel("rank")
    axes.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
    save(figure, "rank")


def draw_learning_rate() -> None:
    """Claim 3: scores over learning rates under three rules of scaling."""
    names = [name for name in ("learning-rate-far", "learning-rate-near") if (RESULTS / name).exists()]
    figure, grid = plt.subplots(len(names), 3, figsize=(9, 3.1 * len(names)), sharey="row", sharex=True, squeeze=False)
    rules = {"over-rank": "α/r", "over-sqrt-rank": "α/√r (rsLoRA)", "fixed": "α ∝ r (fixed multiplier)"}
    for row, name in zip(grid, names, strict=True):
        for axes, (rule, title) in zip(row, rules.items(), strict=True):
            draw_rates(axes, name, {f"{rule}-rank{rank}": f"rank {rank}" for rank in (2, 8, 32)})
            axes.set_title(f"{title}, {name.rpartition('-')[2]} data", fontsize=9)
        row[0].set_ylabel(f"{METRIC}, validation")
    save(figure, "learning_rate")


def draw_alpha() -> None:
    """Claim 4: scores over learning rates for three α, and for α = 64 with a slower B."""
    figure, axes = plt.subplots(figsize=(6, 3.4))
    draw_rates(
        axes,
        "alpha-far",
        {f"lora-alpha{alpha}": f"α = {alpha}" for alpha in (4, 16, 64)} | {"same": "α = 64, lr of B / 4"},
    )
    axes.set_ylabel(f"{METRIC}, validation")
    save(figure, "alpha")


def draw_directions() -> None:
    """Claim 6: the share of full's gain that d random directions keep."""
    figure, axes = plt.subplots(figsize=(6, 3.4))
    axes.axhline(90, color="grey", linestyle=":", linewidth=1)
    draw_shares(axes, {"directions-far": "far", "directions-near": "near"}, "intrinsic-dim")
    axes.set_xlabel("random directions")
    save(figure, "directions")


def save(figure: plt.Figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    plt.close(figure)


def print_table(name: str) -> None:
    """Prints a table of a sweep: each arm's learning rate, score on test data, and difference to full or to LoRA."""
    means = read_means(name)
    reference = "full" if "full" in means.index else next(arm for arm in means.index if arm != "frozen")
    differences = read_differences(name, to=reference)
    trials = read(name, "trials").set_index(["arm", "trial"])
    winners = read(name, "confirmed").groupby("arm", sort=False).trial.first()
    print(f"\n{name}\n| arm | trained | lr | test | against {reference} |\n|---|---|---|---|---|")
    for arm, mean in means.items():
        trial = trials.loc[(arm, winners[arm])]
        against = ""
        if arm in differences.index:
            row = differences.loc[arm]
            against = f"{row.verdict}: {row.difference:.4f} [{row.low:.4f}, {row.high:.4f}]"
        rates = trials.loc[[arm]]["optim.lr"]
        end = "" if len(rates) < 2 or rates.min() < trial["optim.lr"] < rates.max() else " (end)"
        share = f"{100 * trial.trainable_fraction:.2g} %"
        print(f"| {arm} | {share} | {trial['optim.lr']:.3g}{end} | {mean:.4f} | {against} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="results whose tables are printed; all if none is named"
    )
    for name in parser.parse_args().names or [*CLAIMS, *WITH_DATA]:
        if (RESULTS / name).exists():
            print_table(name)
    for needs, draw in (
        ("rank-near", draw_rank),
        ("learning-rate-far", draw_learning_rate),
        ("alpha-far", draw_alpha),
        ("directions-near", draw_directions),
    ):
        if (RESULTS / needs).exists():
            draw()


if __name__ == "__main__":
    main()
