"""Compares a whole sweep with today's way to do the same work, from the start of the command to its end.

    python benchmarks/bench_today.py [--data movie_snippets|...] [--model FOLDER-OR-HUB-ID] [--seeds 0 1 2]
        [--train 2000] [--validation 1000] [--trials 8] [--steps 130] [--ways today tuned tuned2 ours default]
        [--threads 2] [--short] [--quick]

Every way searches LoRA's rank (1 to 64) and learning rate for the same classifier of sentences (default: MiniLM-L6 with
real weights) in the same space, with 8 trials of 130 steps of 16 sentences and 5 evaluations:

    today   Optuna with MedianPruner, PEFT and transformers' Trainer at their defaults (benchmarks/trainer_sweep.py)
    tuned   the same in bf16, grouped by length, with evaluation batch 32, and without pruning
    tuned2  the tuned way in two processes of one thread on one study
    ours    `lorasweep sweep` with these evaluations
    default `lorasweep sweep` as it comes: evaluations at half of a run and at its end on an eighth of the examples,
            then once on all

lorasweep runs no confirm stage (`confirm.seeds=0`), because the other ways have none. Each way is a process of its own
that reads the same files. The makespan is the time from its start to its end, imports included. Training steps are
timed inside the processes and added up, and `other` is the rest of the makespan (negative if several processes train
at once). `cores busy` are the processor's seconds over the makespan. Memory is the maximum over time of what all
processes of a way have resident, shared pages counted once (PSS).

The test score is that of the best trial's adapter, which PEFT loads in fp32 after the measurement. With several seeds,
every way runs once per seed (of sampler, initial values, data order and dropout), and the first way changes. A cell is
then the median, with the range in brackets. The last columns are ratios of makespans with the same seed. The first line
names the speed of the machine. `--short` has fewer steps and sentences.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from real_weights import minilm_folder
from sentences import add_data_argument, load_sentences, write_sentences

from lorasweep.record import read_run
from lorasweep.results import load_sweep

WORK: Mapping[str, Any] = {
    "ranks": [1, 2, 4, 8, 16, 32, 64],
    "alpha_over_rank": 2,
    "lr_low": 5e-4,
    "lr_high": 1e-2,
    "trials": 8,
    "steps": 130,
    "batch_size": 16,
    "evaluations": 5,
    "max_length": 128,
    "warmup_fraction": 0.06,
}
SHORT = {"train": 2000, "validation": 400, "steps": 50}
QUICK = {"trials": 2, "steps": 6, "evaluations": 2, "batch_size": 4}
QUICK_SENTENCES = 40
TRAINER_SCRIPT = Path(__file__).parent / "trainer_sweep.py"
WAYS = {
    "today": "Optuna + PEFT + Trainer",
    "tuned": "the same, tuned",
    "tuned2": "the same, tuned, two processes",
    "ours": "lorasweep sweep",
    "default": "lorasweep sweep, own evaluations",
}
TRAINER_WAYS = ("today", "tuned", "tuned2")
MEMORY_INTERVAL_S = 0.5
"""Seconds between two looks at the memory."""
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one way took and found with one seed."""

    makespan_s: float
    training_s: float
    """Seconds of the training steps."""
    steps: int
    """Optimizer steps of all trials."""
    peak_memory_bytes: int
    """Maximum resident memory of all processes, with shared pages counted once."""
    cores: float
    """Seconds of the processor over those of the makespan."""
    gpu_peak_memory_bytes: float
    best_score: float
    """Best validation accuracy of a complete trial."""
    best_params: Mapping[str, Any]
    test_score: float

    @property
    def other_s(self) -> float:
        return self.makespan_s - self.training_s


