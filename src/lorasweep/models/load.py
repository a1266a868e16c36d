"""Loads the base model, frozen, with its tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pickle import UnpicklingError
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lorasweep.config.model import ModelConfig, ModelKind
from lorasweep.errors import ConfigError, first_line
from lorasweep.models.dropout import set_dropout_modules, set_dropout_settings
from lorasweep.models.factory import build_custom_model
from lorasweep.models.folder import find_model_folder
from lorasweep.models.pretrained import LOADING_ERRORS, load_pretrained, load_with_new_head, quiet_transformers
from lorasweep.models.weight_files import WeightFiles, build_on_meta, has_weight_files

MODEL_CLASSES: dict[ModelKind, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "classifier": AutoModelForSequenceClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
}
KIND_NAMES: dict[ModelKind, str] = {
    "causal_lm": "causal language model",
    "classifier": "model for sequence classification",
    "seq2seq": "sequence-to-sequence model",
}


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The labels that a classifier predicts."""

    kind: Literal["single_label", "multi_label", "regression"]
    names: tuple[str, ...]
    """The name of each output; under regression the name of the number, or empty."""

    @property
    def num_outputs(self) -> int:
        return 1 if self.kind == "regression" else len(self.names)


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseModel:
    """A pre-trained model whose weights never change. Runs train copies that share them."""

    model: nn.Module
    """In evaluation mode, no parameter trains, no key-value cache. `model(input_ids=...)` has `logits`."""
    tokenizer: PreTrainedTokenizerBase | None
    """None only if `model.factory` returns no tokenizer and `model.path` is null."""
    path: str
    """The value of `model.path`, or of `model.factory`."""
    fingerprint: str
    """Fingerprint of the weights as loaded, so it differs between dtypes. New modules do not count."""
    num_parameters: int
    """Number of parameters; tied parameters count once."""
    kind: ModelKind = "causal_lm"
    new_head_names: tuple[str, ...] = ()
    """Names of the modules that were not in the checkpoint. Each run draws them with its seed, and trains them."""
    labels: Labels | None = None
    files: WeightFiles | None = None
    """Files of the weights of a model on the meta device; None for a model in memory."""

    def describe(self) -> dict[str, Any]:
        """Returns the model's entry in a run record."""
        return {
            "path": self.path,
            "fingerprint": self.fingerprint,
            "parameters": self.num_parameters,
            "kind": self.kind,
            "head": list(self.new_head_names),
            "labels": None if self.labels is None else asdict(self.labels),
        }


def load_base(
    config: ModelConfig, *, dtype: torch.dtype, labels: Labels | None = None, on_meta: bool = False
) -> BaseModel:
    """Loads the base model straight into `dtype`, on the CPU.

    Buffers that transformers keeps in fp32 (rotary frequencies) stay in fp32.

    Args:
        config: Settings of the model.
        dtype: Type of the parameters.
        labels: Labels of a classifier; None keeps those of its checkpoint.
        on_meta: Whether to leave the weights in their files (`BaseModel.files`). Only possible for safetensors whose
            names and shapes are those of the model; otherwise the weights are loaded.

    Raises:
        ConfigError: The model is missing, damaged, incomplete or not of `model.kind`; reading it needs a permission
            (`model.allow_pickle`, `model.trust_remote_code`); or labels are given for a model that is not a classifier.
    """
    if labels is not None and config.kind != "classifier":
        raise ConfigError(
            f"`model.kind` must be classifier for data with labels, but got {config.kind!r}. Use `model=classifier`."
        )
    files = None
    if config.factory is not None:
        model, tokenizer, head = build_custom_model(config, dtype=dtype, offered={"labels": labels})
        if tokenizer is None and config.path is not None:
            tokenizer = _load_tokenizer(config)
    else:
        model, tokenizer, head, files = _load(config, dtype=dtype, labels=labels, on_meta=on_meta)
        if config.dropout is not None:
            set_dropout_modules(model, config.dropout)
    _set_padding(model, tokenizer)
    model.requires_grad_(False).train(False)
    if isinstance(model, PreTrainedModel):
        model.config.use_cache = False
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        path=config.factory or str(config.path),
        fingerprint=fingerprint_weights(model, exclude=head, files=files),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        kind=config.kind,
        new_head_names=head,
        labels=labels,
        files=files,
    )


