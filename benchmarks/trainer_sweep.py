"""Today's way to search LoRA's rank and learning rate: Optuna, PEFT and transformers' Trainer, trial after trial.

    python benchmarks/trainer_sweep.py WORK.json --output FOLDER [--tuned] [--processes 2]

`bench_today.py` starts this script and writes WORK.json. The script imports nothing of lorasweep. Trainer has its
defaults (fp32, random batches, evaluation batch 8), and Optuna's MedianPruner stops trials. With `--tuned` it has the
settings that an expert chooses: bf16 where the hardware computes in it, batches grouped by length, evaluation batch 32,
and no pruning. Both have a linear schedule with warm-up, as lorasweep has by default. With several processes, each has
one thread and its share of the trials, and all read and write one study. Writes FOLDER/result.json, and the adapter of
each trial's best evaluation.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import datasets
import optuna
import peft
import torch
import transformers


class TrialCallback(transformers.TrainerCallback):
    """Reports a trial's evaluations to Optuna, stops a pruned trial, keeps its best weights, and times the steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.training_s = 0.0
        self.steps = 0
        self._began_s = 0.0

    def start_trial(self, trial: optuna.Trial) -> None:
        self.trial, self.best = trial, -1.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began_s = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.training_s += time.perf_counter() - self._began_s
        self.steps += 1

    def on_evaluate(self, args: Any, state: Any, control: Any, *, metrics: Any, model: Any, **__: Any) -> None:
        accuracy = metrics["eval_accuracy"]
        if accuracy > self.best:
            self.best = accuracy
            model.save_pretrained(self.folder / str(self.trial.number))
        self.trial.report(accuracy, state.global_step)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def open_study(work: dict[str, Any], folder: Path, *, tuned: bool, number: int = 0) -> optuna.Study:
    """Returns the study of all processes. Its sampler has the seed of the process `number`."""
    storage = optuna.storages.journal.JournalFileBackend(str(folder / "journal.log"))
    return optuna.create_study(
        study_name="today",
        storage=optuna.storages.JournalStorage(storage),
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=work["seed"] + 1000 * number),
        pruner=optuna.pruners.NopPruner() if tuned else optuna.pruners.MedianPruner(),
    )


def run_trials(number: int, work: dict[str, Any], folder: Path, *, tuned: bool, processes: int) -> dict[str, Any]:
    """Runs the share of the trials of one process, and returns what it took."""
    if processes > 1:
        torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(work["model"])
    files = {split: work[split] for split in ("train", "validation")}
    rows = datasets.load_dataset("json", data_files=files)
    names = sorted(set(rows["train"]["label"]))

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        tokens = dict(tokenizer(batch["text"], truncation=True, max_length=work["max_length"]))
        return {**tokens, "labels": [names.index(label) for label in batch["label"]]}

    rows = rows.map(tokenise, batched=True, remove_columns=["text", "label"])
    has_gpu = torch.cuda.is_available()
    expert: dict[str, Any] = {
        "bf16": bool(torch.cpu.get_capabilities().get("avx512_bf16")) or (has_gpu and torch.cuda.is_bf16_supported()),
        "train_sampling_strategy": "group_by_length",
        "per_device_eval_batch_size": 32,
    }
    callback = TrialCallback(folder)

    def objective(trial: optuna.Trial) -> float:
        rank = trial.suggest_categorical("rank", work["ranks"])
        lr = trial.suggest_float("lr", work["lr_low"], work["lr_high"], log=True)
        transformers.set_seed(work["seed"])
        model = transformers.AutoModelForSequenceClassification.from_pretrained(work["model"], num_labels=len(names))
        settings = peft.LoraConfig(
            r=rank, lora_alpha=work["alpha_over_rank"] * rank, target_modules="all-linear", task_type="SEQ_CLS"
        )
        callback.start_trial(trial)
        trainer = transformers.Trainer(
            model=peft.get_peft_model(model, settings),
            args=transformers.TrainingArguments(
                output_dir=str(folder / f"trainer-{number}"),
                seed=work["seed"],
                max_steps=work["steps"],
                per_device_train_batch_size=work["batch_size"],
                learning_rate=lr,
                warmup_steps=round(work["warmup_fraction"] * work["steps"]),
                eval_strategy="steps",
                eval_steps=work["steps"] // work["evaluations"],
                save_strategy="no",  # the callback keeps the best weights
                disable_tqdm=True,
                use_cpu=not has_gpu,
                dataloader_pin_memory=has_gpu,
                **(expert if tuned else {}),
            ),
            train_dataset=rows["train"],
            eval_dataset=rows["validation"],
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
            callbacks=[callback],
        )
        trainer.train()
        return callback.best

    study = open_study(work, folder, tuned=tuned, number=number)
    study.optimize(objective, n_trials=len(range(number, work["trials"], processes)))
    return {
        "training_s": callback.training_s,
        "steps": callback.steps,
        "gpu_peak_memory_bytes": torch.cuda.max_memory_allocated() if has_gpu else 0,
    }


def run_study(work: dict[str, Any], folder: Path, *, tuned: bool, processes: int) -> dict[str, Any]:
    """Runs all trials and returns what `result.json` holds."""
    study = open_study(work, folder, tuned=tuned)
    run = functools.partial(run_trials, work=work, folder=folder, tuned=tuned, processes=processes)
    if processes == 1:
        taken = [run(0)]
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            taken = pool.map(run, range(processes), chunksize=1)
    return {
        **{key: sum(one[key] for one in taken) for key in taken[0]},
        "best_score": study.best_value,
        "best_params": study.best_params,
        "best_adapter": str(folder / str(study.best_trial.number)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK.json")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    work = json.loads(arguments.work.read_text())
    result = run_study(work, arguments.output, tuned=arguments.tuned, processes=arguments.processes)
    (arguments.output / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
