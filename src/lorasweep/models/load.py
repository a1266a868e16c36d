"""Loads the base model, frozen, with its tokenizer. `methods` then says what of a copy of it trains.

`folder` finds its files, `pretrained` reads them; `own` calls a function of the user's instead.
"""

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
from lorasweep.models.folder import find_files
from lorasweep.models.own import build_own
from lorasweep.models.pretrained import LOADING_ERRORS, load_pretrained, load_with_new_head, quiet_transformers
from lorasweep.models.weight_files import WeightFiles, build_on_meta, has_weight_files

CLASSES: dict[ModelKind, Any] = {
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
    """One for each output; under regression the name of the number."""

    @property
    def num_outputs(self) -> int:
        """Outputs of the head: one for each name, and 1 for a regression."""
        return 1 if self.kind == "regression" else len(self.names)


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseModel:
    """A pre-trained model whose weights stay as they are; runs train copies that share them."""

    model: nn.Module
    """In evaluation mode, no parameter trains, no key-value cache. Called as `model(input_ids=...).logits`."""
    tokenizer: PreTrainedTokenizerBase | None
    """None only where `model.factory` brings none and `model.path` is null."""
    path: str
    """`model.path` as it was set, or `model.factory`."""
    fingerprint: str
    """Fingerprint of the weights as loaded, so it differs between dtypes; new modules are left out."""
    num_parameters: int
    """Number of parameters; a tensor used twice counts once."""
    kind: ModelKind = "causal_lm"
    head: tuple[str, ...] = ()
    """Names of the modules that were not in the checkpoint: each run draws them from its own seed, and trains them."""
    labels: Labels | None = None
    """The labels that a classifier was loaded for."""
    files: WeightFiles | None = None
    """Files of the weights, for a model on the meta device; None for a model that has its weights in memory."""

    def describe(self) -> dict[str, Any]:
        """Returns what a run record keeps of it."""
        return {
            "path": self.path,
            "fingerprint": self.fingerprint,
            "parameters": self.num_parameters,
            "kind": self.kind,
            "head": list(self.head),
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
        labels: Labels of a classifier; with None it keeps those of its checkpoint.
        on_meta: Leaves the weights in their files (`BaseModel.files`) if possible: if they are safetensors with the
            model's own names.

    Raises:
        ConfigError: The model is not there, damaged, incomplete or not of `model.kind`; reading it needs a permission
            (`model.allow_pickle`, `model.trust_remote_code`); labels are given to a model that has none.
    """
    if labels is not None and config.kind != "classifier":
        raise ConfigError(
            f"`model.kind` must be classifier for data with labels, but got {config.kind!r}. Use `model=classifier`."
        )
    files = None
    if config.factory is not None:
        model, tokenizer, head = build_own(config, dtype=dtype, offered={"labels": labels})
        tokenizer = tokenizer or _load_tokenizer(config)
    else:
        model, tokenizer, head, files = _load(config, dtype=dtype, labels=labels, on_meta=on_meta)
    _set_padding(model, tokenizer)
    model.requires_grad_(False).train(False)
    if isinstance(model, PreTrainedModel):
        model.config.use_cache = False
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        path=config.factory or str(config.path),
        fingerprint=fingerprint_weights(model, leave_out=head, files=files),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        kind=config.kind,
        head=head,
        labels=labels,
        files=files,
    )


def require_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a base model, for data that is text.

    Raises:
        ConfigError: It has none.
    """
    if base.tokenizer is None:
        raise ConfigError(
            f"`model.factory` must bring a tokenizer for data that is text, but {base.path!r} brings none. "
            "Return (model, tokenizer), or name one by `model.path`."
        )
    return base.tokenizer


def fingerprint_weights(model: nn.Module, *, leave_out: Collection[str] = (), files: WeightFiles | None = None) -> str:
    """Returns the first 16 hex digits of a SHA-256 over the sorted names and raw bytes of all parameters.

    Tied weights count once, under their first name.

    Args:
        model: Any module.
        leave_out: Names of modules whose parameters do not count.
        files: Files of the parameters that are on the meta device.
    """
    digest = hashlib.sha256()
    without = tuple(f"{name}." for name in leave_out)
    for name, parameter in sorted(model.named_parameters()):
        if not name.startswith(without):
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
    folder, gguf_file = find_files(config)
    kind, is_classifier = CLASSES[config.kind], config.kind == "classifier"
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
                return _with_dropout(model, config), tokenizer, head, files
        given = {"config": settings, **attention, **shared}
        if gguf_file is not None and hasattr(transformers, "GgufConfig"):  # without it, all weights are dequantised
            given["quantization_config"] = transformers.GgufConfig(dequantize=True)
        if gguf_file is not None or config.allow_pickle:
            given["use_safetensors"] = None if gguf_file is None else False  # None: where there are some
        if is_classifier:
            model, head = load_with_new_head(kind, str(folder), dtype=dtype, **given)
        else:
            model, head = load_pretrained(kind, str(folder), dtype=dtype, **given), ()
    except LOADING_ERRORS as error:
        raise _explain(error, config, is_gguf=gguf_file is not None) from error
    if gguf_file is not None:
        setattr(model, "hf_quantizer", None)  # noqa: B010 (plain weights by now; transformers refused to save them)
    return _with_dropout(model, config), tokenizer, head, None


def _with_dropout(model: nn.Module, config: ModelConfig) -> nn.Module:
    if config.dropout is not None:
        set_dropout_modules(model, config.dropout)
    return model


def _load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer that `model.path` names beside `model.factory`, if it names one."""
    if config.path is None:
        return None
    folder, _ = find_files(config)
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=config.trust_remote_code
            )
    except LOADING_ERRORS as error:
        raise ConfigError(
            f"`model.path` must have a tokenizer for the model of `model.factory`, but {config.path!r} can't be "
            f"loaded: {first_line(error)}. Name another, or null where the function returns one."
        ) from error
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


def _explain(error: Exception, config: ModelConfig, *, is_gguf: bool) -> ConfigError:
    """Returns the error of transformers as one sentence, with the setting that helps."""
    if is_gguf and isinstance(error, ImportError):
        return ConfigError(
            f"a GGUF file needs the package gguf, which is missing ({first_line(error)}). "
            "Install `pip install 'lorasweep[gguf]'`."
        )
    if "trust_remote_code" in str(error):
        return ConfigError(
            f"`model.trust_remote_code` must be true for {config.path!r}, which comes with Python code of its own, but "
            "is false. That code could do whatever you can on this machine: read it first, or use another model."
        )
    if config.attention != "auto" and ("attn_implementation" in str(error) or "FlashAttention" in str(error)):
        return ConfigError(
            f"`model.attention` must be one that the model has and this machine can run, but got {config.attention!r} "
            f"({first_line(error)}). Use `model.attention=auto`."
        )
    holds_more = isinstance(error, UnpicklingError)  # whose message advises to read it without restrictions
    reason = "it holds other things than tensors" if holds_more else first_line(error)
    return ConfigError(
        f"`model.path` must be a {KIND_NAMES[config.kind]} with its tokenizer, but {config.path!r} can't be loaded: "
        f"{reason}. Get the model again, or use another."
    )


def _set_padding(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Pads with the end-of-text token where a model has no token for it: padded positions are masked anyway."""
    if tokenizer is None:
        return
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    settings: Any = getattr(model, "config", None)
    if hasattr(settings, "get_text_config"):
        settings = settings.get_text_config()  # of a model that also sees images
    if settings is not None and getattr(settings, "pad_token_id", None) is None:
        settings.pad_token_id = tokenizer.pad_token_id