def fingerprint_weights(model: nn.Module, *, exclude: Collection[str] = (), files: WeightFiles | None = None) -> str:
    """Returns the first 16 hex digits of a SHA-256 over the sorted names and raw bytes of all parameters.

    Tied weights count once, under their first name.

    Args:
        model: Any module.
        exclude: Names of modules whose parameters do not count.
        files: Files of the parameters that are on the meta device.
    """
    digest = hashlib.sha256()
    excluded = tuple(f"{name}." for name in exclude)
    for name, parameter in sorted(model.named_parameters()):
        if not name.startswith(excluded):
            digest.update(name.encode())
            if parameter.is_meta:
                assert files is not None
                values = files.read(name).to(parameter.dtype)
            else:
                values = parameter.detach()
            digest.update(values.cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _load(
    config: ModelConfig, *, dtype: torch.dtype, labels: Labels | None, on_meta: bool
) -> tuple[nn.Module, PreTrainedTokenizerBase | None, tuple[str, ...], WeightFiles | None]:
    """Returns the model, its tokenizer, the names of its new modules, and its files if the weights stay in them."""
    folder, gguf_file = find_model_folder(config)
    kind, is_classifier = MODEL_CLASSES[config.kind], config.kind == "classifier"
    shared: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if gguf_file is not None:
        shared["gguf_file"] = gguf_file
    attention = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    try:
        with quiet_transformers():
            settings = AutoConfig.from_pretrained(str(folder), **shared)
            tokenizer = AutoTokenizer.from_pretrained(str(folder), **shared)
        _change_settings(settings, config, labels)
        if on_meta and gguf_file is None and not config.trust_remote_code and has_weight_files(folder):
            built = build_on_meta(kind, settings, folder, dtype=dtype, may_lack_head=is_classifier, **attention)
            if built is not None:
                model, head, files = built
                return model, tokenizer, head, files
        given = {"config": settings, **attention, **shared}
        if gguf_file is not None and hasattr(transformers, "GgufConfig"):  # without it, all weights are dequantised
            given["quantization_config"] = transformers.GgufConfig(dequantize=True)
        if gguf_file is not None or config.allow_pickle:
            given["use_safetensors"] = None if gguf_file is None else False  # None: safetensors if there are any
        if is_classifier:
            model, head = load_with_new_head(kind, str(folder), dtype=dtype, **given)
        else:
            model, head = load_pretrained(kind, str(folder), dtype=dtype, **given), ()
    except LOADING_ERRORS as error:
        raise _explain(error, config) from error
    if gguf_file is not None:
        setattr(model, "hf_quantizer", None)  # noqa: B010 (otherwise transformers refuses to save it)
    return model, tokenizer, head, None


def _load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of `model.path` for a model of `model.factory`."""
    folder, _ = find_model_folder(config)
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=config.trust_remote_code
            )
    except LOADING_ERRORS as error:
        raise _explain(error, config) from error
    return tokenizer


def _change_settings(settings: Any, config: ModelConfig, labels: Labels | None) -> None:
    if config.dropout is not None:
        set_dropout_settings(settings, config.dropout)
    if labels is not None:
        names = labels.names[: labels.num_outputs]
        settings.id2label = dict(enumerate(names))
        settings.label2id = {name: index for index, name in enumerate(names)}
        settings.num_labels = labels.num_outputs
        settings.problem_type = "regression" if labels.kind == "regression" else f"{labels.kind}_classification"


def _explain(error: Exception, config: ModelConfig) -> ConfigError:
    """Returns the error of transformers as one sentence, with the setting that helps."""
    if "trust_remote_code" in str(error):
        return ConfigError(
            f"`model.trust_remote_code` must be true for {config.path!r}, which comes with Python code, but is false. "
            "That code can do everything that you can do on this machine. Read it first, or use another model."
        )
    if config.attention != "auto" and ("attn_implementation" in str(error) or "FlashAttention" in str(error)):
        return ConfigError(
            f"`model.attention` must be available for this model and machine, but got {config.attention!r} "
            f"({first_line(error)}). Use `model.attention=auto`."
        )
    # The message of an UnpicklingError advises to read the file without restrictions, which is dangerous.
    reason = "it has other things than tensors" if isinstance(error, UnpicklingError) else first_line(error)
    return ConfigError(
        f"`model.path` must be a {KIND_NAMES[config.kind]} with its tokenizer, but {config.path!r} can't be loaded: "
        f"{reason}. Download the model again, or use another model."
    )


def _set_padding(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Sets the end-of-text token as padding if there is no padding token. Padded positions are masked anyway."""
    if tokenizer is None:
        return
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    settings: Any = getattr(model, "config", None)
    if hasattr(settings, "get_text_config"):
        settings = settings.get_text_config()  # for a model that also reads images
    if settings is not None and getattr(settings, "pad_token_id", None) is None:
        settings.pad_token_id = tokenizer.pad_token_id
