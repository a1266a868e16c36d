"""Trains preferences with TRL's DPOTrainer, one learning rate after another, and measures it.

    python benchmarks/trl_dpo.py WORK.json --output RESULT.json

`bench_preferences.py` starts this script and writes WORK.json, with the tokens of the pairs in the order in which both
sides train them. The script imports nothing of lorasweep. TRL is no dependency: `pip install trl`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import peft
import safetensors.torch
import torch
import transformers

MEASURED = ("rewards/chosen", "rewards/rejected")


def import_trl() -> ModuleType:
    """Returns TRL. Raises SystemExit if it is not installed."""
    try:
        import trl  # noqa: PLC0415 (it is no dependency)
    except ImportError:
        raise SystemExit("The side by side needs TRL, which is no dependency: pip install trl") from None
    return trl


def make_trainer_class(trl: Any) -> Any:
    """Returns a DPOTrainer that trains given tokens, and keeps the loss and the rewards of each step unrounded."""

    class MeasuredDPOTrainer(trl.DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: datasets.Dataset, *_: Any) -> datasets.Dataset:
            return dataset

        def _compute_loss(self, *arguments: Any, **named: Any) -> torch.Tensor:
            if not hasattr(self, "kept"):
                self.kept: dict[str, list[float]] = defaultdict(list)
            loss = super()._compute_loss(*arguments, **named)
            self.kept["loss"].append(float(loss.detach()))
            for name in MEASURED:
                self.kept[name].append(self._metrics["train"][name][-1])
            return loss

    return MeasuredDPOTrainer


class StepTimer(transformers.TrainerCallback):
    """Keeps when the training began, and when each step ended."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.times: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.times.append(self.clock())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(self.clock())


def train(work: dict[str, Any], lr: float, rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Trains one run as TRL does, from loading the model on."""
    trl, timer, lora = import_trl(), StepTimer(getattr(time, work["clock"])), None
    if work["method"] == "lora":
        lora = peft.LoraConfig(
            r=work["rank"], lora_alpha=work["alpha"], target_modules=work["targets"], task_type="CAUSAL_LM"
        )
    trainer = make_trainer_class(trl)(
        model=work["model"],
        peft_config=lora,
        args=trl.DPOConfig(
            output_dir=str(folder),
            max_steps=work["steps"],
            per_device_train_batch_size=work["batch_size"],
            learning_rate=lr,
            beta=work["beta"],
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            max_length=None,
            train_sampling_strategy="sequential",
            bf16=work["precision"] == "bf16",
            model_init_kwargs={"dtype": "float32"},
            gradient_checkpointing=work["checkpointing"],
            precompute_ref_log_probs=work["precomputed"],
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(work["model"]),
        callbacks=[timer],
    )
    if work["adapter"] is not None and lora is not None:  # the same initial values
        weights = safetensors.torch.load_file(Path(work["adapter"]) / "adapter_model.safetensors")
        unused = peft.set_peft_model_state_dict(trainer.model, weights).unexpected_keys
        assert not unused, unused
    trainer.train()
    return {**trainer.kept, "times": timer.times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    import_trl()  # before the clock starts
    work = json.loads(arguments.work.read_text())
    rows = json.loads(Path(work["tokens"]).read_text())
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    clock = getattr(time, work["clock"])
    started = clock()
    with tempfile.TemporaryDirectory() as name:
        runs = [train(work, lr, rows, Path(name) / str(n)) for n, lr in enumerate(work["rates"])]
    seconds = clock() - started
    arguments.output.write_text(json.dumps({"runs": runs, "seconds": seconds}))


if __name__ == "__main__":
    main()
