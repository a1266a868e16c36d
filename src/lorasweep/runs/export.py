"""Exports a run as an adapter for PEFT or as a whole model for transformers.

The files are written to a temporary folder, which is renamed at the end. Before that, a merged model is loaded
again and compared with the run.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from lorasweep.config.model import ModelConfig
from lorasweep.config.run import RunConfig
from lorasweep.disk import require_new_folder
from lorasweep.errors import ConfigError, RunError, first_line
from lorasweep.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from lorasweep.methods import METHODS
from lorasweep.models.folder import find_local_path
from lorasweep.models.load import BaseModel, fingerprint_weights
from lorasweep.models.pretrained import load_pretrained, quiet_transformers
from lorasweep.record import RunRecord, read_run
from lorasweep.runs.model_card import CARD_FILE, build_card
from lorasweep.training.restore import (
    check_kept_files,
    refuse_code,
    restore_base,
    restore_config,
    restore_model,
    restore_unquantised_base,
)

ExportFormat = Literal["peft", "merged"]
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
PROBE_ROWS, PROBE_TOKENS = 8, 16
"""Size of the batch of random tokens whose logits are compared."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """The folder of an exported run, and how much a merged model differs from the run."""

    folder: Path
    dtype: str
    """Name of the type of the written weights: `fp32`, `bf16` or `fp16`."""
    num_bytes: int = 0
    difference: float = 0.0
    """Largest absolute difference between the logits of `best/` and of the merged model on one batch, both in fp32.
    Merging rounds weights to the base's dtype, and puts the unquantised base in place of a quantised one. 0 for an
    adapter, whose weights are copied."""
    largest_logit: float | None = None
    """The largest absolute logit of the run; None for an adapter."""


def export_run(
    run: Path,
    *,
    format: ExportFormat,
    out: Path,
    trust: bool = False,
) -> Export:
    """Writes the best weights of a run for PEFT or transformers, with a model card.

    Args:
        run: The run's folder.
        format: `peft` writes the adapter; `merged` writes the whole model, with the adapter merged, and its tokenizer.
        out: A new or empty folder; unchanged after an error.
        trust: Whether to run code or read a pickle that the run's settings name.

    Raises:
        ConfigError: `out` is not empty, the base model can't be loaded, or the format does not fit the run.
        RecordError: The folder has no run, its weights are missing or damaged, or the base model has changed.
        RunError: The files can't be written, or transformers loads different weights from them.
    """
    record = read_run(run)
    config = restore_config(record)
    refuse_code(config, trust=trust)
    _check_request(config, format=format, out=out)
    check_kept_files(record, run, part="best")
    with create_folder_atomically(out) as folder:
        if format == "peft":
            _copy_adapter(config.model, run / "best", folder)
            export = Export(folder=out, dtype="fp32")
        else:
            export = replace(_export_merged(record, config, run / "best", folder), folder=out)
        card = build_card(record, config, run=run, format=format, dtype=export.dtype, repository=out.resolve().name)
        card.save(folder / CARD_FILE)
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return replace(export, num_bytes=num_bytes)


@contextmanager
def create_folder_atomically(out: Path) -> Iterator[Path]:
    """Yields a temporary folder, which becomes `out` at the end and is removed after an error.

    Raises:
        RunError: Writing failed.
    """
    target = out.resolve()
    # on the same file system as `out`, so that the rename at the end is atomic
    parent = next(parent for parent in target.parents if parent.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".exporting-", dir=parent) as name:
            folder = Path(name) / target.name
            folder.mkdir()
            yield folder
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.replace(target)
    except (OSError, SafetensorError) as error:
        raise RunError(f"`--out` must be a folder that can be written to, but got {str(out)!r}: {error}.") from error


def _check_request(config: RunConfig, *, format: ExportFormat, out: Path) -> None:
    method = config.method.name
    if config.model.factory is not None:
        raise ConfigError(
            f"a run must have a transformers model to be exported, but got `model.factory={config.model.factory}`. "
            "Use the weights in `best/` of the run's folder."
        )
    if method == "frozen":
        raise ConfigError(
            f"a run must have trained something to be exported, but got `method=frozen`. Use {config.model.path!r}."
        )
    if format == "peft" and method not in ("lora", "peft"):
        raise ConfigError(
            f"`--format peft` must have a run of `method=lora` or `method=peft`, but got {method!r}. "
            "Use `--format merged`."
        )
    require_new_folder(out, key="--out", remedy="Name another folder.")


def _copy_adapter(config: ModelConfig, best: Path, folder: Path) -> None:
    """Copies an adapter, with the base's path and revision for other tools."""
    shutil.copyfile(best / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    local = find_local_path(config)
    base = {
        "base_model_name_or_path": str(config.path if local is None else local.resolve()),
        "revision": config.revision,
    }
    settings = json.loads((best / CONFIG_FILE).read_text(encoding="utf-8")) | base
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _export_merged(record: RunRecord, config: RunConfig, best: Path, folder: Path) -> Export:
    """Writes the whole model, loads it again and compares the logits."""
    base, logits_of_run = restore_base(record, config), None
    if config.model.quantization != "none":
        # An adapter is merged into the unquantised weights. The run itself computed with the quantised weights.
        logits_of_run = compute_probe_logits(_restore(config, base, best))
        config, base = restore_unquantised_base(record, config)
    kind, torch_dtype, fingerprint, logits = _write_merged(config, base, best, folder)
    del base
    # `_write_merged` is a separate function, so that its models are freed before the merged model is loaded
    attention = {} if config.model.attention == "auto" else {"attn_implementation": config.model.attention}
    try:
        written = load_pretrained(kind, str(folder), dtype=torch_dtype, **attention)
    except Exception as error:
        raise RunError(f"a merged {kind.__name__} must load again, but does not: {first_line(error)}.") from error
    if fingerprint_weights(written) != fingerprint:
        raise RunError(
            f"a merged {kind.__name__} must load with the written weights, but transformers loads different weights. "
            "Use `--format peft`."
        )
    original = logits if logits_of_run is None else logits_of_run
    return Export(
        folder=folder,
        dtype=DTYPE_NAMES.get(torch_dtype, str(torch_dtype)),
        difference=float((compute_probe_logits(written) - original).abs().max()),
        largest_logit=float(original.abs().max()),
    )


def _write_merged(
    config: RunConfig, base: BaseModel, best: Path, folder: Path
) -> tuple[type[PreTrainedModel], torch.dtype, str, Tensor]:
    model = _restore(config, base, best)
    logits = compute_probe_logits(model)
    METHODS[config.method.name].merge(model)
    model.config.use_cache = True  # training switched it off
    with quiet_transformers():
        model.save_pretrained(folder)
        if base.tokenizer is not None:
            base.tokenizer.save_pretrained(folder)
    return type(model), model.dtype, fingerprint_weights(model), logits


def _restore(config: RunConfig, base: BaseModel, best: Path) -> PreTrainedModel:
    model = restore_model(config, base, folder=best)
    assert isinstance(model, PreTrainedModel)  # `_check_request` refuses other models
    return model


def compute_probe_logits(model: PreTrainedModel) -> Tensor:
    """Returns logits (rows, tokens, vocabulary) for a fixed batch of random tokens, computed in fp32 on the CPU."""
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(embeddings), (PROBE_ROWS, PROBE_TOKENS), generator=generator)
    decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with _weights_in_fp32(model), torch.inference_mode():
        logits: Tensor = model(input_ids=tokens, **decoder).logits
    return logits


@contextmanager
def _weights_in_fp32(model: PreTrainedModel) -> Iterator[None]:
    """Converts the bf16 and fp16 weights and buffers of a model to fp32 while the context is open.

    The logits of two models can then be compared. In bf16 they can't: rounding of activations changes logits several
    times more than rounding of merged weights does, and it differs between processors.
    """
    # the original data is kept, so that the model gets back the same memory, which other models may share
    originals = [
        (tensor, tensor.data)
        for tensor in chain(model.parameters(), model.buffers())
        if tensor.dtype in (torch.bfloat16, torch.float16)
    ]
    try:
        for tensor, data in originals:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in originals:
            tensor.data = data
