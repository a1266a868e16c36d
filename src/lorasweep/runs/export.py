"""Exports a run as an adapter for PEFT or as a whole model for transformers.

The files are written to a temporary folder, loaded again and compared with the run. Then the folder is renamed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from lorasweep.lora import load_adapter, save_adapter
from lorasweep.lora.merge import weights_in_fp32
from lorasweep.methods import METHODS, copy_sharing_weights
from lorasweep.models.folder import find_local_path
from lorasweep.models.load import BaseModel, fingerprint_weights
from lorasweep.models.pretrained import load_pretrained, quiet_transformers
from lorasweep.record import RunRecord, read_run
from lorasweep.training.restore import check_kept_files, restore_base, restore_config, restore_model

ExportFormat = Literal["peft", "merged"]
PROBE_ROWS, PROBE_TOKENS = 8, 16
"""Size of the batch of random tokens whose logits are compared."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """The folder of an exported run, and how much its logits differ from the run's."""

    folder: Path
    num_bytes: int
    difference: float
    """Largest absolute difference between the logits of `best/` and of the written weights on one batch, both in fp32.
    Merging rounds weights to the base's dtype."""
    largest_logit: float
    """The largest absolute logit of the run."""


def export_run(run: Path, *, format: ExportFormat, out: Path) -> Export:
    """Writes the best weights of a run for PEFT or transformers.

    Args:
        run: The run's folder.
        format: `peft` writes the adapter; `merged` writes the whole model, with the adapter merged, and its tokenizer.
        out: A new or empty folder; unchanged after an error.

    Raises:
        ConfigError: `out` is not empty, the base model can't be loaded, or the format does not fit the run's method.
        RecordError: The folder has no run, its weights are missing or damaged, or the base model has changed.
        RunError: The files can't be written, or transformers loads different weights from them.
    """
    record = read_run(run)
    config = restore_config(record)
    _check_request(config, format=format, out=out)
    check_kept_files(record, run, part="best")
    with create_folder_atomically(out) as folder:
        export = _export_adapter if format == "peft" else _export_merged
        original, written = export(record, config, run / "best", folder)
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Export(
        folder=out,
        num_bytes=num_bytes,
        difference=float((written - original).abs().max()),
        largest_logit=float(original.abs().max()),
    )


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
    if format == "peft" and method != "lora":
        raise ConfigError(
            f"`--format peft` must have a run of `method=lora`, but got {method!r}. Use `--format merged`."
        )
    require_new_folder(out, key="--out", remedy="Name another folder.")


def _export_adapter(record: RunRecord, config: RunConfig, best: Path, folder: Path) -> tuple[Tensor, Tensor]:
    """Writes the adapter. Returns the logits of the run, and of the base with the written adapter."""
    base = restore_base(record, config)
    model = _restore(config, base, best)
    save_adapter(
        model,
        folder,
        base_path=_get_permanent_path(config.model),
        base_fingerprint=base.fingerprint,
        base_revision=config.model.revision,
    )
    written = copy_sharing_weights(base.model)
    assert isinstance(written, PreTrainedModel)
    load_adapter(written, folder, base_fingerprint=base.fingerprint)
    return compute_probe_logits(model), compute_probe_logits(written)


def _export_merged(record: RunRecord, config: RunConfig, best: Path, folder: Path) -> tuple[Tensor, Tensor]:
    """Writes the whole model. Returns the logits of the run, and of the model that transformers loads again."""
    kind, dtype, fingerprint, logits = _write_merged(config, restore_base(record, config), best, folder)
    # `_write_merged` is a separate function, so that its models are freed before the merged model is loaded
    attention = {} if config.model.attention == "auto" else {"attn_implementation": config.model.attention}
    try:
        written = load_pretrained(kind, str(folder), dtype=dtype, **attention)
    except Exception as error:
        raise RunError(f"a merged {kind.__name__} must load again, but does not: {first_line(error)}.") from error
    if fingerprint_weights(written) != fingerprint:
        raise RunError(
            f"a merged {kind.__name__} must load with the written weights, but transformers loads different weights. "
            "Use `--format peft`."
        )
    return logits, compute_probe_logits(written)


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
    with weights_in_fp32(model), torch.inference_mode():
        logits: Tensor = model(input_ids=tokens, **decoder).logits
    return logits


def _get_permanent_path(config: ModelConfig) -> str:
    """Returns the path of the base for other tools: the absolute path of a folder, or the hub id."""
    folder = find_local_path(config)
    return str(config.path if folder is None else folder.resolve())