def run_way(way: str, work: Mapping[str, Any], folder: Path) -> Outcome:
    """Runs a way in its own process, and scores its best adapter on test data."""
    folder.mkdir()
    output = folder / "output"
    if way in TRAINER_WAYS:
        output.mkdir()
        (folder / "work.json").write_text(json.dumps(work))
        command = [str(TRAINER_SCRIPT), str(folder / "work.json"), "--output", str(output)]
        command += ["--tuned"] if way != "today" else []
        command += ["--processes", "2"] if way == "tuned2" else []
    else:
        (folder / "sweep.yaml").write_text(yaml.safe_dump(describe_sweep(work)))
        command = ["-m", "lorasweep", "sweep", str(folder / "sweep.yaml"), f"sweep.output={output}"]
        if way == "default":
            command += [f"trainer.eval_every_steps={work['steps'] // 2}", "trainer.eval_fraction=0.125"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")}  # so that no seed reads another's rows
    makespan_s, cores, peak_memory_bytes = run_process(command, log=folder / "log.txt", environment=environment)
    result = json.loads((output / "result.json").read_text()) if way in TRAINER_WAYS else read_result(output)
    return Outcome(
        makespan_s=makespan_s,
        peak_memory_bytes=peak_memory_bytes,
        cores=cores,
        test_score=score_adapter(Path(result.pop("best_adapter")), work),
        **result,
    )


def run_process(command: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> tuple[float, float, int]:
    """Runs Python with a command and returns the seconds, the cores in use and the maximum resident memory in bytes.

    Raises SystemExit with the end of its output if it fails.
    """
    with log.open("w") as file:
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command], stdout=file, stderr=file, env=environment)
        peak, found = 0, 0
        while not found:
            peak = max(peak, measure_memory(process.pid))
            time.sleep(MEMORY_INTERVAL_S)
            found, status, usage = os.wait4(process.pid, os.WNOHANG)
        seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)  # the process was waited for without `subprocess`
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}:\n{log.read_text()[-3000:]}")
    return seconds, (usage.ru_utime + usage.ru_stime) / seconds, peak


def measure_memory(number: int) -> int:
    """Returns the resident bytes of a process and its children, with shared pages counted once where Linux tells."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(number)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                used = process.memory_full_info()
                total += getattr(used, "pss", used.rss)
    return total


def describe_sweep(work: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a sweep file for the work. Every other setting has its default."""
    settings = {
        "model": "classifier",
        "model.path": work["model"],
        "data": "table",
        **{f"data.{split}": work[split] for split in ("train", "validation", "test")},
        "data.max_length": work["max_length"],
        "data.metric": "accuracy",
        "trainer.max_steps": work["steps"],
        "trainer.batch_size": work["batch_size"],
        "trainer.eval_fraction": 1,
        "trainer.eval_every_steps": work["steps"] // work["evaluations"],
        "schedule.warmup_fraction": work["warmup_fraction"],
        "seed": work["seed"],
        "sweep.seed": work["seed"],
        "confirm.seeds": 0,
    }
    space = {
        "method.rank": work["ranks"],
        "optim.lr": {"low": work["lr_low"], "high": work["lr_high"], "log": True},
    }
    arm = {
        "settings": {"method": "lora", "method.scaling": "alpha", "method.alpha": work["alpha_over_rank"]},
        "space": space,
        "trials": work["trials"],
    }
    return {"name": "today", "settings": settings, "arms": {"lora": arm}}


def read_result(folder: Path) -> dict[str, Any]:
    """Returns the fields of `Outcome`, and the folder of the best adapter, from a sweep's record."""
    sweep = load_sweep(folder)
    best, runs = sweep.best("lora"), [read_run(folder / trial.run) for trial in sweep.record.trials]
    has_gpu = sweep.record.device.startswith("cuda")
    return {
        "training_s": sum(run.tokens_trained / run.tokens_per_s for run in runs if run.tokens_trained),
        "gpu_peak_memory_bytes": max(run.peak_memory_bytes for run in runs) if has_gpu else 0,
        "steps": sum(trial.step for trial in sweep.record.trials),
        "best_score": best.search_score,
        "best_params": {"rank": best.params["method.rank"], "lr": best.params["optim.lr"]},
        "best_adapter": str(sweep.load_run(best).folder / "best"),
    }


