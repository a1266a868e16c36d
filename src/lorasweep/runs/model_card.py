"""Builds the model card of an exported run from the run's record, as the Hugging Face hub shows it."""

from __future__ import annotations

import json
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
SHOWN_SETTINGS = (
    *("method.", "optim.", "schedule.", "seed", "trainer.max_steps", "trainer.batch_size"),
    *("trainer.early_stop_evaluations", "data.max_length", "data.block_length"),
)
"""Beginnings of the keys of the settings that a card shows. These settings contain no paths."""
LOAD_MERGED = """\
from transformers import Auto{name}, AutoTokenizer

model = Auto{name}.from_pretrained("{repository}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{repository}")"""
LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import Auto{name}, AutoTokenizer{imports}

{quantization}base = Auto{name}.from_pretrained("{base}"{arguments})
model = PeftModel.from_pretrained(base, "{repository}")
tokenizer = AutoTokenizer.from_pretrained("{base}"{revision})"""


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
    task, path = PIPELINE_TAGS[config.model.kind], getattr(config.data, "path", None)
    hub_data = path if path and not Path(path).expanduser().is_dir() else None
    data_name = hub_data or config.data.name
    scores = [
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
    data = ModelCardData(
        base_model=None if find_local_path(config.model) else config.model.path,
        library_name="peft" if format == "peft" else "transformers",
        pipeline_tag=task,
        tags=list(dict.fromkeys(["lorasweep", config.method.name])),
        datasets=hub_data,
        model_name=repository.rpartition("/")[2],
        eval_results=scores or None,
    )
    kind = config.method.config["peft_type"] if isinstance(config.method, PeftConfig) else "LoRA"
    what = f"An adapter ({kind}, {dtype}) for" if format == "peft" else f"A model ({dtype}, merged) fine-tuned from"
    shown = {
        key: value
        for key, value in dotted_items(record.config)
        if not isinstance(value, Mapping) and key.startswith(SHOWN_SETTINGS)
    }
    sections = {
        "How to load": _describe_loading(record, config.model, format=format, repository=repository),
        "Base model": _describe_base(record, config.model, format=format),
        "Data": _describe_data(record, data_name),
        "Scores": _describe_scores(record),
        "What the sweep found": _describe_verdict(record, run),
        "Settings": f"```yaml\n{yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)}```",
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
    base = name_base(config)
    revision = f', revision="{config.revision}"' if config.revision else ""
    arguments, imports, quantization = revision, "", ""
    if labels:
        arguments += f", num_labels={1 if labels['kind'] == 'regression' else len(labels['names'])}"
    if config.quantization != "none":
        given = ", ".join(f"{key}={value!r}" for key, value in TRANSFORMERS_ARGUMENTS[config.quantization].items())
        imports, quantization = ", BitsAndBytesConfig", f"quantization = BitsAndBytesConfig({given})\n"
        arguments += ", quantization_config=quantization"
    code = (LOAD_ADAPTER if format == "peft" else LOAD_MERGED).format(
        name=AUTO_CLASSES[config.kind],
        repository=repository,
        base=base,
        imports=imports,
        quantization=quantization,
        arguments=arguments,
        revision=revision,
    )
    text = f"```python\n{code}\n```"
    if format == "peft" and find_local_path(config) is not None:
        text += f"\n\nThe base `{base}` is not on the hub: put the path of its folder there."
    if labels and labels["kind"] != "regression":
        text += f"\n\nLabels in the order of the outputs: {', '.join(f'`{label}`' for label in labels['names'])}."
    return text


def _describe_base(record: RunRecord, config: ModelConfig, *, format: str) -> str:
    revision = f", revision `{config.revision}`" if config.revision else ""
    quantised = ""
    if config.quantization != "none":
        quantised = f" In training and evaluation its linear layers were stored in {config.quantization}."
        if format == "merged":
            quantised += " This model has the unquantised weights, so its scores may differ from those below."
    return (
        f"`{name_base(config)}`{revision}, {record.base.get('parameters', 0):,} parameters, trained in "
        f"{record.platform.get('precision')}; fingerprint of these weights `{record.base.get('fingerprint')}`. "
        f"{record.trainable_params:,} parameters were trained.{quantised}"
    )


def _describe_data(record: RunRecord, name: str) -> str:
    lines = [f"`{name}`. A fingerprint is a checksum of the texts and labels of a split, in their order.", ""]
    for split, facts in record.data.items():
        shown = [f"{f} `{facts[f]}`" for f in ("examples", "blocks", "documents", "fingerprint") if f in facts]
        lines.append(f"- {split}: {', '.join(shown)}")
    return "\n".join(lines)


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


def _describe_verdict(record: RunRecord, run: Path) -> str:
    """Returns the sentences of the report of the sweep that this run, or its settings, come from."""
    folder, arm, trial = run.resolve().parent.parent, record.arm, record.trial
    lead = f"Trial {trial} of arm `{arm}`"
    if arm is None or not (folder / SWEEP_FILE).is_file():
        folder, arm = Path(record.origin.get("sweep", "")), record.origin.get("arm")
        lead = f"The settings are those of trial {record.origin.get('trial')} of arm `{arm}`"
    found: dict[str, Any] = {}
    try:
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        found = {str(entry["arm"]): [str(text) for text in entry["sentences"]] for entry in summary["recommended"]}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the report can be missing or damaged
    if arm is None or not found:
        return "Nothing: the run is not from a sweep with a report."
    also = "" if arm in found else " The report recommends another arm."
    sentences = [sentence for name in ([arm] if arm in found else found) for sentence in found[name]]
    lines = [f"- {sentence}" for sentence in sentences]
    return "\n".join([f"{lead} of the sweep `{summary.get('sweep')}`.{also} The report says:", "", *lines])
