"""Runs the sweeps behind docs/claims.md, keeps their answers as CSV files in docs/claims, and writes the page.

    make claims                                           # all with the embedded model and data
    python benchmarks/claims.py ladder-far ladder-near    # some of them
    python benchmarks/claims.py llm --data FOLDER         # needs FOLDER/e2e_nlg/train.jsonl and test.jsonl
    python benchmarks/claims.py preferences --data FOLDER # needs FOLDER/hh_rlhf/pairs.jsonl
    python benchmarks/claims.py --page                    # only the page

A sweep that was interrupted continues. A sweep whose results are in docs/claims is skipped, unless `--again` is given.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_weights import smollm_folder

RESULTS = Path(__file__).parents[1] / "docs" / "claims"
PAGE = RESULTS.parent / "claims.md"
OUTPUTS = Path("outputs/claims")
INTRODUCTION = """\
# Claims on LoRA, tested

Each statement has a test that could fail, run as a sweep. *Measured* is the share of full fine-tuning's gain with its
interval; of forgetting the change of bits per byte. *More* and *less*: intervals do not overlap. SmolLM2-135M learned
the restaurant descriptions and the preferences, and the embedded model, a toy, all else (far: `stdlib_docs`, near:
`stdlib_code`). DoRA was this package's own layer, before it became PEFT's. `docs/claims` has all rows and commands;
`make claims` repeats them."""
SMOLLM = "SMOLLM"
"""Stands for the folder of the model's weights in a command."""
DATA = "DATA"
"""Stands for `--data` in a command."""
SWEEPS = {
    "ladder-far": ["rank_ladder"],
    "ladder-near": ["rank_ladder", "data=stdlib_code"],
    "alpha-far": ["alpha"],
    "methods-far": ["methods"],
    "directions-far": ["intrinsic_dimension"],
    "forgetting": ["forgetting"],
    # the E2E NLG challenge: restaurant descriptions from attributes
    "llm": [
        "conversations",
        f"model.path={SMOLLM}",
        f"data.train={DATA}/e2e_nlg/train.jsonl",
        f"data.test={DATA}/e2e_nlg/test.jsonl",
        "data.max_validation_examples=100",
        "data.max_test_examples=500",
        "trainer.batch_size=4",
        "trainer.max_steps=60",
        "trainer.eval_every_steps=30",
        "sweep.trials=12",
        "confirm.seeds=3",
    ],
    # the pairs of HH-RLHF that benchmarks/MEASURED.md makes (Preferences beside TRL)
    "preferences": [
        "preferences",
        f"model.path={SMOLLM}",
        f"data.train={DATA}/hh_rlhf/pairs.jsonl",
        "data.test_fraction=0.34",
        "data.max_validation_examples=60",
        "data.max_test_examples=200",
        "objective.beta=0.1",
        "trainer.max_steps=24",
        "trainer.eval_every_steps=24",
        # 24 steps at a width of 576 need higher rates than the thousands of steps for which the file's ranges stand
        "arms.full.optim.lr=interval(2e-6,2e-4)",
        "arms.lora.optim.lr=interval(2e-5,2e-3)",
        "data.max_train_examples=192",
        "sweep.trials=6",
        "confirm.seeds=[3]",
    ],
}
"""The sweep and the settings of each result. All but those of `WITH_DATA` use the embedded model and data."""
WITH_DATA = ("llm", "preferences")
Rows = list[dict[str, str]]
FULL = "as_good_as_full"
"""The question on which most claims rest."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement that is often made, the results that test it, and the test."""

    statement: str
    test: str
    """What the answers must be, so that it can fail."""
    results: tuple[str, ...]
    judge: Callable[[Sequence[Rows]], bool | None]
    """Returns whether it holds; None if the answers leave it open."""
    shown: tuple[str, ...]
    """Subjects whose numbers the page shows."""
    question: str = FULL
    """The question that the shown numbers answer."""


FORGOTTEN = "forgotten_of_code"
"""The rows of the retained data set of `forgetting`: the change of bits per byte against the frozen base."""
RANKS = tuple(f"lora-rank-{rank}" for rank in (1, 4, 16, 64))


def find(rows: Rows, question: str, subject: str) -> str:
    """Returns the verdict on a subject, or `open`."""
    return next((row["verdict"] for row in rows if (row["question"], row["subject"]) == (question, subject)), "open")


def value(rows: Rows, subject: str, column: str = "value", question: str = FULL) -> float:
    """Returns a subject's share of full fine-tuning's gain, or an end of its interval; NaN if it is not known."""
    found = [row[column] for row in rows if (row["question"], row["subject"]) == (question, subject)]
    return float(found[0]) if found and found[0] else float("nan")


def agree(verdicts: Sequence[str], *, yes: Sequence[str], no: Sequence[str]) -> bool | None:
    """Returns True if every verdict is in `yes`, False if any is in `no`, else None."""
    if any(verdict in no for verdict in verdicts):
        return False
    return True if all(verdict in yes for verdict in verdicts) else None


