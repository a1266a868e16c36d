"""Builds the model card of an exported run from the run's record, as the Hugging Face hub shows it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
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
from lorasweep.record import SWEEP_FILE, RunRecord

CARD_FILE = "README.md"
SUMMARY_FILE = "report/summary.json"
"""The file in a sweep's folder with the sentences of its report."""
PIPELINE_TAGS = {"causal_lm": "text-generation", "classifier": "text-classification", "seq2seq": "text2text-generation"}
"""The hub's name for what a model does, by `model.kind`."""
AUTO_CLASSES = {
    "causal_lm": "ModelForCausalLM",
    "classifier": "ModelForSequenceClassification",
    "seq2seq": "ModelForSeq2SeqLM",
}
"""Names of the classes with which transformers loads a model, without `Auto`."""
SHOWN_GROUPS = ("method", "optim", "schedule", "seed", "seeds")
"""Groups of settings that a card shows as they are. They contain no paths."""
SHOWN_KEYS = (
    "trainer.max_steps",
    "trainer.batch_size",
    "trainer.early_stop_evaluations",
    "data.max_length",
    "data.block_length",
)
"""Further settings that a card shows."""
DATA_FACTS = ("examples", "blocks", "documents", "fingerprint")
"""What a card says of each split, if the record has it."""


def build_card(
    record: RunRecord, config: RunConfig, *, run: Path, format: str, dtype: str, repository: str
) -> ModelCard:
    """Returns the card of an exported run. It has no path of this machine.

    Args:
        record: The run's record.
        config: The run's settings.
        run: The run's folder. If it belongs to a sweep, the card has what the sweep's report says of its arm.
        format: `peft` or `merged`.
        dtype: Name of the type of the written weights, such as `bf16`.
        repository: `USER/NAME` on the hub, or the name of the exported folder, from which the examples load.
    """
    task, hub_data = PIPELINE_TAGS[config.model.kind], _find_hub_data(config)
    data_name = hub_data or config.data.name
    data = ModelCardData(
        base_model=find_hub_base(config.model),
        library_name="peft" if format == "peft" else "transformers",
        pipeline_tag=task,
        tags=list(dict.fromkeys(["lorasweep", config.method.name])),
        datasets=hub_data,
        model_name=repository.rpartition("/")[2],
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=data_name,
                dataset_name=data_name,
                dataset_split="test",
                metric_type=name,
                metric_value=value,
            )
            for name, value in record.test.items()
            if value is not None
        ]
        or None,
    )
    kind = config.method.config["peft_type"] if isinstance(config.method, PeftConfig) else "LoRA"
    what = f"An adapter ({kind}, {dtype}) for" if format == "peft" else f"A model ({dtype}, merged) fine-tuned from"
    sections = {
        "How to load": _describe_loading(record, config.model, format=format, repository=repository),
        "Base model": _describe_base(record, config.model, format=format),
        "Data": _describe_data(record, data_name),
        "Scores": _describe_scores(record),
        "What the sweep found": _describe_verdict(record, run),
        "Settings": _describe_settings(record),
    }
    body = "\n".join(f"## {title}\n\n{text}\n" for title, text in sections.items())
    version = record.code.get("version", "")
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {data.model_name}\n\n{what} `{name_base(config.model)}`, trained with "
        f"`method={config.method.name}` by lorasweep {version}. This card was made from the run's record.\n\n{body}"
    )


def find_hub_base(config: ModelConfig) -> str | None:
    """Returns the hub id of the base model, or None if it is a folder or inside lorasweep."""
    return config.path if find_local_path(config) is None else None


def name_base(config: ModelConfig) -> str:
    """Returns the base's hub id or the name of its folder, without the path on this machine."""
    path = str(config.path)
    is_public = find_hub_base(config) is not None or path.startswith(EMBEDDED_PREFIX)
    return path if is_public else Path(path).expanduser().resolve().name


def _find_hub_data(config: RunConfig) -> str | None:
    path = getattr(config.data, "path", None)
    return path if path and not Path(path).expanduser().is_dir() else None


