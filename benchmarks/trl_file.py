"""Trains a YAML file as `trl sft|dpo --config FILE` does, and keeps the loss of each step.

    python benchmarks/trl_file.py WORK.json --output RESULT.json

`bench_recipes.py` starts this script. TRL's own parser reads the file, and TRL's own script trains it: only the order
of the examples and the initial values of the adapter are given. TRL is no dependency: `pip install trl`.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import datasets
import peft
import safetensors.torch
import torch
from trl_dpo import import_trl

TRAINERS = {"sft": "SFTTrainer", "dpo": "DPOTrainer"}


def make_trainer_class(trl: Any, work: dict[str, Any], kept: dict[str, Any]) -> Any:
    """Returns TRL's trainer with a given order and adapter, which keeps losses and the layers of LoRA."""

    class MeasuredTrainer(getattr(trl, TRAINERS[work["command"]])):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            weights = safetensors.torch.load_file(Path(work["adapter"]) / "adapter_model.safetensors")
            unused = peft.set_peft_model_state_dict(self.model, weights).unexpected_keys
            assert not unused, unused
            kept["layers"] = {
                name.removeprefix("base_model.model."): {
                    "rank": layer.r["default"],
                    "scaling": layer.scaling["default"],
                }
                for name, layer in self.model.named_modules()
                if isinstance(layer, peft.tuners.lora.LoraLayer)
            }
            kept["trainable_params"] = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

        def _get_train_sampler(self, *_: Any, **__: Any) -> list[int]:
            return work["order"]

        def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
            loss = super().training_step(*arguments, **named)
            kept.setdefault("losses", []).append(float(loss))
            return loss

    return MeasuredTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    trl, work, kept = import_trl(), json.loads(arguments.work.read_text()), {}
    datasets.disable_progress_bars()
    script = importlib.import_module(f"trl.scripts.{work['command']}")
    # the script imports the class by its name
    setattr(trl, TRAINERS[work["command"]], make_trainer_class(trl, work, kept))
    script.main(*script.make_parser().parse_args_and_config(["--config", work["file"]]))
    share = work["accumulate"]  # the loss of a step is the sum over its micro-batches
    kept["losses"] = [sum(kept["losses"][n : n + share]) for n in range(0, len(kept["losses"]), share)]
    arguments.output.write_text(json.dumps(kept))


if __name__ == "__main__":
    main()
