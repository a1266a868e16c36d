"""Runs the sweeps behind docs/claims.md, keeps their answers as CSV files in docs/claims, and writes the page.

    make claims                                           # all with the embedded model and data
    python benchmarks/claims.py ladder-far ladder-near    # some of them
    python benchmarks/claims.py sentences llm --data FOLDER
    python benchmarks/claims.py --page                    # only the page

A sweep that was interrupted continues. A sweep whose results are in docs/claims is skipped, unless `--again` is given.
In the commands of the page, DATA stands for FOLDER, and MINILM and SMOLLM for folders of their weights.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentences import minilm_folder
from smollm import smollm_folder

RESULTS = Path(__file__).parents[1] / "docs" / "claims"
PAGE = RESULTS.parent / "claims.md"
OUTPUTS = Path("outputs/claims")
COLUMNS = ("question", "subject", "reference", "verdict", "value", "low", "high", "settings")
NEAR = "data=stdlib_code"
CLAIMS = {
    "ladder-far": ["rank_ladder"],
    "ladder-near": ["rank_ladder", NEAR],
    "alpha-far": ["alpha"],
    "methods-far": ["methods"],
    "directions-far": ["intrinsic_dimension"],
    "directions-near": ["intrinsic_dimension", NEAR],
    "forgetting": ["forgetting"],
}
"""The sweep and the settings of each result. All use the embedded model and data."""
WITH_DATA = {
    "sentences": [
        "sentences",
        "model.path={minilm}",
        *[f"data.{split}={{data}}/movie_snippets/{split}.tsv" for split in ("train", "validation", "test")],
        "trainer.max_steps=120",
        "trainer.eval_every_steps=20",
    ],
    # the E2E NLG challenge: restaurant descriptions from attributes
    "llm": [
        "conversations",
        "model.path={smollm}",
        *[f"data.{split}={{data}}/e2e_nlg/{split}.jsonl" for split in ("train", "test")],
        "data.max_validation_examples=100",
        "data.max_test_examples=500",
        "trainer.batch_size=4",
        "trainer.max_steps=60",
        "trainer.eval_every_steps=30",
        "sweep.trials=12",
        "confirm.seeds=3",
    ],
}
"""The same for sweeps whose data are not in this repository."""
Rows = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement that is often made, the results that test it, and the test."""

    statement: str
    test: str
    """What the answers must be, so that it can fail."""
    results: tuple[str, ...]
    judge: Callable[[Sequence[Rows]], bool | None]
    """Returns whether it holds; None if the answers leave it open."""


FULL = "as_good_as_full"
"""The question on which most claims rest."""
FORGOTTEN = "forgotten_of_code"
"""The rows of the retained data set of `forgetting`: the change of bits per byte against the frozen base."""
FORGETTING_RANKS = tuple(f"lora-rank-{rank}" for rank in (1, 4, 16, 64))


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
    as_good = [rank for rank in FORGETTING_RANKS if find(rows, FULL, rank) in GOOD]
    return decide(
        holds=bool(as_good) and all(forgets_less(rows, rank, "full") for rank in as_good),
        fails=any(forgets_less(rows, "full", rank) for rank in as_good),
    )


def decide(*, holds: bool, fails: bool) -> bool | None:
    """Returns True or False, or None if the answers leave it open. NaN makes both comparisons false."""
    return True if holds else False if fails else None


