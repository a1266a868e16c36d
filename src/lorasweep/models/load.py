"""Loads the frozen base model and its tokenizer from a folder, the hub or this package."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.errors import HTTPError as HubError  # type: ignore[attr-defined]  # lacks a type stub
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from lorasweep.config.components import require_package
from lorasweep.config.data import LabelKind, ModelKind
from lorasweep.config.run import ModelConfig
from lorasweep.errors import ConfigError, describe_error, first_line
from lorasweep.lora.layer_kinds import count_parameters, list_scales
from lorasweep.models.paths import find_local_path
from lorasweep.models.pretrained import (
    QUANTISING_PACKAGES,
    build_quantisation_arguments,
    finish_quantised,
    load_pretrained,
    quiet_transformers,
)

MODEL_CLASSES: dict[ModelKind, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "classifier": AutoModelForSequenceClassification,
    "embedder": AutoModel,
}

ALWAYS_DOWNLOADED = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
"""Patterns for the names of files that are always downloaded: configuration, tokenizer and weights."""
LAYER_DROP_NAMES = ("layerdrop", "layer_drop", "drop_path")
"""Rates whose names contain one of these skip whole layers."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The labels that a classifier predicts."""

    kind: LabelKind
    names: tuple[str, ...]
    """Names of the classes in the order of the model's outputs. For regression: only `value`."""
    constant: tuple[float, ...] = ()
    """Logits of a constant prediction, such as the most frequent class of train; empty if it is not known."""

    @property
    def num_outputs(self) -> int:
        return 1 if self.kind == "regression" else len(self.names)


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseModel:
    """A pre-trained model whose weights never change. Each run trains a copy that shares these weights."""

    model: nn.Module
    """In evaluation mode, with frozen parameters and without key-value cache. `model(input_ids=...)` has `logits`, or
    `last_hidden_state` if it is an embedder."""
    tokenizer: PreTrainedTokenizerBase
    path: str
    """The value of `model.path`, or of `module._target_`."""
    fingerprint: str
    """Result of `fingerprint_weights` without new modules. The same model has another fingerprint in another dtype or
    quantisation."""
    num_parameters: int
    """Number of parameters; tied parameters count once."""
    folder: Path | None = None
    """The folder with the model's files; None for a user's module."""
    kind: ModelKind = "causal_lm"
    new_head_names: tuple[str, ...] = ()
    """Names of modules that the checkpoint does not have. Each run draws their weights with its seed."""
    labels: Labels | None = None

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


def load_base(config: ModelConfig, *, dtype: torch.dtype, labels: Labels | None = None) -> BaseModel:
    """Loads the base model in `dtype` on the CPU. With `model.quantization`, linear layers are stored in fewer bits.

    Buffers that transformers keeps in fp32 stay in fp32. Without `labels`, a classifier has those of its checkpoint.

    Raises:
        ConfigError: The model is missing, damaged, incomplete or not of `model.kind`. Or it needs
            `model.trust_remote_code`. Or labels are given, but the model is not a classifier. Or it can't be quantised.
    """
    if config.quantization != "none":
        for package in QUANTISING_PACKAGES:
            require_package(package, key=f"model.quantization={config.quantization}", extra="quantised")
    if labels is not None and config.kind != "classifier":
        raise ConfigError(
            f"`model.kind` must be classifier for data with labels, but got {config.kind!r}. Use `model=classifier`."
        )
    folder, model_class = find_model_folder(config), MODEL_CLASSES[config.kind]
    shared: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    attention = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    with _refuse_damaged_files(config):
        settings = AutoConfig.from_pretrained(str(folder), **shared)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **shared)
        if 2 * len(tokenizer) < settings.get_text_config().vocab_size:  # transformers makes one without its files
            raise ConfigError(
                f"`model.path` must have the files of its tokenizer, such as tokenizer.json, but {config.path!r} gives "
                f"one of {len(tokenizer)} tokens for a model of {settings.get_text_config().vocab_size:,}. Copy them "
                "into the model's folder."
            )
        if config.dropout is not None:
            set_dropout_settings(settings, config.dropout)
        if labels is not None:
            settings.id2label = dict(enumerate(labels.names[: labels.num_outputs]))
            settings.label2id = {name: index for index, name in settings.id2label.items()}
            settings.num_labels = labels.num_outputs
            settings.problem_type = "regression" if labels.kind == "regression" else f"{labels.kind}_classification"
        arguments = {"config": settings, **attention, **shared}
        if config.quantization != "none":
            arguments |= build_quantisation_arguments(config, model_class, settings, dtype=dtype)
        model, head_names = load_pretrained(
            model_class, str(folder), dtype=dtype, may_lack_head=config.kind == "classifier", **arguments
        )
    if config.quantization != "none":
        finish_quantised(model, config)
    if config.dropout is not None:
        for module in model.modules():
            if isinstance(module, _DropoutNd):  # some do not read their rate from the configuration
                module.p = config.dropout
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token  # padded positions are masked
    text_settings = model.config.get_text_config()  # a model that also reads images has its text settings inside
    if getattr(text_settings, "pad_token_id", None) is None:
        text_settings.pad_token_id = tokenizer.pad_token_id
    model.requires_grad_(False).train(False)
    model.config.use_cache = False
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        path=config.path,
        fingerprint=fingerprint_weights(model, exclude=head_names),
        num_parameters=count_parameters(model),
        folder=folder,
        kind=config.kind,
        new_head_names=head_names,
        labels=labels,
    )


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Returns a model's tokenizer without loading the model. Raises ConfigError if it can't be loaded."""
    folder = find_model_folder(config)
    with _refuse_damaged_files(config):
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=config.trust_remote_code)


def find_model_folder(config: ModelConfig) -> Path:
    """Returns the folder of `model.path`. Downloads missing files.

    Raises ConfigError if there is no such model, or it is only an adapter, or has no weights in safetensors.
    """
    folder = find_local_path(config) or _download(config)
    if (folder / "adapter_config.json").exists():  # transformers would load its base model, too
        raise ConfigError(
            f"`model.path` must be a whole model, but {config.path!r} is an adapter. Use its base model, or merge "
            "the adapter first (`lorasweep export`)."
        )
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"`model.path` must have weights in safetensors, but {config.path!r} has none. Save the model again with "
            "transformers' `save_pretrained`."
        )
    return folder


def list_model_files(folder: Path) -> list[Path]:
    """Returns the files of a model that decide what it computes: weights, configuration, tokenizer and code."""
    return sorted(path for pattern in (*ALWAYS_DOWNLOADED, "*.py") for path in folder.glob(pattern))


def list_module_files(folder: Path) -> list[Path]:
    """Returns the files from which sentence-transformers knows the modules of an embedder; none for other models."""
    own = [folder / f"{name}.json" for name in ("modules", "sentence_bert_config", "config_sentence_transformers")]
    return [path for path in (*own, *sorted(folder.glob("[0-9]*/config.json"))) if path.is_file()]


def _download(config: ModelConfig) -> Path:
    """Returns the folder of a hub id in the hub's cache. Downloads the files that the cache does not have."""
    wanted = [*ALWAYS_DOWNLOADED, *(["*.py"] if config.trust_remote_code else [])]
    try:
        folder = snapshot_download(
            config.path,
            revision=config.revision,
            allow_patterns=wanted,
            # subfolders have the model in other formats, but for those of sentence-transformers, such as `1_Pooling`
            ignore_patterns=["[!0-9]*/*"],
        )
    except GatedRepoError as error:
        raise ConfigError(
            f"`model.path` must be a model that you may download, but you did not accept the terms of {config.path!r}. "
            "Accept them on its page, then log in with `hf auth login`."
        ) from error
    except (OSError, ValueError, HubError) as error:
        raise ConfigError(
            f"`model.path` must be a folder or a model on the hub, but {config.path!r} can't be downloaded: "
            f"{first_line(error.__cause__ or error)}. Check its spelling and the connection."
        ) from error
    return Path(folder)


