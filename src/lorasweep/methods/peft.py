"""`peft`: trains any adapter of the package PEFT that replaces layers: VeRA, AdaLoRA, IA³, LoRA's other starts.

PEFT makes, saves, loads and merges the adapter. The checks here refuse what a run can't do: adapters that change the
model's inputs, starts that need training data, and settings that lorasweep sets itself.
"""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lorasweep.config.method import MethodConfig, PeftConfig
from lorasweep.config.peft_settings import import_peft
from lorasweep.disk import write_atomically
from lorasweep.errors import ConfigError, RecordError, describe_error
from lorasweep.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from lorasweep.lora.layer_kinds import is_quantised
from lorasweep.lora.patterns import is_name_ending, suggest_layer
from lorasweep.lora.peft_format import INITS_KEEPING_BASE, find_task_type
from lorasweep.lora.targets import find_adaptable_layers
from lorasweep.methods.method import (
    Forward,
    LoadBatches,
    Method,
    clear_tie_setting,
    copy_sharing_weights,
    round_to_frozen_dtype,
)
from lorasweep.models.load import BaseModel
from lorasweep.wording import nearest

ADAPTER = "default"
"""PEFT's name of the only adapter of a model."""
INIT = "init_lora_weights"
STARTS = ("gaussian", "orthogonal", "olora", "pissa", "loftq", "mica", "eva")
"""Values of `init_lora_weights` besides true and false. `pissa_niter_[number]` is missing: it draws random numbers to
change the base, which a saved adapter does not have."""
STARTS_FROM_GRADIENTS = ("corda", "lora_ga")
"""Values of `init_lora_weights` that compute A and B from covariances or gradients, for which a run has no step."""
OWN_KEYS = frozenset(
    {"task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"}
)
"""Keys of PEFT's configuration that follow from the run."""
REFUSED_KEYS: Mapping[str, str] = {
    "bias": "it would train the base's own biases; `method=lora` has `method.bias`",
    "megatron_config": "it imports a module by name",
    "megatron_core": "it imports a module by name",
    "corda_config": "it needs covariances before the first step",
    "lora_ga_config": "it needs gradients before the first step",
    "arrow_config": "it needs adapters that are trained already",
    "kasa_config": "it needs another loss",
    "monteclora_config": "it needs another loss",
    "use_asa": "it needs calls during training",
}
"""Keys of PEFT's configuration that a run can't do, each with the reason."""
REFUSED_TYPES: Mapping[str, str] = {
    "POLY": "it needs the number of a task with each example",
    "SHADOW": "it adds a second model",
    "XLORA": "it needs adapters that are trained already",
}
"""Values of `peft_type` that a run can't do, each with the reason. PEFT itself says which types change inputs."""
TYPES_ON_QUANTISED_BASE = ("LORA", "ADALORA", "HIRA", "IA3", "PVERA", "RANDLORA", "ROAD", "VERA")
"""Values of `peft_type` whose layers call a quantised layer. Layers of other types compute with its stored bytes."""
MAX_EVA_BATCHES = 1_000
"""Number of batches after which EVA's start gives up. PEFT would repeat the data without end until all layers converge,
and they never do if a batch has fewer tokens than a layer has ranks."""
UNSET_STEPS = 2**40
"""AdaLoRA's `total_step` until training begins, if the user set none. `end_step` sets the run's number of steps."""