GOOD, BAD = ("equivalent", "better", "not worse"), ("worse",)
STATEMENTS = (
    Claim(
        statement="LoRA reaches full fine-tuning with a small share of the parameters.",
        test="On far data, rank 32 is equivalent to full fine-tuning, not worse, or better.",
        results=("ladder-far",),
        judge=lambda of: agree([find(of[0], FULL, "lora-rank-32")], yes=GOOD, no=BAD),
    ),
    Claim(
        statement="LoRA is as good as full fine-tuning of a small instruct model.",
        test="On restaurant descriptions, rank 16 is equivalent to full fine-tuning, not worse, or better.",
        results=("llm",),
        judge=lambda of: agree([find(of[0], FULL, "lora-rank-16")], yes=GOOD, no=BAD),
    ),
    Claim(
        statement="Rank 1 is enough for a small data set.",
        test="On 240 restaurant descriptions, rank 1 is sufficient beside ranks 4, 16 and 64.",
        results=("llm",),
        judge=lambda of: agree(
            [find(of[0], "smallest_rank", "lora-rank-1")], yes=("sufficient",), no=("insufficient",)
        ),
    ),
    Claim(
        statement="A very high rank is full fine-tuning.",
        test="At the full rank of 160, LoRA is equivalent to full fine-tuning, on far and on near data.",
        results=("ladder-far", "ladder-near"),
        judge=lambda of: agree(
            [find(rows, FULL, "lora-rank-160") for rows in of], yes=("equivalent",), no=("worse", "better")
        ),
    ),
    Claim(
        statement="A base that has seen similar data needs a lower rank.",
        test="Rank 1 keeps a larger share of full's gain on near data than on far data: the intervals do not overlap.",
        results=("ladder-far", "ladder-near"),
        judge=lambda of: decide(
            holds=value(of[1], "lora-rank-1", "low") > value(of[0], "lora-rank-1", "high"),
            fails=value(of[1], "lora-rank-1", "high") < value(of[0], "lora-rank-1", "low"),
        ),
    ),
    Claim(
        statement="α/r = 1 is full fine-tuning.",
        test="At rank 8 and α = 8, LoRA is equivalent to full fine-tuning, and α = 1 is not.",
        results=("alpha-far",),
        judge=lambda of: decide(
            holds=find(of[0], FULL, "lora-alpha-8") == "equivalent" and find(of[0], FULL, "lora-alpha-1") not in GOOD,
            fails=find(of[0], FULL, "lora-alpha-8") in BAD or find(of[0], FULL, "lora-alpha-1") in GOOD,
        ),
    ),
    Claim(
        statement="α and the learning rate are nearly one knob.",
        test="The shares of α = 1 and α = 64, each at its best rate, differ by less than 0.05 (over 0.1: fails).",
        results=("alpha-far",),
        judge=lambda of: decide(
            holds=abs(value(of[0], "lora-alpha-1") - value(of[0], "lora-alpha-64")) < 0.05,
            fails=abs(value(of[0], "lora-alpha-1") - value(of[0], "lora-alpha-64")) > 0.1,
        ),
    ),
    Claim(
        statement="Adapting all layers matters more than the variant of LoRA.",
        test="At rank 8 attention alone is worse than full fine-tuning, and no variant is better than it.",
        results=("methods-far",),
        judge=lambda of: decide(
            holds=find(of[0], FULL, "attention") in BAD and not any_better(of[0], ("rslora", "loraplus", "dora")),
            fails=find(of[0], FULL, "attention") in GOOD or any_better(of[0], ("rslora", "loraplus", "dora")),
        ),
    ),
    Claim(
        statement="A few hundred random directions reach 90 % of full fine-tuning's gain.",
        test="1,000 directions keep at least 90 % of the gain, on far and on near data.",
        results=("directions-far", "directions-near"),
        judge=lambda of: decide(
            holds=all(value(rows, "intrinsic-dim-1000", "low") >= 0.9 for rows in of),
            fails=any(value(rows, "intrinsic-dim-1000", "high") < 0.9 for rows in of),
        ),
    ),
    Claim(
        statement="LoRA forgets less than full fine-tuning at equal gain.",
        test="Each rank that is as good as full fine-tuning on prose loses less on code: the intervals do not overlap. "
        "Fails if one of them loses more.",
        results=("forgetting",),
        judge=lambda of: compare_forgetting(of[0]),
    ),
    Claim(
        statement="A higher rank forgets more.",
        test="Rank 1 loses less on code than rank 64: the intervals do not overlap. Fails if it loses more.",
        results=("forgetting",),
        judge=lambda of: decide(
            holds=forgets_less(of[0], "lora-rank-1", "lora-rank-64"),
            fails=forgets_less(of[0], "lora-rank-64", "lora-rank-1"),
        ),
    ),
)
NOT_MEASURED = (
    "**A 200 × 200 matrix at rank 2 keeps 8,000 numbers.** It keeps 2 · (200 + 200) = 800: LoRA trains r (d + k), "
    "and the test of `inject_lora` counts them.",
    "**Larger or longer-trained bases need fewer directions.** Not measured: it needs several pre-trained bases of one "
    "family.",
    "**One learning rate serves every rank and α.** Not quite: one value of lr · √α does. "
    "[Benchmarks](benchmarks.md#proposals-make-bench-proposals) has the table.",
)


