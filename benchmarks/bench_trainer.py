"""Compares a classification run of lorasweep with Hugging Face's Trainer with PEFT: same model, data, steps and rate.

    python benchmarks/bench_trainer.py --train train.tsv --validation validation.tsv --model FOLDER
        [--steps 125] [--evaluations 5] [--rank 8] [--lr 1e-3] [--threads 2] [--quick]

Three ways, one after another in one process, each from loaded weights and tokenised rows to the last evaluation:
`lorasweep` (`lorasweep train`'s own function, its defaults: bf16 where the hardware computes in it), `Trainer` with
PEFT at their defaults (fp32, evaluation batch 8), and `Trainer, tuned` with what an expert sets by hand (bf16 autocast
where lorasweep uses bf16, grouping by length, evaluation batch 32). Tables have columns `text` and `label`. A cell is
the ratio of the whole time, training and evaluation, to lorasweep's; accuracy is the best of the evaluations.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers

from lorasweep.config.compose import compose_run
from lorasweep.training.inputs import build_inputs
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunFolder

BATCH_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Time and accuracy of one variant."""

    wall_s: float
    train_s: float
    accuracy: float
    tokens_per_s: float
    """Real training tokens per second of training time."""


def run_ours(arguments: argparse.Namespace) -> Outcome:
    config = compose_run(
        {
            "model": "classifier",
            "model.path": arguments.model,
            "data": "table",
            "data.train": arguments.train,
            "data.validation": arguments.validation,
            "data.max_length": 128,
            "method.rank": arguments.rank,
            "method.alpha": 2 * arguments.rank,
            "optim.lr": arguments.lr,
            "trainer.max_steps": arguments.steps,
            "trainer.batch_size": BATCH_SIZE,
            "trainer.eval_every_steps": arguments.steps // arguments.evaluations,
            "trainer.progress": False,
        }
    )
    inputs = build_inputs(config)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        record = train_run(config, RunFolder(path=Path(folder) / "run"), inputs=inputs)
        wall_s = time.perf_counter() - started
    train_s = record.tokens_trained / record.tokens_per_s
    return Outcome(wall_s=wall_s, train_s=train_s, accuracy=record.best["accuracy"], tokens_per_s=record.tokens_per_s)


class Timed(transformers.TrainerCallback):
    """Seconds in training steps, evaluation left out."""

    def __init__(self) -> None:
        self.train_s = 0.0
        self.started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Starts the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stops the clock."""
        self.train_s += time.perf_counter() - self.started


def run_trainer(arguments: argparse.Namespace, *, tuned: bool, bf16: bool) -> Outcome:
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    rows = datasets.load_dataset(
        "csv", data_files={"train": arguments.train, "validation": arguments.validation}, sep="\t", quoting=3
    )
    names = sorted(set(rows["train"]["label"]))

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        made = dict(tokenizer(batch["text"], truncation=True, max_length=128))
        return {**made, "labels": [names.index(label) for label in batch["label"]]}

    rows = rows.map(tokenise, batched=True, remove_columns=["text", "label"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=len(names))
    settings = peft.LoraConfig(
        r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules="all-linear", task_type="SEQ_CLS"
    )
    model = peft.get_peft_model(model, settings)
    timed = Timed()
    expert = {"train_sampling_strategy": "group_by_length", "bf16": bf16, "per_device_eval_batch_size": 32}
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=folder,
                max_steps=arguments.steps,
                per_device_train_batch_size=BATCH_SIZE,
                learning_rate=arguments.lr,
                lr_scheduler_type="linear",
                warmup_steps=int(0.06 * arguments.steps),
                weight_decay=0.0,
                eval_strategy="steps",
                eval_steps=arguments.steps // arguments.evaluations,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                dataloader_pin_memory=torch.cuda.is_available(),
                **(expert if tuned else {}),
            ),
            train_dataset=rows["train"],
            eval_dataset=rows["validation"],
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
            callbacks=[timed],
        )
        started = time.perf_counter()
        trainer.train()
        wall_s = time.perf_counter() - started
    scores = [row["eval_accuracy"] for row in trainer.state.log_history if "eval_accuracy" in row]
    lengths = [len(row) for row in rows["train"]["input_ids"]]
    tokens = arguments.steps * BATCH_SIZE * sum(lengths) / len(lengths)
    return Outcome(wall_s=wall_s, train_s=timed.train_s, accuracy=max(scores), tokens_per_s=tokens / timed.train_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="tsv with columns text and label")
    parser.add_argument("--validation", required=True)
    parser.add_argument("--model", required=True, help="folder or hub id of an encoder")
    parser.add_argument("--steps", type=int, default=125)
    parser.add_argument("--evaluations", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="10 steps, 1 evaluation: does it run?")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.evaluations = 10, 1
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    ours = run_ours(arguments)
    bf16 = bool(torch.cpu.get_capabilities().get("avx512_bf16")) or torch.cuda.is_available()
    others = {
        "Trainer + PEFT": run_trainer(arguments, tuned=False, bf16=bf16),
        "Trainer + PEFT, tuned": run_trainer(arguments, tuned=True, bf16=bf16),
    }
    print(
        f"\n{arguments.steps} steps of {BATCH_SIZE} rows, {arguments.evaluations} evaluations, r = {arguments.rank}\n"
    )
    print("| way | whole s | training s | tokens/s | × lorasweep's time | best accuracy |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, found in {"lorasweep": ours, **others}.items():
        print(
            f"| {name} | {found.wall_s:.1f} | {found.train_s:.1f} | {found.tokens_per_s:,.0f} | "
            f"{found.wall_s / ours.wall_s:.2f} | {found.accuracy:.3f} |"
        )


if __name__ == "__main__":
    main()