class PeftMethod(Method):
    """Trains an adapter of PEFT in fp32, and a new head in full, and saves both with PEFT.

    The adapter's layers are inside the model, and PEFT's `PeftModel` around it is kept as `_peft_model`, out of the
    module tree. So the model keeps its class, its names and its `forward`.
    """

    name = "peft"
    needs_autocast = True

    def check(self, model: nn.Module, config: MethodConfig, *, new_head_names: Sequence[str] = ()) -> None:
        """Raises a ConfigError if a key is wrong, or PEFT can't make these layers for the model."""
        assert isinstance(config, PeftConfig)
        settings = dict(config.config)
        peft_config = build_peft_config(settings, model, new_head_names=new_head_names)
        if isinstance(settings.get(INIT), str):
            setattr(peft_config, INIT, True)  # a start may decompose each weight, and change it
        if any(is_quantised(layer) for layer in find_adaptable_layers(model).values()):
            check_quantised(peft_config)
        copy = copy_sharing_weights(model)
        with torch.random.fork_rng(devices=[]):
            add_adapter(copy, peft_config, new_head_names=new_head_names, has_values=False)

    def _make_trainable(
        self, model: nn.Module, config: Any, *, generator: torch.Generator, new_head_names: Sequence[str]
    ) -> None:
        peft_config = build_peft_config(config.config, model, new_head_names=new_head_names)
        with torch.random.fork_rng(devices=[]):  # PEFT draws from torch's default stream
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            add_adapter(model, peft_config, new_head_names=new_head_names)

    def initialise(self, model: nn.Module, *, load_batches: LoadBatches, forward: Forward) -> None:
        """Computes EVA's A and the rank of each layer from the layers' inputs (arXiv 2410.07170)."""
        wrapper = get_wrapper(model)
        if getattr(wrapper.peft_config[ADAPTER], INIT, None) != "eva":
            return
        peft, is_training = import_peft(needed_by="method=peft"), model.training
        batches = EvaBatches(load_batches(MAX_EVA_BATCHES))
        is_half = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
        device = next(model.parameters()).device
        try:
            # PEFT prints one line for each layer and each batch that has too few tokens
            with quiet_peft(), redirect_stdout(io.StringIO()), torch.autocast(device.type, enabled=is_half):
                peft.initialize_lora_eva_weights(
                    wrapper,
                    dataloader=batches,
                    forward_fn=lambda _, batch: forward(model, batch),
                    gather_distributed_inputs=False,  # each process computes the same values from the same batches
                    show_progress_bar=False,
                )
        except ConfigError:
            raise
        except Exception as error:  # PEFT raises errors of many classes, such as IndexError for an encoder-decoder
            raise ConfigError(
                f"`method.config.{INIT}=eva` must work with the model and its data, but: {describe_error(error)}."
            ) from error
        train_in_fp32(model)
        model.train(is_training)

    def save(self, model: nn.Module, folder: Path, *, base: BaseModel) -> None:
        """Writes the adapter, as PEFT's `save_pretrained` does."""
        wrapper = get_wrapper(model)
        wrapper.peft_config[ADAPTER].base_model_name_or_path = base.path
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder.parent) as temporary, quiet_peft():
            wrapper.save_pretrained(temporary, save_embedding_layers=False)  # True or "auto" may ask the hub
            # weights first: if the process stops in between, a folder with a configuration still has its weights
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                write_atomically(folder / name, (Path(temporary) / name).read_bytes())

    def load(self, model: nn.Module, folder: Path) -> None:
        """Loads an adapter onto a copy of the base, or in place of the adapter that a prepared model has."""
        source = f"the adapter in {str(folder)!r}"
        try:
            raw = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            tensors = load_file(folder / WEIGHTS_FILE)
            settings = {key: value for key, value in raw.items() if key not in OWN_KEYS}
            task_type = raw.get("task_type")
            if "_peft_model" not in model.__dict__:
                peft_config = build_peft_config(settings, model)
            else:
                peft_config = build_peft_config(settings, get_wrapper(model).get_base_model())
                _take_off(model, merge=False)
            peft_config.task_type = task_type
            with torch.random.fork_rng(devices=[]):
                add_adapter(model, peft_config)
            model.train(model.training)  # also the new modules
            with quiet_peft():
                found = _set_values(model, tensors)
        except (OSError, ValueError, AttributeError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise RecordError(f"{source} must load, but does not: {describe_error(error)}.") from error
        # adapters may share one parameter under several names, of which the file has one
        named = list(get_wrapper(model).named_parameters(remove_duplicate=False))
        read = {id(parameter) for name, parameter in named if name not in found.missing_keys}
        missing = [name for name, parameter in named if parameter.requires_grad and id(parameter) not in read]
        if wrong := missing + list(found.unexpected_keys):
            raise RecordError(f"{source} must have the weights of its configuration, but {wrong[0]!r} differs.")

    def merge(self, model: nn.Module) -> None:
        """Merges the adapter into the weights, if PEFT can do so for this kind.

        Raises:
            ConfigError: PEFT can't merge this kind of adapter.
        """
        try:
            _take_off(model, merge=True)
        except (NotImplementedError, AttributeError, ValueError, TypeError) as error:
            raise ConfigError(
                f"the adapter must be one that PEFT can merge into the base, but: {describe_error(error)}. "
                "Only PEFT can use it: `lorasweep export --format peft`."
            ) from error
        clear_tie_setting(model)
        round_to_frozen_dtype(model)

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Returns AdaLoRA's penalty, which keeps A and B near orthogonal (arXiv 2303.10512, equation 4)."""
        weight = getattr(get_wrapper(model).peft_config[ADAPTER], "orth_reg_weight", 0.0)
        if not weight or find_rank_allocator(model) is None:
            return None
        terms = []
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
                terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        return weight * torch.stack(terms).mean()

    def end_step(self, model: nn.Module, *, step: int, max_steps: int) -> None:
        """Lets AdaLoRA measure how important each rank is, and drop ranks."""
        if (allocator := find_rank_allocator(model)) is None:
            return
        wrapper = get_wrapper(model)
        config = wrapper.peft_config[ADAPTER]
        if config.total_step == UNSET_STEPS:
            allocator.set_total_step(max_steps)
        if config.tinit >= config.total_step - config.tfinal:
            raise ConfigError(
                f"`method.config.tinit + method.config.tfinal < {config.total_step}` must hold, the number of steps, "
                f"but got {config.tinit} and {config.tfinal}."
            )
        _move_averages(allocator, model)
        wrapper.base_model.update_and_allocate(step)

    def training_state(self, model: nn.Module) -> dict[str, Any]:
        """Returns the averages from which AdaLoRA decides, and its decisions so far; empty for other adapters."""
        if (allocator := find_rank_allocator(model)) is None:
            return {}
        pattern = get_wrapper(model).peft_config[ADAPTER].rank_pattern
        return {"exp_avg_ipt": allocator.exp_avg_ipt, "exp_avg_unc": allocator.exp_avg_unc, "rank_pattern": pattern}

    def load_training_state(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        allocator = find_rank_allocator(model)
        if allocator is None or not state:
            return
        allocator.exp_avg_ipt, allocator.exp_avg_unc = dict(state["exp_avg_ipt"]), dict(state["exp_avg_unc"])
        allocator.ipt = dict(allocator.exp_avg_ipt)  # only its names count: each step computes the values again
        get_wrapper(model).peft_config[ADAPTER].rank_pattern = state["rank_pattern"]


class EvaBatches:
    """The batches for EVA's start. It ends with a ConfigError, where PEFT would repeat the batches."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return MAX_EVA_BATCHES

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches
        raise ConfigError(
            f"`method.config.{INIT}=eva` must converge within {MAX_EVA_BATCHES} batches, but does not. Raise "
            "`trainer.batch_size`, so that a batch has more tokens than ranks, or lower `method.config.r`, or `rho` or "
            "`tau` in `method.config.eva_config`."
        )


def build_peft_config(settings: Mapping[str, Any], model: nn.Module, *, new_head_names: Sequence[str] = ()) -> Any:
    """Returns PEFT's configuration for `method.config`.

    Raises:
        ConfigError: PEFT is not installed; or a key or value is unknown, or can't be done in a run.
    """
    import_peft(needed_by="method=peft")
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: PLC0415 (an optional package)

    kinds = {kind.value: config_class for kind, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    settings = dict(settings)
    kind = settings.pop("peft_type", None)
    if kind not in kinds:
        raise ConfigError(
            f"`method.config.peft_type` must be one of {', '.join(kinds)}, but got {kind!r}."
            f"{nearest(str(kind).upper(), kinds)}"
        )
    config_class = kinds[kind]
    known = {field.name: field for field in fields(config_class) if field.init}
    for key, value in settings.items():
        if key in OWN_KEYS:
            raise ConfigError(f"`method.config.{key}` must be left out, because it follows from the run.")
        if key not in known:
            raise ConfigError(f"`method.config.{key}` is not a setting of PEFT's {kind}.{nearest(key, known)}")
        if key in REFUSED_KEYS and value not in (known[key].default, None, "none", False):
            raise ConfigError(
                f"`method.config.{key}` must be left out, because {REFUSED_KEYS[key]}, but got {value!r}."
            )
    _check_start(settings.get(INIT, True), model)
    if new_head_names:
        if "modules_to_save" not in known:
            raise ConfigError(
                f"`method.config.peft_type` must train a new head too, which PEFT's {kind} can't. Use another type."
            )
        settings["modules_to_save"] = [*(settings.get("modules_to_save") or ()), *new_head_names]
    if kind == "ADALORA":
        settings.setdefault("total_step", UNSET_STEPS)
    if settings.get(INIT) == "loftq":  # PEFT reads both keys, but sets no defaults
        settings["loftq_config"] = {"loftq_bits": 4, "loftq_iter": 1} | dict(settings.get("loftq_config") or {})
    try:
        with quiet_peft():
            config: Any = config_class(**settings)
    except (TypeError, ValueError, ImportError, AttributeError) as error:
        raise _refuse(kind, error) from error
    if reason := REFUSED_TYPES.get(kind):
        raise ConfigError(f"`method.config.peft_type` must be one that trains alone, but {kind} does not: {reason}.")
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ConfigError(
            f"`method.config.peft_type` must replace layers of the model, but {kind} changes the model's inputs, which "
            "lorasweep's tasks do not allow. Use a type such as LORA, VERA or IA3."
        )
    if kind == "ADALORA" and config.init_r <= config.target_r:
        raise ConfigError(
            f"`method.config.init_r > method.config.target_r` must hold, but got {config.init_r} and {config.target_r}."
        )
    config.task_type = find_task_type(model, has_trained_modules=bool(settings.get("modules_to_save")))
    return config


def add_adapter(
    model: nn.Module, peft_config: Any, *, new_head_names: Sequence[str] = (), has_values: bool = True
) -> None:
    """Lets PEFT replace layers of a copy of the base, in place. The base's weights do not change.

    Args:
        model: A copy from `copy_sharing_weights`.
        peft_config: From `build_peft_config`.
        new_head_names: Modules that must train in full.
        has_values: Whether the adapter gets initial values. Without them, it needs no memory.

    Raises:
        ConfigError: PEFT can't make these layers for the model.
    """
    peft, kind = import_peft(needed_by="method=peft"), peft_config.peft_type.value
    shared = {id(parameter) for parameter in model.parameters()}
    if getattr(peft_config, INIT, True) not in INITS_KEEPING_BASE:
        # such a start writes into the base's weights, which other runs share
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    try:
        with quiet_peft():
            wrapper = peft.get_peft_model(model, peft_config, low_cpu_mem_usage=not has_values)
    except Exception as error:  # each kind raises other errors for settings that do not fit the model
        raise _refuse(kind, error, hint=_suggest_targets(peft_config, model)) from error
    train_in_fp32(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        if id(parameter) in shared:
            parameter.requires_grad_(False)
            raise ConfigError(f"`method.config` must not train the base's own weights, but {kind} trains `{name}`.")
    if getattr(wrapper.base_model, "model", None) is not model or not trained:
        raise ConfigError(f"`method.config.peft_type` must replace layers of the model, but {kind} does not.")
    for head in new_head_names:
        if not any(name.startswith(f"{head}.") for name in trained):
            raise ConfigError(f"`method.config` must train the new head `{head}`, but {kind} does not.")
    model.__dict__["_peft_model"] = wrapper  # not an attribute, which would put the model into itself


def _set_values(model: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """Sets the adapter's values. Returns the missing and the unexpected names."""
    wrapper = get_wrapper(model)
    config, pattern = wrapper.peft_config[ADAPTER], None
    if find_rank_allocator(model) is not None and config.rank_pattern:
        # before PEFT does so while it loads, because it then makes layers in the base's dtype, which rounds the values
        pattern, config.rank_pattern = config.rank_pattern, None
        wrapper.base_model.resize_modules_by_rank_pattern(pattern, ADAPTER)
        train_in_fp32(model)
    found = import_peft(needed_by="method=peft").set_peft_model_state_dict(wrapper, tensors, adapter_name=ADAPTER)
    if pattern:
        config.rank_pattern = pattern
    return found


def train_in_fp32(model: nn.Module) -> None:
    """Converts what trains to fp32: PEFT makes some layers in the base's dtype."""
    for name, parameter in model.named_parameters():
        if name.endswith(f"ranknum.{ADAPTER}"):  # AdaLoRA's number of ranks; PEFT unfreezes it on a bf16 base
            parameter.requires_grad_(False)
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def check_quantised(peft_config: Any) -> None:
    """Raises a ConfigError if an adapter computes with the stored weights of a base that is quantised."""
    name = peft_config.peft_type.value
    if name not in TYPES_ON_QUANTISED_BASE:
        raise ConfigError(
            f"`method.config.peft_type` must be one of {', '.join(TYPES_ON_QUANTISED_BASE)} on a quantised base, "
            f"because others compute with floating-point weights, but got {name!r}."
        )
    if getattr(peft_config, "use_dora", False):
        raise ConfigError(
            "`method.config.use_dora` must be false on a quantised base, because DoRA computes with floating-point "
            "weights, but is true."
        )


def get_wrapper(model: nn.Module) -> Any:
    """Returns the `PeftModel` of a prepared model."""
    return model.__dict__["_peft_model"]


def find_rank_allocator(model: nn.Module) -> Any:
    """Returns what decides on AdaLoRA's ranks; None for other adapters."""
    return getattr(get_wrapper(model).base_model, "rankallocator", None)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Suppresses PEFT's warnings: what matters is checked and raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check_start(value: Any, model: nn.Module) -> None:
    """Raises a ConfigError if a run can't begin with this value of `init_lora_weights`."""
    if value == "loftq" and not torch.cuda.is_available():
        raise ConfigError(f"`method.config.{INIT}=loftq` needs a GPU, on which PEFT quantises the weights.")
    if value not in INITS_KEEPING_BASE and any(is_quantised(layer) for layer in find_adaptable_layers(model).values()):
        raise ConfigError(
            f"`method.config.{INIT}` must be true, false, gaussian, orthogonal or eva on a quantised base, because "
            f"other starts compute with floating-point weights, but got {value!r}."
        )
    if not isinstance(value, str) or value in STARTS:
        return
    if value in STARTS_FROM_GRADIENTS:
        raise ConfigError(
            f"`method.config.{INIT}` must need no covariances or gradients before the first step, but got {value!r}. "
            f"Use one of {', '.join(STARTS)}."
        )
    raise ConfigError(
        f"`method.config.{INIT}` must be true, false or one of {', '.join(STARTS)}, but got {value!r}."
        f"{nearest(value, STARTS)}"
    )


def _refuse(kind: str, error: Exception, *, hint: str = "") -> ConfigError:
    return ConfigError(f"`method.config` must fit PEFT's {kind} and the model, but: {describe_error(error)}.{hint}")


def _suggest_targets(peft_config: Any, model: nn.Module) -> str:
    """Returns ` Did you mean ...?` for the first of `target_modules` that is the end of no layer's name."""
    targets = getattr(peft_config, "target_modules", None)
    names = find_adaptable_layers(model)
    for target in () if targets is None or isinstance(targets, str) else sorted(targets):
        if not any(is_name_ending(target, name) for name in names):
            return suggest_layer(target, names)
    return ""


def _take_off(model: nn.Module, *, merge: bool) -> None:
    """Removes the adapter from a prepared model, in place."""
    wrapper = get_wrapper(model)
    if merge:
        from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415 (an optional package)

        for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
            base = layer.get_base_layer()
            if is_quantised(base):
                raise ValueError(f"{type(base).__name__} is quantised")
            for name, parameter in base.named_parameters(recurse=False):  # PEFT merges in place
                setattr(base, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    with quiet_peft():
        _ = wrapper.merge_and_unload() if merge else wrapper.unload()
    del model.__dict__["_peft_model"]
    model.__dict__.pop("peft_config", None)


def _move_averages(allocator: Any, model: nn.Module) -> None:
    """Moves AdaLoRA's averages to the device of their parameters: a checkpoint is read on the CPU."""
    for name, parameter in model.named_parameters():
        for averages in (allocator.exp_avg_ipt, allocator.exp_avg_unc):
            if name in averages:
                averages[name] = averages[name].to(parameter.device)
