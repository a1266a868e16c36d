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
from lorasweep.models.folder import ModelFiles, find_files, find_source
from lorasweep.models.own import build_own
from lorasweep.models.pretrained import (
    LOADING_ERRORS,
    load_pretrained,
    load_with_new_head,
    quiet_transformers,
)
from lorasweep.models.weight_files import WeightFiles, build_on_meta

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
    """What a classifier is to tell."""

    kind: Literal["single_label", "multi_label", "regression"]
    names: tuple[str, ...]
    """One for each output; of a regression, the name of the number."""

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
    """Of the weights as loaded, so it differs between dtypes (see `fingerprint_weights`); new modules are left out."""
    num_parameters: int
    """A tensor used twice counts once."""
    kind: ModelKind = "causal_lm"
    head: tuple[str, ...] = ()
    """Names of the modules that were not in the checkpoint: each run draws them from its own seed, and trains them."""
    labels: Labels | None = None
    """What a classifier was told to tell."""
    files: WeightFiles | None = None
    """Where the weights are, for a model on the meta device; None for one that has them."""

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

    Buffers that transformers keeps in fp32 (rotary frequencies) stay so. For what is in a folder or in the hub's cache
    nothing is asked for on the network.

    Args:
        config: Which model.
        dtype: Of the parameters.
        labels: Of a classifier; with None it keeps those of its checkpoint.
        on_meta: Leaves the weights in their files (`BaseModel.files`) where that can be: a folder of safetensors whose
            names are those of the model.

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
        model, tokenizer, head = _build(config, dtype=dtype, labels=labels)
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
        files: Where the parameters are that are on the meta device.
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
    files = find_files(config)
    source = str(files.folder)
    shared: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if files.gguf_file is not None:
        shared["gguf_file"] = files.gguf_file
    try:
        with quiet_transformers():
            settings = AutoConfig.from_pretrained(source, **shared)
            tokenizer = AutoTokenizer.from_pretrained(source, **shared)
        _change_settings(settings, config, labels)
        given = {"config": settings, **_reading(config, files), **shared}
        is_classifier = config.kind == "classifier"
        if on_meta and files.form == "safetensors" and not config.trust_remote_code:
            built = build_on_meta(
                CLASSES[config.kind],
                settings,
                files.folder,
                dtype=dtype,
                may_lack_head=is_classifier,
                **({} if config.attention == "auto" else {"attn_implementation": config.attention}),
            )
            if built is not None:
                model, head, weight_files = built
                return _with_dropout(model, config), tokenizer, head, weight_files
        if is_classifier:
            model, head = load_with_new_head(CLASSES[config.kind], source, dtype=dtype, **given)
        else:
            model, head = load_pretrained(CLASSES[config.kind], source, dtype=dtype, **given), ()
    except LOADING_ERRORS as error:
        raise _explain(error, config, files) from error
    if files.form == "gguf":
        setattr(model, "hf_quantizer", None)  # noqa: B010 (plain weights by now; transformers refused to save them)
    return _with_dropout(model, config), tokenizer, head, None


def _with_dropout(model: nn.Module, config: ModelConfig) -> nn.Module:
    if config.dropout is not None:
        set_dropout_modules(model, config.dropout)
    return model


def _build(
    config: ModelConfig, *, dtype: torch.dtype, labels: Labels | None
) -> tuple[nn.Module, PreTrainedTokenizerBase | None, tuple[str, ...]]:
    model, tokenizer, head = build_own(config, dtype=dtype, offered={"labels": labels})
    return model, tokenizer or _load_tokenizer(config), head


def _load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer that `model.path` names beside `model.factory`."""
    if config.path is None:
        return None
    source = find_source(config)
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(source), trust_remote_code=config.trust_remote_code
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


def _reading(config: ModelConfig, files: ModelFiles) -> dict[str, Any]:
    given: dict[str, Any] = {"use_safetensors": files.form == "safetensors"}
    if config.attention != "auto":
        given["attn_implementation"] = config.attention
    if files.form == "gguf" and hasattr(transformers, "GgufConfig"):  # without it, all are dequantised
        given["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return given


def _explain(error: Exception, config: ModelConfig, files: ModelFiles) -> ConfigError:
    if files.form == "gguf" and isinstance(error, ImportError):
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
    form = {"safetensors": "safetensors", "pickle": "a pickle file", "gguf": "a GGUF file"}[files.form]
    return ConfigError(
        f"`model.path` must be a {KIND_NAMES[config.kind]} in {form} with its tokenizer, but "
        f"{config.path!r} can't be loaded: {reason}. Get the model again, or use another."
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
