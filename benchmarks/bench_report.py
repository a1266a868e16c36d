"""Measures the seconds to write the report of a large sweep, and to open it in a browser.

Makes the folder of a sweep that never ran (frozen, full, and LoRA at seven ranks, with a confirm stage), writes its
report and opens the page in headless Chromium where there is one:

    python benchmarks/bench_report.py --trials 1000 --examples 500
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from lorasweep.config.compose import compose_run
from lorasweep.config.data import ScoreMetric
from lorasweep.record import ArmRow, RunRecord, SweepRecord, Trial, write_record

BASE, FULL, STEPS = 2.03, 1.66, 500
FULL_PARAMS = 1_280_000
RANKS = (1, 2, 4, 8, 16, 32, 64)
SEEDS = 5
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1200,900"),
)
PROBE = """<script>addEventListener("load", () => {
  const loaded = performance.now();
  dispatchEvent(new Event("beforeprint"));
  const drawn = performance.now();
  document.querySelector("#trial-table thead th:nth-child(3) button").click();
  document.getElementById("trial-table").offsetHeight;
  document.title = ["probe", loaded, drawn - loaded, performance.now() - drawn].join(" ");
});</script>"""
"""Draws every figure, as printing does, and sorts the table by score."""
WRITE = (
    "import sys; from pathlib import Path; from lorasweep.report.facts import read_findings; "
    "from lorasweep.report.write import write_report; write_report(read_findings(Path(sys.argv[1])))"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[1000])
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--folder", type=Path, help="folder for the sweeps, which is kept; default: a temporary folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for trials in asked.trials:
            folder = (asked.folder or Path(temporary)) / f"large-{trials}"
            if not folder.exists():
                build_sweep(folder, trials=trials, examples=asked.examples)
            measure(folder, trials, Path(temporary))


def measure(folder: Path, trials: int, temporary: Path) -> None:
    """Prints seconds and memory of a sweep's report."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", WRITE, str(folder)], check=True)
    seconds = time.perf_counter() - began
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # of the largest so far
    print(f"{trials:,} trials: report written in {seconds:.1f} s, with {memory:,.0f} MiB of memory")
    sizes = {path.name: path.stat().st_size / 2**20 for path in sorted((folder / "report").iterdir()) if path.is_file()}
    print("  MiB: " + ", ".join(f"{name} {size:.1f}" for name, size in sizes.items() if size >= 0.05))
    if CHROMIUM:
        loaded, drawn, sorted_ = open_page(folder / "report" / "index.html", temporary)
        print(f"  page loaded in {loaded:.1f} s, every figure drawn in {drawn:.1f} s, table sorted in {sorted_:.2f} s")


def open_page(page: Path, temporary: Path) -> tuple[float, float, float]:
    """Returns the seconds to the load event, for drawing all figures, and for sorting the table of trials."""
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={temporary / 'profile'}", "--dump-dom", probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    probed.unlink()
    found = re.search(r"<title>probe ([\d.]+) ([\d.]+) ([\d.]+)</title>", done.stdout)
    if found is None:
        raise RuntimeError("the page did not load")
    loaded, drawn, sorted_ = (float(number) / 1000 for number in found.groups())
    return loaded, drawn, sorted_


def build_sweep(folder: Path, *, trials: int, examples: int) -> Path:
    """Writes the folder of an invented finished sweep."""
    rng = random.Random(0)
    arms = ["frozen", "full", *(f"lora-rank{rank}" for rank in RANKS)]
    each = (trials - 1) // (len(arms) - 1)
    counts = dict.fromkeys(arms, each) | {"frozen": 1, arms[-1]: trials - 1 - each * (len(arms) - 2)}
    rows = [make_trial(folder, arm, number, rng) for arm in arms for number in range(counts[arm])]
    difficulty = [rng.gauss(0, 0.3) for _ in range(examples)]
    confirm = [row for arm in arms for row in make_reruns(folder, arm, rows, difficulty, rng)]
    record = SweepRecord(
        status="complete",
        name="large",
        description="A sweep that never ran, to measure the report.",
        search_metric=ScoreMetric(name="bits_per_byte", direction="minimize"),
        margin="5%",
        definition={},
        arms=[make_arm(arm, counts[arm]) for arm in arms],
        trials=rows,
        confirm=confirm,
        confirm_seeds=list(range(SEEDS)),
        makespan_s=3600.0,
    )
    write_record(record, folder)
    return folder


def make_arm(name: str, trials: int) -> ArmRow:
    lr = {"optim.lr": {"low": 1e-4, "high": 1e-1, "log": True}}
    space = {} if name == "frozen" else lr if name == "full" else {"method.alpha": [1, 2, 4], **lr}
    rank = rank_of(name)
    return ArmRow(
        name=name,
        method=method_of(name),
        trials=trials,
        settings={"method": method_of(name), **({"method.rank": rank} if rank else {})},
        space=space,
    )