def any_better(rows: Rows, subjects: Sequence[str]) -> bool:
    """Returns whether one of the subjects is better than full fine-tuning."""
    return any(find(rows, FULL, subject) == "better" for subject in subjects)


def forgets_less(rows: Rows, subject: str, other: str) -> bool:
    """Returns whether a subject forgets less than another: the intervals of the changes do not overlap."""
    return value(rows, subject, "high", FORGOTTEN) < value(rows, other, "low", FORGOTTEN)


def compare_forgetting(rows: Rows) -> bool | None:
    """Returns whether each rank that is as good as full fine-tuning forgets less than it."""
    as_good = [rank for rank in RANKS if find(rows, FULL, rank) in GOOD]
    return decide(
        holds=bool(as_good) and all(forgets_less(rows, rank, "full") for rank in as_good),
        fails=any(forgets_less(rows, "full", rank) for rank in as_good),
    )


def decide(*, holds: bool, fails: bool) -> bool | None:
    """Returns True or False, or None if the answers leave it open. NaN makes both comparisons false."""
    return True if holds else False if fails else None


GOOD, BAD = ("equivalent", "better", "not worse"), ("worse",)
CLAIMS = (
    Claim(
        statement="LoRA is as good as full fine-tuning with a small share of the parameters.",
        test="Rank 32 is, on far data.",
        results=("ladder-far",),
        shown=("lora-rank-32",),
        judge=lambda of: agree([find(of[0], FULL, "lora-rank-32")], yes=GOOD, no=BAD),
    ),
    Claim(
        statement="LoRA is as good as full fine-tuning of a small instruct model.",
        test="Rank 16 is, on 240 restaurant descriptions.",
        results=("llm",),
        shown=("lora-rank-16",),
        judge=lambda of: agree([find(of[0], FULL, "lora-rank-16")], yes=GOOD, no=BAD),
    ),
    Claim(
        statement="Rank 1 is enough for a small data set.",
        test="It is sufficient on these descriptions.",
        results=("llm",),
        shown=("lora-rank-1",),
        question="smallest_rank",
        judge=lambda of: agree(
            [find(of[0], "smallest_rank", "lora-rank-1")], yes=("sufficient",), no=("insufficient",)
        ),
    ),
    Claim(
        statement="Preferences need a low rank only.",
        test="Ranks 1, 4, 16 and 64 are as good as full fine-tuning by DPO, on 192 pairs of HH-RLHF.",
        results=("preferences",),
        shown=("lora-rank-1", "lora-rank-64"),
        judge=lambda of: agree([find(of[0], FULL, rank) for rank in RANKS], yes=GOOD, no=BAD),
    ),
    Claim(
        statement="A very high rank is full fine-tuning.",
        test="Rank 160, the full one, is equivalent, on far and near data.",
        results=("ladder-far", "ladder-near"),
        shown=("lora-rank-160",),
        judge=lambda of: agree(
            [find(rows, FULL, "lora-rank-160") for rows in of], yes=("equivalent",), no=("worse", "better")
        ),
    ),
    Claim(
        statement="A base that has seen similar data needs a lower rank.",
        test="Rank 1 keeps more on near than on far data.",
        results=("ladder-far", "ladder-near"),
        shown=("lora-rank-1",),
        judge=lambda of: decide(
            holds=value(of[1], "lora-rank-1", "low") > value(of[0], "lora-rank-1", "high"),
            fails=value(of[1], "lora-rank-1", "high") < value(of[0], "lora-rank-1", "low"),
        ),
    ),
    Claim(
        statement="α/r = 1 is full fine-tuning.",
        test="At rank 8, α = 8 is equivalent, and α = 1 is not as good.",
        results=("alpha-far",),
        shown=("lora-alpha-8",),
        judge=lambda of: decide(
            holds=find(of[0], FULL, "lora-alpha-8") == "equivalent" and find(of[0], FULL, "lora-alpha-1") not in GOOD,
            fails=find(of[0], FULL, "lora-alpha-8") in BAD or find(of[0], FULL, "lora-alpha-1") in GOOD,
        ),
    ),
    Claim(
        statement="α and the learning rate are nearly one knob.",
        test="α = 1 and 64, each at its best rate, differ by less than 0.05.",
        results=("alpha-far",),
        shown=("lora-alpha-1", "lora-alpha-64"),
        judge=lambda of: decide(
            holds=abs(value(of[0], "lora-alpha-1") - value(of[0], "lora-alpha-64")) < 0.05,
            fails=abs(value(of[0], "lora-alpha-1") - value(of[0], "lora-alpha-64")) > 0.1,
        ),
    ),
    Claim(
        statement="Adapting all layers matters more than the variant of LoRA.",
        test="Attention alone is worse at rank 8, and no variant is better than full.",
        results=("methods-far",),
        shown=("attention", "lora"),
        judge=lambda of: decide(
            holds=find(of[0], FULL, "attention") in BAD and not any_better(of[0], ("rslora", "loraplus", "dora")),
            fails=find(of[0], FULL, "attention") in GOOD or any_better(of[0], ("rslora", "loraplus", "dora")),
        ),
    ),
    Claim(
        statement="A few hundred random directions reach 90 % of full fine-tuning's gain.",
        test="1,000 directions keep at least 90 % of the gain, on far data.",
        results=("directions-far",),
        shown=("intrinsic-dim-1000",),
        judge=lambda of: decide(
            holds=value(of[0], "intrinsic-dim-1000", "low") >= 0.9,
            fails=value(of[0], "intrinsic-dim-1000", "high") < 0.9,
        ),
    ),
    Claim(
        statement="LoRA forgets less than full fine-tuning at equal gain.",
        test="Each rank that is as good on prose loses less on code.",
        results=("forgetting",),
        shown=("full", "lora-rank-16"),
        question=FORGOTTEN,
        judge=lambda of: compare_forgetting(of[0]),
    ),
    Claim(
        statement="A higher rank forgets more.",
        test="Rank 1 loses less on code than rank 64.",
        results=("forgetting",),
        shown=("lora-rank-1", "lora-rank-64"),
        question=FORGOTTEN,
        judge=lambda of: decide(
            holds=forgets_less(of[0], "lora-rank-1", "lora-rank-64"),
            fails=forgets_less(of[0], "lora-rank-64", "lora-rank-1"),
        ),
    ),
)


