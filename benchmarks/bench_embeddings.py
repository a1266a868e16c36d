"""Training of an embedding model side by side with sentence-transformers and PEFT: the time of a trial-step.

    python benchmarks/bench_embeddings.py --data pairs.jsonl [--model FOLDER] [--sizes 1 4] [--batch-size 32]
        [--steps 20] [--rounds 3] [--threads 2]
    python benchmarks/bench_embeddings.py --quick    # few steps of few pairs: only checks that it runs

`--data` has `anchor` and `positive`. Both sides train LoRA of rank 8 on every linear layer of MiniLM-L6 in fp32 with
in-batch negatives and AdamW, on random batches: sentence-transformers' trainer one run, ours packs of `--sizes` runs.
Every way is a process of its own and takes its turn in each round. A trial-step is the median time from one step's
start to the next without the first three, over the number of runs. sentence-transformers is no dependency. In a sweep
on a CPU a pack is smaller where its pass would have more than 2,048 tokens in fp32, or 4,096 in bf16.
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
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

RANK, ALPHA, LR = 8, 16, 1e-3
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
NUM_FIRST = 3
"""Steps that are not counted."""
OTHER_ROWS = 64
"""Pairs for validation, and for test: both must be there, but only training is compared."""


def train_theirs(work: Mapping[str, Any]) -> list[float]:
    """Returns the times at which the steps of sentence-transformers' trainer began."""
    import sentence_transformers as st  # noqa: PLC0415 (slow to import)
    from datasets import load_dataset  # noqa: PLC0415
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss  # noqa: PLC0415
    from transformers import TrainerCallback  # noqa: PLC0415

    times: list[float] = []

    class NoteTime(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    model = st.SentenceTransformer(work["model"], device="cpu")
    model[0].auto_model.requires_grad_(requires_grad=False)
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    inject_adapter_in_model(settings, model[0].auto_model)  # as `add_adapter` does
    with tempfile.TemporaryDirectory() as folder:
        st.SentenceTransformerTrainer(
            model=model,
            args=st.SentenceTransformerTrainingArguments(
                output_dir=folder,
                max_steps=work["steps"],
                per_device_train_batch_size=work["batch_size"],
                learning_rate=LR,
                lr_scheduler_type="constant",
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=load_dataset("json", data_files=work["train"], split="train"),
            loss=MultipleNegativesRankingLoss(model),
            callbacks=[NoteTime()],
        ).train()
    return times


def train_ours(work: Mapping[str, Any]) -> list[float]:
    """Returns the times at which the steps of a pack of equal runs with different rates began."""
    from lorasweep.config.compose import compose_run  # noqa: PLC0415 (imports torch, which reads OMP_NUM_THREADS)
    from lorasweep.training.inputs import load_inputs  # noqa: PLC0415
    from lorasweep.training.open_run import RunFolder, RunRequest  # noqa: PLC0415
    from lorasweep.training.run import train_runs  # noqa: PLC0415

    settings = {
        "model": "embedder",
        "model.path": work["model"],
        "data": "embeddings",
        **{f"data.{split}": work[split] for split in ("train", "validation", "test")},
        "method": "lora",
        "method.rank": RANK,
        "method.alpha": ALPHA,
        "trainer.max_steps": work["steps"],
        "trainer.batch_size": work["batch_size"],
        "trainer.eval_every_steps": work["steps"],
        "trainer.precision": "fp32",
        "trainer.progress": False,
        "schedule": "constant",
        "schedule.warmup_fraction": 0.0,
        "logger": "none",
    }
    configs = [compose_run({**settings, "optim.lr": LR / 2**n}) for n in range(work["runs"])]
    times: list[float] = []

    def note_time() -> bool:
        times.append(time.perf_counter())
        return False

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = load_inputs(configs[0]).prepare(configs[0], folder=folder)
        train_runs(
            [RunRequest(config=one, run_folder=RunFolder(path=folder / str(n))) for n, one in enumerate(configs)],
            inputs=inputs,
            on_evaluation=lambda evaluations: [None] * len(evaluations),
            on_end=lambda request, record: None,
            checkpoint_file=folder / "pack.ckpt",
            stop_requested=note_time,
        )
    return times[: work["steps"]]


def measure(runs: int, work: Mapping[str, Any]) -> float:
    """Returns the seconds of a trial-step of a pack of `runs`; 0 is sentence-transformers. In a process of its own."""
    command = [sys.executable, __file__, "--work", json.dumps({**work, "runs": runs})]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"{runs or 'their'} run(s) failed:\n{found.stderr[-3000:]}")
    times = json.loads(found.stdout.splitlines()[-1])
    return statistics.median(later - earlier for earlier, later in pairwise(times[NUM_FIRST:])) / max(runs, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="jsonl file with anchor and positive")
    parser.add_argument("--model", help="folder of a model; default: MiniLM-L6")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 4], help="numbers of runs of a pack")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few steps of few pairs: only checks that it runs")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)  # this process is one that is measured
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps((train_ours if arguments.work["runs"] else train_theirs)(arguments.work)))
        return
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    if arguments.quick:
        vars(arguments).update(steps=NUM_FIRST + 3, rounds=1, batch_size=4, sizes=[2])
    elif arguments.data is None:
        parser.error("--data must name a file of pairs, unless --quick is given.")
    needed = arguments.steps * arguments.batch_size + 2 * OTHER_ROWS
    lines = [json.dumps({"anchor": f"What is {n} + 1?", "positive": f"It is {n + 1}."}) for n in range(needed)]
    if arguments.data:
        lines = arguments.data.read_text(encoding="utf-8").splitlines()
    if len(lines) < needed:
        parser.error(f"--data must have at least {needed} pairs, but has {len(lines)}.")
    from machine import measure_machine  # noqa: PLC0415 (imports torch, which reads OMP_NUM_THREADS)
    from real_weights import minilm_folder  # noqa: PLC0415
    from side_by_side import print_head, print_row  # noqa: PLC0415

    work = {"steps": arguments.steps, "batch_size": arguments.batch_size}
    work["model"] = arguments.model or str(minilm_folder())
    seconds: dict[int, list[float]] = {runs: [] for runs in (0, *arguments.sizes)}
    with tempfile.TemporaryDirectory() as name:
        ends = {"validation": OTHER_ROWS, "test": 2 * OTHER_ROWS, "train": needed}
        first = 0
        for split, end in ends.items():
            path = Path(name, f"{split}.jsonl")
            path.write_text("\n".join(lines[first:end]) + "\n", encoding="utf-8")
            work[split], first = str(path), end
        for _ in range(arguments.rounds):
            for runs, found in seconds.items():
                found.append(measure(runs, work))
    print(f"{measure_machine()}\nfp32, {arguments.batch_size} pairs a step, {arguments.threads} threads\n")
    print_head("way", "ms a trial-step", "over sentence-transformers")
    for runs, found in seconds.items():
        ratio = statistics.median(one / other for one, other in zip(found, seconds[0], strict=True))
        print_row(f"a pack of {runs}" if runs else "sentence-transformers", 1000 * statistics.median(found), ratio)


if __name__ == "__main__":
    main()
