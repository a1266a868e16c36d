"""Exports a run as an adapter for PEFT or as a whole model for transformers.

The files are written to a temporary folder, which is renamed at the end. Before that, a merged model is loaded
again, and its weights are compared with those that were written.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from lorasweep.config.build import flatten
from lorasweep.config.run import ModelConfig, RunConfig, refuse_code, require_exportable
from lorasweep.data.tokenise import digest_template, read_template_file
from lorasweep.disk import require_new_folder
from lorasweep.errors import ConfigError, RecordError, RunError, first_line
from lorasweep.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_peft_settings
from lorasweep.methods import bind
from lorasweep.models.load import BaseModel, fingerprint_weights, list_module_files, load_tokenizer
from lorasweep.models.paths import EMBEDDED_PREFIX, find_local_path
from lorasweep.models.pretrained import NF4_ARGUMENTS, load_pretrained, quiet_transformers
from lorasweep.record import RunRecord, read_run, restore_config
from lorasweep.training.finished_run import check_kept_files, restore_model, restore_unquantised_base

ExportFormat = Literal["peft", "merged"]
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
CLASS_ENDINGS = {"causal_lm": "ModelForCausalLM", "classifier": "ModelForSequenceClassification", "embedder": "Model"}
"""Names of the classes that load a model, without `Auto` (transformers) or `AutoPeft` (PEFT)."""
SHOWN_SETTINGS = (
    *("method.", "optim.", "schedule.", "seed", "trainer.max_steps", "trainer.batch_size"),
    *("trainer.early_stop_evaluations", "data.max_length", "data.block_length"),
)
"""Prefixes of the dotted keys that a card shows. The settings with these keys contain no paths."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """An exported run."""

    folder: Path
    dtype: str
    """Name of the type of the written weights: `fp32`, `bf16` or `fp16`."""
    num_bytes: int


def export_run(run: str | Path, *, format: ExportFormat, out: str | Path, trust: bool = False) -> Export:
    """Writes the best weights of a run for PEFT or transformers, with a model card.

    >>> lorasweep.export_run("outputs/tiny/runs/lora-0000", format="peft", out="adapter").dtype
    'fp32'

    The tokenizer goes with it, with the run's chat template if that is a file of the user.

    Args:
        run: The run's folder.
        format: `peft` writes the adapter; `merged` writes the whole model, with the adapter merged.
        out: A new or empty folder; unchanged after an error.
        trust: Whether to run code that the run's settings name.

    Raises:
        ConfigError: `out` is not empty, the base model can't be loaded, or the format does not fit the run.
        RecordError: The folder has no run, its weights are missing or damaged, or the base model has changed.
        RunError: The files can't be written, or transformers loads different weights from them.
    """
    run, out = Path(run), Path(out)
    record = read_run(run)
    config = restore_config(record)
    _check_request(config, format=format, out=out)
    if not trust:
        refuse_code(config)
    check_kept_files(record, run)
    template = _read_own_template(record, config)
    with _create_folder_atomically(out) as folder:
        if format == "peft":
            _copy_adapter(config.model, run / "best", folder)
            dtype = "fp32"
        else:
            dtype = _export_merged(record, config, run / "best", folder)
        tokenizer = load_tokenizer(config.model)
        tokenizer.chat_template = template or tokenizer.chat_template
        tokenizer.save_pretrained(folder)
        card = _build_card(record, config, format=format, dtype=dtype, repository=out.resolve().name)
        card.save(folder / "README.md")
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Export(folder=out, dtype=dtype, num_bytes=num_bytes)


@contextmanager
def _create_folder_atomically(out: Path) -> Iterator[Path]:
    """Yields a temporary folder, which becomes `out` at the end and is removed after an error."""
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
    require_exportable(config)
    if format == "peft" and config.method.adapter_kind is None:
        raise ConfigError(
            f"`--format peft` must have a run of `method=lora` or `method=peft`, but got {config.method.name!r}. "
            "Use `--format merged`, or name a LoRA arm: `SWEEP/ARM`."
        )
    require_new_folder(out, key="--out", remedy="Name another folder.")


def _read_own_template(record: RunRecord, config: RunConfig) -> str | None:
    """Returns the chat template of the user's file; None if the run has the tokenizer's template, or none."""
    if (file := config.data.template_file) is None:
        return None
    text = read_template_file(file)
    if digest_template(text) != record.data["train"].get("template"):
        raise RecordError(
            f"`data.template` must be the file with which the run trained, but {file!r} has changed. Restore the file."
        )
    return text


def _copy_adapter(config: ModelConfig, best: Path, folder: Path) -> None:
    """Copies an adapter, with the base's path and revision for other tools."""
    try:
        with safe_open(best / WEIGHTS_FILE, framework="pt"):  # reads the header alone
            shutil.copyfile(best / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    except SafetensorError as error:
        name = str(best / WEIGHTS_FILE)
        raise RecordError(f"{name!r} must have the weights of an adapter, but can't be read: {error}.") from error
    local, settings = find_local_path(config), read_peft_settings(best / CONFIG_FILE)
    settings["base_model_name_or_path"] = str(config.path if local is None else local.resolve())
    settings["revision"] = config.revision
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _export_merged(record: RunRecord, config: RunConfig, best: Path, folder: Path) -> str:
    """Writes the whole model, checks that it loads with the same weights, and returns the name of their type."""
    config, base = restore_unquantised_base(record, config)  # an adapter is merged into the unquantised weights
    kind, dtype, fingerprint = _write_merged(config, base, best, folder)
    del base  # frees its memory before the merged model is loaded
    name = config.model.attention
    attention: dict[str, Any] = {} if name == "auto" else {"attn_implementation": name}
    try:
        written, _ = load_pretrained(kind, str(folder), dtype=dtype, **attention)
    except Exception as error:
        raise RunError(f"a merged {kind.__name__} must load again, but does not: {first_line(error)}.") from error
    if fingerprint_weights(written) != fingerprint:
        raise RunError(
            f"a merged {kind.__name__} must load with the written weights, but transformers loads different weights. "
            "Use `--format peft`."
        )
    return DTYPE_NAMES.get(dtype, str(dtype))


def _write_merged(
    config: RunConfig, base: BaseModel, best: Path, folder: Path
) -> tuple[type[PreTrainedModel], torch.dtype, str]:
    model = restore_model(config, base, folder=best)
    assert isinstance(model, PreTrainedModel)  # `_check_request` refuses other models
    bind(config.method).merge(model)
    model.config.use_cache = True  # training switched it off
    with quiet_transformers():
        model.save_pretrained(folder)
    if config.model.kind == "embedder" and base.folder is not None:
        for file in list_module_files(base.folder):
            target = folder / file.relative_to(base.folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    return type(model), model.dtype, fingerprint_weights(model)


def _build_card(record: RunRecord, config: RunConfig, *, format: str, dtype: str, repository: str) -> ModelCard:
    """Returns the card of an exported run, without a path of this machine.

    `repository` is `USER/NAME` on the hub, or the name of the exported folder, from which the example loads.
    """
    data = ModelCardData(
        base_model=None if find_local_path(config.model) else config.model.path,
        library_name="peft" if format == "peft" else "transformers",
        tags=["lorasweep", config.method.name],
        model_name=repository.rpartition("/")[2],
    )
    what = f"A model ({dtype}, merged) fine-tuned from"
    if format == "peft":
        what = f"An adapter ({config.method.adapter_kind}, {dtype}) for"
    facts = {
        "base": {"revision": config.model.revision, "fingerprint": record.base.get("fingerprint")},
        "data": {"name": config.data.name, **{name: split.get("fingerprint") for name, split in record.data.items()}},
        "scores": {"metric": record.metric, "validation": record.best, "test": record.test},
    }
    facts |= {key: value for key, value in flatten(record.config).items() if key.startswith(SHOWN_SETTINGS)}
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {data.model_name}\n\n{what} `{name_base(config.model)}`, trained with "
        f"`method={config.method.name}` by lorasweep {record.code.get('version', '')}.\n\n"
        f"{_describe_loading(record, config.model, format=format, repository=repository)}\n\n"
        "The weights are those with the best score on validation data. From the run's record:\n\n"
        f"```yaml\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}```\n"
    )


def name_base(config: ModelConfig) -> str:
    """Returns the base's hub id, or the last two parts of its folder.

    `_name_or_path` in its `config.json` is no name of it: it may be that of the model from which the base was trained.
    """
    path, local = str(config.path), find_local_path(config)
    if local is None or path.startswith(EMBEDDED_PREFIX):
        return path
    return "/".join(local.resolve().parts[-2:])


def _describe_loading(record: RunRecord, config: ModelConfig, *, format: str, repository: str) -> str:
    labels = (record.base.get("labels") or {}) if config.kind == "classifier" else {}
    name, base = f"Auto{CLASS_ENDINGS[config.kind]}", name_base(config)
    imports, lines, notes = ["from transformers import AutoTokenizer"], [], []
    arguments = ', dtype="auto"'
    if format == "peft":
        name, arguments = f"AutoPeft{CLASS_ENDINGS[config.kind]}", ""
        if labels:
            notes.append(
                "transformers prints that the base's head (such as `classifier.weight`) is MISSING or newly "
                "initialised. PEFT then loads the trained one from the adapter."
            )
            is_number = labels["kind"] == "regression"
            arguments = ", num_labels=1" if is_number else f", id2label={dict(enumerate(map(str, labels['names'])))}"
        if config.quantization != "none":
            given = ", ".join(f"{key}={value!r}" for key, value in NF4_ARGUMENTS.items())
            imports.append("from transformers import BitsAndBytesConfig")
            lines = [f"quantization = BitsAndBytesConfig({given})"]
            arguments += ", quantization_config=quantization"
        if find_local_path(config) is not None:
            notes.append(
                f"The base `{base}` is a folder: `adapter_config.json` has its path on the machine of the export. On "
                "another machine, write its path there."
            )
    imports.append(f"from {'peft' if format == 'peft' else 'transformers'} import {name}")
    lines += [
        f'model = {name}.from_pretrained("{repository}"{arguments})',
        f'tokenizer = AutoTokenizer.from_pretrained("{repository}")',
    ]
    if config.kind == "embedder":
        imports = ["from sentence_transformers import SentenceTransformer"]
        shown = base if format == "peft" else repository
        lines = [f'model = SentenceTransformer("{shown}")']
        lines += [f'model.load_adapter("{repository}")'] if format == "peft" else []
    code = "\n".join([*imports, "", *lines])
    if text := record.data.get("train", {}).get("format"):
        notes.append(f"In training, an example was `{text}`. Write prompts in the same way.")
    if config.quantization != "none":
        notes.append(f"In training and evaluation its linear layers were stored in {config.quantization}.")
    if config.quantization != "none" and format == "merged":
        notes.append("This model has the unquantised weights, so its scores may differ from those below.")
    if labels and labels["kind"] != "regression":
        notes.append(f"Labels in the order of the outputs: {', '.join(f'`{label}`' for label in labels['names'])}.")
    return "\n\n".join([f"```python\n{code}\n```", *notes])
