"""Builds the model card of an exported run from the run's record, as the Hugging Face hub shows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lorasweep.config.compose import dotted_items
from lorasweep.config.method import PeftConfig
from lorasweep.config.model import ModelConfig
from lorasweep.config.run import RunConfig
from lorasweep.models.folder import EMBEDDED_PREFIX, find_local_path
from lorasweep.models.quantised import TRANSFORMERS_ARGUMENTS
from lorasweep.record import RunRecord

CARD_FILE = "README.md"
PIPELINE_TAGS = {"causal_lm": "text-generation", "classifier": "text-classification"}
"""The hub's name for what a model does, by `model.kind`."""
MODEL_CLASSES = {
    "causal_lm": "ModelForCausalLM",
    "classifier": "ModelForSequenceClassification",
}
"""Names of the classes that load a model, without `Auto` (transformers) or `AutoPeft` (PEFT)."""
SHOWN_SETTINGS = (
    *("method.", "optim.", "schedule.", "seed", "trainer.max_steps", "trainer.batch_size"),
    *("trainer.early_stop_evaluations", "data.max_length", "data.block_length"),
)
"""Beginnings of the keys of the settings that a card shows. These settings contain no paths."""
SHOWN_DATA = ("examples", "blocks", "documents", "fingerprint")
"""The facts on a split that a card shows."""


def build_card(record: RunRecord, config: RunConfig, *, format: str, dtype: str, repository: str) -> ModelCard:
    """Returns the card of an exported run. It has no path of this machine.

    Args:
        record: The run's record.
        config: The run's settings.
        format: `peft` or `merged`.
        dtype: Name of the type of the written weights, such as `bf16`.
        repository: `USER/NAME` on the hub, or the name of the exported folder, from which the example loads.
    """
    task, path = PIPELINE_TAGS[config.model.kind], getattr(config.data, "path", None)
    hub_data = path if path and not Path(path).expanduser().is_dir() else None
    data_name = hub_data or config.data.name
    source: dict[str, Any] = {
        "task_type": task,
        "dataset_type": data_name,
        "dataset_name": data_name,
        "dataset_split": "test",
    }
    scores = {name: value for name, value in record.test.items() if value is not None}
    data = ModelCardData(
        base_model=None if find_local_path(config.model) else config.model.path,
        library_name="peft" if format == "peft" else "transformers",
        pipeline_tag=task,
        tags=list(dict.fromkeys(["lorasweep", config.method.name])),
        datasets=hub_data,
        model_name=repository.rpartition("/")[2],
        eval_results=[EvalResult(**source, metric_type=k, metric_value=v) for k, v in scores.items()] or None,
    )
    kind = config.method.config["peft_type"] if isinstance(config.method, PeftConfig) else "LoRA"
    what = f"An adapter ({kind}, {dtype}) for" if format == "peft" else f"A model ({dtype}, merged) fine-tuned from"
    sections = {
        "How to load": _describe_loading(record, config.model, format=format, repository=repository),
        "Scores": _describe_scores(record),
        "How it was trained": _describe_training(record, config, data_name),
    }
    body = "\n".join(f"## {title}\n\n{text}\n" for title, text in sections.items())
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {data.model_name}\n\n{what} `{name_base(config.model)}`, trained with "
        f"`method={config.method.name}` by lorasweep {record.code.get('version', '')}. This card was made from the "
        f"run's record.\n\n{body}"
    )


def name_base(config: ModelConfig) -> str:
    """Returns the base's hub id or the name of its folder, without the path on this machine."""
    path = str(config.path)
    is_public = find_local_path(config) is None or path.startswith(EMBEDDED_PREFIX)
    return path if is_public else Path(path).expanduser().resolve().name


def _describe_loading(record: RunRecord, config: ModelConfig, *, format: str, repository: str) -> str:
    labels = (record.base.get("labels") or {}) if config.kind == "classifier" else {}
    name, base = f"Auto{MODEL_CLASSES[config.kind]}", name_base(config)
    imports, lines, notes = ["from transformers import AutoTokenizer"], [], []
    arguments, tokenizer = ', dtype="auto"', f'"{repository}"'
    if format == "peft":
        name, arguments = f"AutoPeft{MODEL_CLASSES[config.kind]}", ""
        tokenizer = 'model.peft_config["default"].base_model_name_or_path'
        if labels:
            arguments = f", num_labels={1 if labels['kind'] == 'regression' else len(labels['names'])}"
        if config.quantization != "none":
            given = ", ".join(f"{key}={value!r}" for key, value in TRANSFORMERS_ARGUMENTS.items())
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
        f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})",
    ]
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


def _describe_scores(record: RunRecord) -> str:
    best, step = "lower" if record.direction == "minimize" else "higher", record.best.get("step")
    lines = [f"`{record.metric}` is the score ({best} is better).", "", "| split | metric | value |", "|---|---|---|"]
    lines += [
        f"| {split} | {name} | {value:.6g} |"
        for split, values in (("validation", record.best), ("test", record.test))
        for name, value in values.items()
        if name != "step" and value is not None  # NaN in the record
    ]
    at = "" if step is None else f", after step {step:.0f} of {record.steps_planned}"
    return "\n".join([*lines, "", f"The weights are those with the best score on validation data{at}."])


def _describe_training(record: RunRecord, config: RunConfig, data_name: str) -> str:
    """Returns base, data and settings as YAML. A fingerprint is a checksum of weights, or of texts and labels."""
    facts: dict[str, Any] = {
        "base": {
            "name": name_base(config.model),
            "revision": config.model.revision,
            "precision": record.platform.get("precision"),
            "fingerprint": record.base.get("fingerprint"),
            "trained_parameters": record.trainable_params,
        },
        "data": {
            "name": data_name,
            **{split: {key: of[key] for key in SHOWN_DATA if key in of} for split, of in record.data.items()},
        },
    }
    facts |= {
        key: value
        for key, value in dotted_items(record.config)
        if not isinstance(value, Mapping) and key.startswith(SHOWN_SETTINGS)
    }
    return f"```yaml\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}```"
