"""Builds the model card of an exported run from the run's record, as the Hugging Face hub shows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from lorasweep.config.compose import dotted_items
from lorasweep.config.method import PeftConfig
from lorasweep.config.model import ModelConfig
from lorasweep.config.run import RunConfig
from lorasweep.models.folder import EMBEDDED_PREFIX, find_local_path
from lorasweep.models.pretrained import TRANSFORMERS_ARGUMENTS
from lorasweep.record import RunRecord

CARD_FILE = "README.md"
MODEL_CLASSES = {"causal_lm": "ModelForCausalLM", "classifier": "ModelForSequenceClassification"}
"""Names of the classes that load a model, without `Auto` (transformers) or `AutoPeft` (PEFT)."""
SHOWN_SETTINGS = (
    *("method.", "optim.", "schedule.", "seed", "trainer.max_steps", "trainer.batch_size"),
    *("trainer.early_stop_evaluations", "data.max_length", "data.block_length"),
)
"""Beginnings of the keys of the settings that a card shows. These settings contain no paths."""


def build_card(record: RunRecord, config: RunConfig, *, format: str, dtype: str, repository: str) -> ModelCard:
    """Returns the card of an exported run. It has no path of this machine.

    Args:
        record: The run's record.
        config: The run's settings.
        format: `peft` or `merged`.
        dtype: Name of the type of the written weights, such as `bf16`.
        repository: `USER/NAME` on the hub, or the name of the exported folder, from which the example loads.
    """
    data = ModelCardData(
        base_model=None if find_local_path(config.model) else config.model.path,
        library_name="peft" if format == "peft" else "transformers",
        tags=["lorasweep", config.method.name],
        model_name=repository.rpartition("/")[2],
    )
    kind = config.method.config["peft_type"] if isinstance(config.method, PeftConfig) else "LoRA"
    what = f"An adapter ({kind}, {dtype}) for" if format == "peft" else f"A model ({dtype}, merged) fine-tuned from"
    facts = {
        "base": {"revision": config.model.revision, "fingerprint": record.base.get("fingerprint")},
        "data": {"name": config.data.name, **{split: of.get("fingerprint") for split, of in record.data.items()}},
        "scores": {"metric": record.metric, "validation": record.best, "test": record.test},
        **{
            key: value
            for key, value in dotted_items(record.config)
            if not isinstance(value, Mapping) and key.startswith(SHOWN_SETTINGS)
        },
    }
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {data.model_name}\n\n{what} `{name_base(config.model)}`, trained with "
        f"`method={config.method.name}` by lorasweep {record.code.get('version', '')}.\n\n"
        f"{_describe_loading(record, config.model, format=format, repository=repository)}\n\n"
        "The weights are those with the best score on validation data. From the run's record:\n\n"
        f"```yaml\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}```\n"
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