def make_trial(folder: Path, arm: str, number: int, rng: random.Random) -> Trial:
    rank, params = rank_of(arm), {}
    if arm != "frozen":
        params["optim.lr"] = 10 ** rng.uniform(-4, -1)
    if rank:
        params["method.alpha"] = rng.choice([1, 2, 4])
    score = ideal_score(arm, params) + rng.gauss(0, 0.003)
    state = "complete" if arm == "frozen" or number % 3 != 2 else "stopped" if number % 4 else "failed"
    row = Trial(
        arm=arm,
        number=number,
        state=state,
        params=params,
        search_score=None if state == "failed" else score,
        run=f"runs/{arm}-{number:04d}",
        reason=None
        if state == "complete"
        else "The loss became NaN."
        if state == "failed"
        else "has learned nothing at half",
    )
    write_run(folder, row.run, row, score)
    return row


def ideal_score(arm: str, params: dict[str, float]) -> float:
    if arm == "frozen":
        return BASE
    rank = rank_of(arm)
    best = 1e-3 if rank is None else 1e-2
    gap = 0.0 if rank is None else 0.11 * rank**-0.6
    return FULL + gap + 0.05 * math.log10(params["optim.lr"] / best) ** 2


def make_reruns(folder: Path, arm: str, rows: list[Trial], difficulty: list[float], rng: random.Random) -> list[Trial]:
    complete = [row for row in rows if row.arm == arm and row.state == "complete"]
    winner = min(complete, key=lambda row: row.search_score or math.inf)
    made = []
    for seed in range(1 if arm == "frozen" else SEEDS):
        value = ideal_score(arm, winner.params) + (0 if arm == "frozen" else rng.gauss(0, 0.004))
        scores = [value + hardness + rng.gauss(0, 0.02) for hardness in difficulty]
        value = sum(scores) / len(scores)
        run = f"runs/{arm}-confirm-{seed:04d}"
        write_run(folder, run, winner, value, test={"bits_per_byte": value})
        lines = [f"{index},{score!r},1.0,document {index // 60}" for index, score in enumerate(scores)]
        (folder / run / "test_scores.csv").write_text("\n".join(["row,score,weight,group", *lines, ""]))
        made.append(
            Trial(
                stage="confirm",
                number=0,
                params={},
                arm=arm,
                setting_number=0,
                seed=seed,
                state="complete",
                run=run,
                test_scores={"bits_per_byte": value},
            )
        )
    return made


def write_run(folder: Path, run: str, row: Trial, score: float, **values: object) -> None:
    rank, method = rank_of(row.arm), method_of(row.arm)
    trained = {"frozen": 0, "full": FULL_PARAMS}.get(method, 11_264 * (rank or 0))
    lr = row.params.get("optim.lr", 1e-3)
    settings = {"rank": rank, "alpha": row.params.get("method.alpha", 1), "scaling": "alpha"} if rank else {}
    steps = 0 if method == "frozen" else STEPS // 4 if row.state != "complete" else STEPS
    record = RunRecord(
        status=row.state if row.state != "running" else "complete",
        config=settings_of(method) | {"method": {"name": method, **settings}, "optim": {"lr": lr}},
        arm=row.arm,
        trial=row.number,
        metric="bits_per_byte",
        direction="minimize",
        wall_s=0.05 * steps + 1e-6 * trained,
        steps_planned=STEPS if steps else 0,
        steps_done=steps,
        tokens_trained=steps * 2048,
        trainable_params=trained,
        total_params=FULL_PARAMS + trained,
        trainable_fraction=trained / FULL_PARAMS,
        adapter_bytes=4 * trained,
        peak_memory_bytes=400 * 2**20 + 16 * trained,
        best={"bits_per_byte": score, "step": steps},
        packages={f"package-{number}": "1.2.3" for number in range(17)},
        files={"best/adapter_model.safetensors": {"bytes": 1, "sha256": "0" * 64}},
        **values,  # type: ignore[arg-type]
    )
    (folder / run).mkdir(parents=True)
    (folder / run / "run.json").write_text(
        json.dumps(asdict(record), indent=1)
    )  # not `write_record`, which waits for the disk
    lines = []
    for step in range(steps + 1):
        if step:
            lines.append({"step": step, "loss": 1.2 + 1 / (step + 1), "lr": lr, "tokens_per_s": 52_000.0})
        if step % 25 == 0:
            value = score + (BASE - score) * math.exp(-6 * step / STEPS)
            lines.append({"step": step, "validation": {"bits_per_byte": value, "loss": 0.7 * value}})
    (folder / run / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@cache
def settings_of(method: str) -> dict[str, Any]:
    """Returns all settings of a run."""
    return asdict(compose_run({"method": method}))


def method_of(arm: str) -> str:
    return arm.split("-")[0]


def rank_of(arm: str) -> int | None:
    return int(arm.removeprefix("lora-rank")) if arm.startswith("lora-rank") else None


if __name__ == "__main__":
    main()