def run_sweep(name: str, *, data: str | None) -> None:
    """Runs a sweep, or the rest of it, and writes its answers."""
    output, words = OUTPUTS / name, SWEEPS[name]
    if name in WITH_DATA:
        words = [word.replace(SMOLLM, str(smollm_folder())).replace(DATA, str(data)) for word in words]
    command = ["--resume", str(output)] if (output / "sweep.json").exists() else [*words, f"sweep.output={output}"]
    subprocess.run([sys.executable, "-m", "lorasweep", "sweep", *command], check=True)
    summary = json.loads((output / "report" / "summary.json").read_text())
    settings = {row["subject"]: row["params"] for row in json.loads((output / "sweep.json").read_text())["settings"]}
    rows = []
    for answer, row in ((one, row) for one in summary["answers"] for row in one["rows"]):
        if row["name"] in ("setting", "present"):
            continue
        low, high = row["interval"] or ("", "")
        chosen = json.dumps(settings.get(row["subject"], {}))
        kept = {key: row[key] for key in ("subject", "reference", "verdict", "value")}
        name = f"forgotten_of_{answer['arm']}" if row["name"] == "retained" else row["name"]
        rows.append({"question": name, **kept, "low": low, "high": high, "settings": chosen})
    write_rows(name, rows)
    runs = [row for row in read_rows("runs") if row["name"] != name]
    command = f"lorasweep sweep {' '.join(SWEEPS[name])}"
    runs.append({"name": name, "command": command, "minutes": f"{summary['makespan_s'] / 60:.1f}"})
    write_rows("runs", sorted(runs, key=lambda row: row["name"]))


def read_rows(name: str) -> Rows:
    path = RESULTS / f"{name}.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def write_rows(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_page() -> None:
    """Writes docs/claims.md from the CSV files."""
    lines = [*INTRODUCTION.splitlines(), "", "| statement | test | result | measured |", "|---|---|---|---|"]
    for claim in CLAIMS:
        found = [read_rows(name) for name in claim.results]
        if all(found):
            outcome = {True: "holds", False: "fails", None: "open"}[claim.judge(found)]
            numbers = ", ".join(show_number(rows, claim.question, subject) for rows in found for subject in claim.shown)
            lines.append(f"| {claim.statement} | {claim.test} | **{outcome}** | {numbers} |")
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def show_number(rows: Rows, question: str, subject: str) -> str:
    number, low, high = (value(rows, subject, column, question) for column in ("value", "low", "high"))
    return f"{number:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *SWEEPS], metavar="NAME")
    parser.add_argument("--data", help="folder with the files that llm or preferences needs")
    parser.add_argument("--again", action="store_true", help="also repeat what docs/claims already holds")
    parser.add_argument("--page", action="store_true", help="write docs/claims.md and run nothing")
    arguments = parser.parse_args()
    for name in () if arguments.page else arguments.names or [name for name in SWEEPS if name not in WITH_DATA]:
        if (RESULTS / f"{name}.csv").exists() and not arguments.again:
            continue
        if name in WITH_DATA and arguments.data is None:
            parser.error(f"{name} needs --data")
        run_sweep(name, data=arguments.data)
    write_page()


if __name__ == "__main__":
    main()
