"""A small random base, and models that a method prepared on it and something like training has changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorasweep.config.method import LoraConfig, MethodConfig
from lorasweep.methods import METHODS, copy_sharing_weights
from lorasweep.models.load import BaseModel, fingerprint_weights
from lorasweep.runs.weight_updates import Decomposition, WeightUpdate, decompose
from lorasweep.training.inputs import RunInputs
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunFolder


@pytest.fixture
def base() -> BaseModel:
    """A random Llama of two blocks, hidden 16, head tied to the embeddings, in fp32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=True,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = LlamaForCausalLM(settings).requires_grad_(False).eval()
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return BaseModel(
        model=model,
        tokenizer=None,  # type: ignore[arg-type]
        path="some/base",
        fingerprint=fingerprint_weights(model),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


@pytest.fixture
def trained(base: BaseModel) -> Callable[..., nn.Module]:
    """Makes a model of a method in which everything that trains has moved at random."""

    def make(config: MethodConfig, *, seed: int = 1, step: float = 0.1) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        model = copy_sharing_weights(base.model)
        METHODS[config.name].prepare(model, config, generator=generator)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += step * torch.randn(parameter.shape, generator=generator)
        return model.eval()

    return make


def lora(**settings: Any) -> LoraConfig:
    """LoRA of rank 2 with other settings."""
    return LoraConfig(**{"rank": 2, "alpha": 4.0, **settings})


def decompose_updates(updates: list[WeightUpdate]) -> dict[str, Decomposition]:
    return {update.name: decompose(update.left, update.right) for update in updates if update.is_matrix}


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory: pytest.TempPathFactory, make_config: Any, inputs: RunInputs) -> dict[str, Path]:
    """Folders of finished runs of a few steps: `lora`, `other` (another seed and rank), `full`, `frozen`."""
    folder = tmp_path_factory.mktemp("runs")
    settings: dict[str, dict[str, Any]] = {
        "lora": {},
        "other": {"seed": 1, "method.rank": 4},
        "full": {"method": "full", "optim.lr": 1e-3},
        "frozen": {"method": "frozen"},
    }
    for name, changed in settings.items():
        train_run(make_config(changed), RunFolder(path=folder / name), inputs=inputs)
    return {name: folder / name for name in settings}


@pytest.fixture
def runs(trained_runs: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies of those folders, to be written to."""
    return {name: shutil.copytree(folder, tmp_path / name) for name, folder in trained_runs.items()}


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Reads a JSON file, lets `change` change it, writes it."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