def score_adapter(adapter: Path, work: Mapping[str, Any]) -> float:
    """Returns the accuracy of an adapter on test data, in fp32."""
    import peft  # noqa: PLC0415 (slow to import, and not needed before the first way has ended)
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    rows = [json.loads(line) for line in Path(work["test"]).read_text().splitlines()]
    names = sorted({json.loads(line)["label"] for line in Path(work["train"]).read_text().splitlines()})
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = transformers.AutoTokenizer.from_pretrained(work["model"])
    base = transformers.AutoModelForSequenceClassification.from_pretrained(work["model"], num_labels=len(names))
    model = peft.PeftModel.from_pretrained(base, adapter).to(device).eval()
    rows.sort(key=lambda row: len(row["text"]))  # little padding
    num_right = 0
    for first in range(0, len(rows), 32):
        batch = rows[first : first + 32]
        tokens = tokenizer(
            [row["text"] for row in batch],
            truncation=True,
            max_length=work["max_length"],
            padding=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            predictions = model(**tokens.to(device)).logits.argmax(-1).tolist()
        num_right += sum(names[n] == row["label"] for n, row in zip(predictions, batch, strict=True))
    return num_right / len(rows)


def format_table(outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """Returns the table: a row for each way, with one outcome for each seed."""
    has_gpu = any(one.gpu_peak_memory_bytes for ones in outcomes.values() for one in ones)
    bases = [way for way in ("ours", "default") if way in outcomes]
    seconds = ("makespan", "training", "other")
    lines = [
        f"| way | {' | '.join(f'{name} s' for name in seconds)} | cores busy | steps | memory MiB | "
        f"{'GPU MiB | ' if has_gpu else ''}best validation | test | "
        f"{' | '.join(f'over {WAYS[way]}' for way in bases)} |",
        f"|---|{'--:|' * (len(seconds) + 5 + has_gpu + len(bases))}",
    ]
    for way, ones in outcomes.items():
        cells = [format_values([getattr(one, f"{name}_s") for one in ones], ".1f") for name in seconds]
        cells.append(format_values([one.cores for one in ones], ".2f"))
        cells.append(format_values([one.steps for one in ones], ",.0f"))
        cells.append(format_values([one.peak_memory_bytes / MIB for one in ones], ",.0f"))
        if has_gpu:
            cells.append(format_values([one.gpu_peak_memory_bytes / MIB for one in ones], ",.0f"))
        cells.append(format_values([one.best_score for one in ones], ".3f"))
        cells.append(format_values([one.test_score for one in ones], ".3f"))
        for base in bases:
            pairs = zip(ones, outcomes[base], strict=True)
            cells.append(format_values([one.makespan_s / other.makespan_s for one, other in pairs], ".2f"))
        lines.append(f"| {WAYS[way]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_values(values: Sequence[float], spec: str) -> str:
    """Returns the median, and the range if there are several different values."""
    median, low, high = (format(value, spec) for value in (statistics.median(values), min(values), max(values)))
    return median if low == high else f"{median} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    parser.add_argument("--model", help="folder or hub id of a model for text classification; default: MiniLM-L6")
    parser.add_argument("--train", type=int, default=2000, help="training sentences, evenly spaced")
    parser.add_argument("--validation", type=int, default=1000, help="validation sentences, evenly spaced")
    parser.add_argument("--trials", type=int, default=WORK["trials"])
    parser.add_argument("--steps", type=int, default=WORK["steps"], help="of each trial, with 5 evaluations")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of every way; default: as many as torch chooses")
    parser.add_argument("--short", action="store_true", help=f"smaller sizes: {SHORT}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only checks that it runs")
    arguments = parser.parse_args()
    if arguments.short:
        vars(arguments).update(SHORT)
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    sizes = {"train": arguments.train, "validation": arguments.validation, "test": 10**9}
    if arguments.quick:
        sizes = dict.fromkeys(sizes, QUICK_SENTENCES)
    work = {**WORK, "trials": arguments.trials, "steps": arguments.steps, **(QUICK if arguments.quick else {})}
    work["model"] = arguments.model or str(minilm_folder())
    outcomes: dict[str, list[Outcome]] = {way: [] for way in WAYS if way in arguments.ways}
    with tempfile.TemporaryDirectory() as name:
        tables = write_sentences(load_sentences(arguments.data), Path(name), sizes=sizes)
        work |= {split: str(path) for split, path in tables.items()}
        for n, seed in enumerate(arguments.seeds):
            first = n % len(outcomes)
            for way in [*outcomes, *outcomes][first : first + len(outcomes)]:
                outcome = run_way(way, {**work, "seed": seed}, Path(name) / f"{way}-{seed}")
                outcomes[way].append(outcome)
                print(f"seed {seed}, {WAYS[way]}: {outcome.makespan_s:.1f} s", file=sys.stderr, flush=True)
        counts = [f"{len(path.read_text().splitlines()):,} {split}" for split, path in tables.items()]
    from machine import measure_machine  # noqa: PLC0415 (imports torch, which reads OMP_NUM_THREADS)

    print(f"\n{measure_machine()}")
    print(
        f"{arguments.data}: {', '.join(counts)} sentences; {work['trials']} trials of {work['steps']} steps of "
        f"{work['batch_size']} with {work['evaluations']} evaluations; {arguments.threads or 'default'} threads; "
        f"seeds {' '.join(map(str, arguments.seeds))}\n\n{format_table(outcomes)}"
    )


if __name__ == "__main__":
    main()