def run_claim(name: str, arguments: list[str], *, folders: dict[str, str]) -> None:
    """Runs a sweep, or the rest of it, and writes its answers."""
    output = OUTPUTS / name
    filled = [argument.format(**folders) for argument in arguments]
    command = ["--resume", str(output)] if (output / "sweep.json").exists() else [*filled, f"sweep.output={output}"]
    subprocess.run([sys.executable, "-m", "lorasweep", "sweep", *command], check=True)
    summary = json.loads((output / "report" / "summary.json").read_text())
    settings = {row["subject"]: row["params"] for row in json.loads((output / "sweep.json").read_text())["settings"]}
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        forgotten = [
            row | {"name": f"forgotten_of_{row['data']}", "reference": "frozen", "value": row["change"]}
            for row in summary["retained"]
        ]
        for row in [*summary["questions"], *forgotten]:
            if row["name"] == "setting":
                continue
            low, high = row["interval"] or ("", "")
            chosen = json.dumps(settings.get(row["subject"], {}))
            writer.writerow(
                {
                    "question": row["name"],
                    **{key: row[key] for key in ("subject", "reference", "verdict", "value")},
                    "low": low,
                    "high": high,
                    "settings": chosen,
                }
            )
    runs = [row for row in read_rows("runs") if row["name"] != name]
    written = " ".join(arguments).format(data="DATA", minilm="MINILM", smollm="SMOLLM")
    minutes = f"{summary['makespan_s'] / 60:.1f}"
    runs.append({"name": name, "command": f"lorasweep sweep {written}", "minutes": minutes})
    with (RESULTS / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["name", "command", "minutes"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(runs, key=lambda row: row["name"]))


def read_rows(name: str) -> Rows:
    path = RESULTS / f"{name}.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def write_page() -> None:
    """Writes docs/claims.md from the CSV files."""
    lines = [
        "# Claims on LoRA, tested",
        "",
        "Each statement has a test that could fail, and is run as a sweep (`benchmarks/claims.py`). *Open*: answers",
        "decide neither. The embedded model, which all but `llm` use, is a toy: the page shows how to test a",
        "statement, not what is true of your model. The value is the share of full fine-tuning's gain on test data,",
        "with the interval of the test; of what was forgotten it is the change against the frozen base.",
        "",
    ]
    waiting, shown = [], set()
    for claim in STATEMENTS:
        found = [read_rows(name) for name in claim.results]
        if not all(found):
            waiting.append(f"- {claim.statement} Test: {claim.test}")
            continue
        outcome = {True: "holds", False: "fails", None: "open"}[claim.judge(found)]
        lines += [f"## {claim.statement} {outcome.capitalize()}.", "", f"Test: {claim.test}", ""]
        for name, rows in zip(claim.results, found, strict=True):
            lines += [f"`{name}`, as above.", ""] if name in shown else [f"`{name}`:", "", *_draw_table(rows), ""]
            shown.add(name)
    lines += ["## Not run yet", "", *waiting, ""] if waiting else []
    if rows := read_rows("sentences"):
        lines += ["## Sentences: MiniLM on film reviews", "", *_draw_table(rows), ""]
    lines += ["## Said often, and not a matter of measuring", "", *[f"- {text}" for text in NOT_MEASURED], ""]
    lines += ["## Commands", "", "| result | command | minutes |", "|---|---|--:|"]
    lines += [f"| {row['name']} | `{row['command']}` | {row['minutes']} |" for row in read_rows("runs")]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _draw_table(rows: Rows) -> list[str]:
    lines = ["| question | subject | verdict | value | interval | settings |", "|---|---|---|--:|---|---|"]
    for row in rows:
        value_text = f"{float(row['value']):.3f}" if row["value"] else "–"
        interval = f"[{float(row['low']):.3f}, {float(row['high']):.3f}]" if row["low"] else "–"
        chosen: dict[str, Any] = json.loads(row["settings"])
        settings = ", ".join(f"{key.rsplit('.', 1)[-1]} {v:.3g}" for key, v in chosen.items() if not isinstance(v, str))
        question = row["question"].replace("_", " ")
        lines.append(f"| {question} | {row['subject']} | {row['verdict']} | {value_text} | {interval} | {settings} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *CLAIMS, *WITH_DATA], metavar="NAME")
    parser.add_argument("--data", help="folder with movie_snippets/*.tsv and e2e_nlg/*.jsonl")
    parser.add_argument("--again", action="store_true", help="also repeat what docs/claims already holds")
    parser.add_argument("--page", action="store_true", help="write docs/claims.md and run nothing")
    arguments = parser.parse_args()
    for name in () if arguments.page else arguments.names or CLAIMS:
        if (RESULTS / f"{name}.csv").exists() and not arguments.again:
            continue
        if name in WITH_DATA and arguments.data is None:
            parser.error(f"{name} needs --data")
        folders = {
            "data": arguments.data,
            "minilm": minilm_folder() if name == "sentences" else "",
            "smollm": smollm_folder() if name == "llm" else "",
        }
        run_claim(name, (CLAIMS | WITH_DATA)[name], folders=folders)
    write_page()


if __name__ == "__main__":
    main()
