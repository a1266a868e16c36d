"""Components by `_target_`: made with their arguments, or refused in one sentence."""

import optuna
import pytest
import torch
from torch import nn

from lorasweep.config.components import Component, find_class, instantiate
from lorasweep.errors import ConfigError

SAMPLER = optuna.samplers.BaseSampler
TPE = "optuna.samplers.TPESampler"
QMC = "optuna.samplers.QMCSampler"


def named(target, **arguments):
    return Component(target=target, arguments=arguments)


def test_what_the_caller_hands_over_is_the_same_object_and_wins():
    weights = nn.Parameter(torch.ones(2))
    sgd = named("torch.optim.SGD", lr=0.5, momentum=0.9)
    made = instantiate(sgd, key="optim", expected=torch.optim.Optimizer, params=[weights], lr=1.0)
    assert made.param_groups[0]["params"][0] is weights
    assert (made.defaults["lr"], made.defaults["momentum"]) == (1.0, 0.9)


CALLABLES = ["torch.load", "torch.serialization.pickle.Unpickler", "optuna.create_study"]


@pytest.mark.parametrize("target", [*CALLABLES, "lorasweep.training.stop_signal.StopSignal", "", "a..b", 3, None])
def test_what_is_no_class_of_the_type_is_refused(target):
    with pytest.raises(
        ConfigError, match=r"`sampler._target_` must be (a subclass of|the import path of a class|a cl)"
    ):
        find_class(target, key="sampler", expected=SAMPLER)


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        ("optuna.samplers.GridSampler", {}, "missing 1 required positional argument: 'search_space'"),
        ("optuna.samplers.NSGAIISampler", {"population_size": 1}, "`population_size` must be greater"),
        ("optuna.samplers.NoSuch", {}, "`sampler._target_` must be the import path of a class"),
        ("deepspeed.NoSuch", {}, "`sampler._target_` must .*: ModuleNotFoundError: No module named 'deepspeed'"),
    ],
)
def test_an_error_of_a_class_is_one_sentence(target, arguments, message, caplog):
    with pytest.raises(ConfigError, match=message) as refused:
        instantiate(named(target, **arguments), key="sampler", expected=SAMPLER)
    assert "\n" not in str(refused.value)
    assert caplog.text == ""  # a log would stand beside the sentence


def test_a_module_that_fails_when_it_is_imported_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('no licence\\nfor this machine')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ConfigError, match=r"`sampler._target_` must be .* got 'broken_module.Sampler': RuntimeError: no"
    ):
        find_class("broken_module.Sampler", key="sampler", expected=SAMPLER)