def _describe_loading(record: RunRecord, config: ModelConfig, *, format: str, repository: str) -> str:
    name = AUTO_CLASSES[config.kind]
    labels = (record.base.get("labels") or {}) if config.kind == "classifier" else {}
    num_labels = 1 if labels.get("kind") == "regression" else len(labels.get("names", ()))
    argument = f", num_labels={num_labels}" if labels else ""
    base = name_base(config)
    quantization = ""
    if config.quantization != "none" and format == "peft":
        values = TRANSFORMERS_ARGUMENTS[config.quantization]
        quantization = ", ".join(f"{key}={value!r}" for key, value in values.items())
        argument += ", quantization_config=quantization"
    revision = f', revision="{config.revision}"' if config.revision else ""
    lines = {
        "merged": [
            f"from transformers import Auto{name}, AutoTokenizer",
            "",
            f'model = Auto{name}.from_pretrained("{repository}", dtype="auto")',
            f'tokenizer = AutoTokenizer.from_pretrained("{repository}")',
        ],
        "peft": [
            "from peft import PeftModel",
            f"from transformers import Auto{name}, AutoTokenizer{', BitsAndBytesConfig' if quantization else ''}",
            "",
            *([f"quantization = BitsAndBytesConfig({quantization})"] if quantization else []),
            f'base = Auto{name}.from_pretrained("{base}"{revision}{argument})',
            f'model = PeftModel.from_pretrained(base, "{repository}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{base}"{revision})',
        ],
    }[format]
    code = "\n".join(["```python", *lines, "```"])
    if format == "peft" and find_hub_base(config) is None:
        code += f"\n\nThe base `{base}` is not on the hub: put the path of its folder there."
    if labels.get("names") and labels.get("kind") != "regression":
        code += f"\n\nLabels in the order of the outputs: {', '.join(f'`{label}`' for label in labels['names'])}."
    return code


def _describe_base(record: RunRecord, config: ModelConfig, *, format: str) -> str:
    revision = f", revision `{config.revision}`" if config.revision else ""
    precision = record.platform.get("precision", "fp32")
    quantised = ""
    if config.quantization != "none":
        quantised = f" In training and evaluation its linear layers were stored in {config.quantization}."
        if format == "merged":
            quantised += " This model has the unquantised weights, so its scores may differ from those below."
    return (
        f"`{name_base(config)}`{revision}, {record.base.get('parameters', 0):,} parameters, trained in {precision}; "
        f"fingerprint of these weights `{record.base.get('fingerprint')}`. {record.trainable_params:,} parameters were "
        f"trained.{quantised}"
    )


def _describe_data(record: RunRecord, name: str) -> str:
    lines = [f"`{name}`. A fingerprint is a checksum of the texts and labels of a split, in their order.", ""]
    for split, facts in record.data.items():
        shown = [f"{fact} `{facts[fact]}`" for fact in DATA_FACTS if fact in facts]
        lines.append(f"- {split}: {', '.join(shown)}")
    return "\n".join(lines)


def _describe_scores(record: RunRecord) -> str:
    best = "lower" if record.direction == "minimize" else "higher"
    lines = [f"`{record.metric}` is the score ({best} is better).", "", "| split | metric | value |", "|---|---|---|"]
    splits = {"validation": {key: value for key, value in record.best.items() if key != "step"}, "test": record.test}
    lines += [
        f"| {split} | {name} | {value:.6g} |"
        for split, values in splits.items()
        for name, value in values.items()
        if value is not None  # NaN in the record
    ]
    step = record.best.get("step")
    at = "" if step is None else f", after step {step:.0f} of {record.steps_planned}"
    return "\n".join([*lines, "", f"The weights are those with the best score on validation data{at}."])


def _describe_verdict(record: RunRecord, run: Path) -> str:
    """Returns the sentences of the report of the sweep that this run, or its settings, come from."""
    in_sweep = record.arm is not None and (run.resolve().parent.parent / SWEEP_FILE).is_file()
    folder = run.resolve().parent.parent if in_sweep else Path(record.origin.get("sweep", ""))
    arm = record.arm if in_sweep else record.origin.get("arm")
    trial = record.trial if in_sweep else record.origin.get("trial")
    try:
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8")) if arm else {}
        recommended: Iterable[Mapping[str, Any]] = summary.get("recommended", ())
        found = [(str(entry["arm"]), [str(text) for text in entry["sentences"]]) for entry in recommended]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # the report can be missing or damaged
        found, summary = [], {}
    if not found:
        return "Nothing: the run is not from a sweep with a report."
    lead = f"Trial {trial} of arm `{arm}` of the sweep `{summary.get('sweep')}`"
    if not in_sweep:
        lead = f"The settings are those of t{lead[1:]}"
    is_recommended = any(name == arm for name, _ in found)
    also = "" if is_recommended else " The report recommends another arm."
    shown = [sentences for name, sentences in found if name == arm or not is_recommended]
    lines = [f"- {sentence}" for sentences in shown for sentence in sentences]
    return "\n".join([f"{lead}.{also} The report says:", "", *lines])


def _describe_settings(record: RunRecord) -> str:
    """Returns the settings of the training as YAML, by dotted key."""
    shown = {
        key: value
        for key, value in dotted_items(record.config)
        if not isinstance(value, Mapping) and (key.split(".")[0] in SHOWN_GROUPS or key in SHOWN_KEYS)
    }
    return f"```yaml\n{yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)}```"