def fingerprint_weights(model: nn.Module, *, exclude: Collection[str] = ()) -> str:
    """Returns the first 16 hex digits of a SHA-256 over the names and bytes of all parameters, sorted by name.

    Tied parameters count once, under their first name. A 4-bit parameter has the bytes of its scales too. Parameters of
    the modules in `exclude` are skipped.
    """
    digest = hashlib.sha256()
    excluded = tuple(f"{name}." for name in exclude)
    for name, parameter in sorted(model.named_parameters()):
        if not name.startswith(excluded):
            digest.update(name.encode())
            for tensor in (parameter.detach(), *list_scales(parameter)):
                digest.update(tensor.cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


@contextmanager
def _refuse_damaged_files(config: ModelConfig) -> Iterator[None]:
    """Raises ConfigError for any error of transformers and its parsers: damaged files cause errors of many classes."""
    try:
        with quiet_transformers():
            yield
    except ConfigError:
        raise
    except BaseException as error:
        # a panic of the tokenizers' Rust code is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise _to_config_error(error, config) from error


def _to_config_error(error: BaseException, config: ModelConfig) -> ConfigError:
    """Returns an error of transformers as a short message that names the setting to change."""
    if "trust_remote_code" in str(error):
        return ConfigError(
            f"`model.trust_remote_code` must be true for {config.path!r}, which has its own Python code, but is false. "
            "This code can do everything that you can do on this machine. Read it before you allow it."
        )
    if config.attention != "auto" and ("attn_implementation" in str(error) or "FlashAttention" in str(error)):
        return ConfigError(
            f"`model.attention` must be available for this model and machine, but got {config.attention!r} "
            f"({first_line(error)}). Use `model.attention=auto`."
        )
    return ConfigError(
        f"`model.path` must be a model for `model.kind={config.kind}` with its tokenizer, but {config.path!r} can't be "
        f"loaded: {describe_error(error)}. Download the model again, or use another model."
    )


def set_dropout_settings(settings: Any, rate: float) -> None:
    """Sets every dropout rate in a model's configuration (transformers' `PreTrainedConfig`), also in nested ones.

    Functions inside a model, such as attention, read their rate there. Rates that skip whole layers are set only to 0.
    """
    for name, value in list(vars(settings).items()):
        is_rate = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        if "drop" in name and is_rate and (rate == 0 or not any(part in name for part in LAYER_DROP_NAMES)):
            setattr(settings, name, float(rate))
    for name in getattr(settings, "sub_configs", {}):
        if (nested := getattr(settings, name, None)) is not None:
            set_dropout_settings(nested, rate)
