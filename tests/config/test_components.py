"""Components by `_target_`: made with their arguments, or refused in one sentence."""

import optuna
import pytest
import torch
from torch import nn

from lorasweep.config.build import as_settings, build
from lorasweep.config.components import Component, find_class, instantiate
from lorasweep.errors import ConfigError

PRUNER = optuna.pruners.BasePruner
PERCENTILE = "optuna.pruners.PercentilePruner"


def named(target, **arguments):
    return Component(target=target, arguments=arguments)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_part_inside_of_a_part_is_made():
    inner = {"_target_": PERCENTILE, "percentile": 25.0}
    outer = named("optuna.pruners.PatientPruner", patience=2, wrapped_pruner=inner)
    made = instantiate(outer, key="pruner", expected=PRUNER)
    assert type(made._wrapped_pruner) is optuna.pruners.PercentilePruner
    assert made._wrapped_pruner._percentile == 25.0


def test_what_the_caller_hands_over_is_the_same_object_and_wins():
    weights = nn.Parameter(torch.ones(2))
    sgd = named("torch.optim.SGD", lr=0.5, momentum=0.9)
    made = instantiate(sgd, key="optim", expected=torch.optim.Optimizer, params=[weights], lr=1.0)
    assert made.param_groups[0]["params"][0] is weights
    assert (made.defaults["lr"], made.defaults["momentum"]) == (1.0, 0.9)


CALLABLES = ["torch.load", "torch.serialization.pickle.Unpickler", "optuna.create_study"]


@pytest.mark.parametrize("target", [*CALLABLES, "lorasweep.training.stop_signal.StopSignal", "", "a..b", 3, None])
def test_what_is_no_class_of_the_type_is_refused(target):
    with pytest.raises(ConfigError, match=r"`pruner._target_` must be (a subclass of|the import path of a class|a cl)"):
        find_class(target, key="pruner", expected=PRUNER)


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        (PERCENTILE, {}, "missing 1 required positional argument: 'percentile'"),
        (PERCENTILE, {"percentile": 200.0}, "Percentile must be between 0 and 100"),
        ("optuna.pruners.NoSuch", {}, "`pruner._target_` must be the import path of a class"),
        ("deepspeed.NoSuch", {}, "`pruner._target_` must .*: ModuleNotFoundError: No module named 'deepspeed'"),
    ],
)
def test_an_error_of_a_class_is_one_sentence(target, arguments, message, caplog):
    with pytest.raises(ConfigError, match=message) as refused:
        instantiate(named(target, **arguments), key="pruner", expected=PRUNER)
    assert "\n" not in str(refused.value)
    assert caplog.text == ""  # a log would stand beside the sentence


def test_a_module_that_fails_when_it_is_imported_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "broken_pruner.py").write_text("raise RuntimeError('no licence\\nfor this machine')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"`pruner._target_` must be .* got 'broken_pruner.Pruner': RuntimeError: no"):
        find_class("broken_pruner.Pruner", key="pruner", expected=PRUNER)


def test_settings_of_a_part_are_the_same_after_a_round_trip():
    given = {"_target_": PERCENTILE, "percentile": 25.0, "inner": {"_target_": "optuna.pruners.NopPruner"}, "list": [1]}
    made = build(Component, given, key="pruner")
    assert (made.target, made.name) == (PERCENTILE, "PercentilePruner")
    assert as_settings(made) == given
    with pytest.raises(ConfigError, match=r"`pruner._target_` must be set, but is missing"):
        build(Component, {"percentile": 25.0}, key="pruner")
