"""Parts by `_target_`: made with their arguments, or refused in one sentence before anything of them runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lightning
import optuna
import pytest
import torch
from torch import nn

from lorasweep.config.build import as_settings, build
from lorasweep.config.components import Component, argument_names, find_class, instantiate
from lorasweep.config.trust import EVERY_PACKAGE, is_trusted, require_trusted, set_trusted, trusted_packages
from lorasweep.errors import ConfigError

PRUNER = optuna.pruners.BasePruner
PERCENTILE = "optuna.pruners.PercentilePruner"


@pytest.fixture(autouse=True)
def _no_trust() -> Iterator[None]:
    yield
    set_trusted(())


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of a stranger's that leaves a file when it is imported; returns that file's path."""
    trace = tmp_path / "trace"
    (tmp_path / "evil_parts.py").write_text(
        "import pathlib, optuna\n"
        f"pathlib.Path({str(trace)!r}).write_text('ran')\n"
        "class Pruner(optuna.pruners.NopPruner):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return trace


def named(target: str, **arguments) -> Component:
    return Component(target=target, arguments=arguments)


def test_a_part_is_made_with_its_arguments():
    made = instantiate(named(PERCENTILE, percentile=25.0), key="pruner", expected=PRUNER)
    assert type(made) is optuna.pruners.PercentilePruner
    assert made._percentile == 25.0


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_part_inside_of_a_part_is_made():
    inner = {"_target_": PERCENTILE, "percentile": 25.0}
    outer = named("optuna.pruners.PatientPruner", patience=2, wrapped_pruner=inner)
    made = instantiate(outer, key="pruner", expected=PRUNER)
    assert type(made._wrapped_pruner) is optuna.pruners.PercentilePruner


def test_what_the_caller_hands_over_is_the_same_object_and_wins():
    weights = nn.Parameter(torch.ones(2))
    made = instantiate(
        named("torch.optim.SGD", lr=0.5, momentum=0.9),
        key="optim",
        expected=torch.optim.Optimizer,
        params=[weights],
        lr=1.0,
    )
    assert made.param_groups[0]["params"][0] is weights
    assert (made.defaults["lr"], made.defaults["momentum"]) == (1.0, 0.9)


@pytest.mark.parametrize(
    "target", ["os.system", "subprocess.Popen", "builtins.eval", "numpy.load", "evil_parts.Pruner"]
)
def test_a_class_outside_of_the_list_is_refused_and_not_imported(target, evil):
    with pytest.raises(ConfigError, match=r"`pruner._target_` must be a class of a package that is trusted") as refused:
        instantiate(named(target), key="pruner", expected=PRUNER)
    assert f"add `trust=[{target.partition('.')[0]}]` to the command line" in str(refused.value)
    assert not evil.exists()


def test_a_package_that_the_user_trusts_is_taken(evil):
    set_trusted(["evil_parts"])
    assert trusted_packages() == ("evil_parts",)
    made = instantiate(named("evil_parts.Pruner"), key="pruner", expected=PRUNER)
    assert isinstance(made, optuna.pruners.NopPruner)
    assert evil.exists()
    set_trusted([])
    assert not is_trusted("evil_parts")


@pytest.mark.parametrize(
    "target",
    [
        "torch.load",
        "torch.hub.load",
        "torch.os.system",
        "torch.serialization.pickle.Unpickler",
        "optuna.create_study",
        "optuna.samplers.RandomSampler",
        "lightning.Trainer",
        "lorasweep.training.stop_signal.StopSignal",
    ],
)
def test_a_trusted_packages_other_names_are_refused(target):
    with pytest.raises(
        ConfigError, match=r"`pruner._target_` must be (a subclass of|the import path of a class|a class)"
    ):
        instantiate(named(target), key="pruner", expected=PRUNER)


@pytest.mark.parametrize("target", ["", "words", "a..b", "optuna.pruners:NopPruner", "optuna.__class__", 3, None])
def test_what_is_no_import_path_is_refused(target):
    with pytest.raises(ConfigError, match=r"`pruner._target_` must be the import path of a class"):
        find_class(target, key="pruner", expected=PRUNER)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ({"_target_": "os.system", "command": "true"}, "`pruner.wrapped_pruner._target_` must be a class of a package"),
        ({"_target_": "torch.nn.Linear"}, "must be a class such as an optimizer"),
        ({"_target_": "torch.load", "f": "x"}, "`pruner.wrapped_pruner._target_` must be the import path of a class"),
        ([{"_target_": "subprocess.Popen", "args": "true"}], "`pruner.wrapped_pruner.0._target_` must be a class of a"),
        ({"deep": {"_target_": "builtins.exec"}}, "`pruner.wrapped_pruner.deep._target_` must be a class of a package"),
        ({"_partial_": True}, "`pruner.wrapped_pruner._partial_` must be an argument of a class"),
        ("${oc.env:HOME}", "`pruner.wrapped_pruner` must be a value, but got the interpolation"),
    ],
)
def test_what_is_inside_of_a_part_is_checked_before_anything_is_made(inner, message):
    with pytest.raises(ConfigError, match=message):
        instantiate(
            named("optuna.pruners.PatientPruner", patience=2, wrapped_pruner=inner), key="pruner", expected=PRUNER
        )


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        (PERCENTILE, {}, "missing 1 required positional argument: 'percentile'"),
        (PERCENTILE, {"percentile": 200.0}, "Percentile must be between 0 and 100"),
        ("optuna.pruners.NoSuch", {}, "`pruner._target_` must be the import path of a class"),
        (
            "deepspeed.NoSuch",
            {},
            "`pruner` needs the package 'deepspeed', which is not installed. Run `pip install deeps",
        ),
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
    set_trusted(["broken_pruner"])
    with pytest.raises(ConfigError, match=r"`pruner._target_` must be .* got 'broken_pruner.Pruner': RuntimeError: no"):
        find_class("broken_pruner.Pruner", key="pruner", expected=PRUNER)


def test_a_package_that_is_missing_is_named_with_its_install_command(monkeypatch):
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    with pytest.raises(ConfigError, match=r"`logger.wandb` "):
        instantiate(
            named("lightning.pytorch.loggers.WandbLogger"),
            key="logger.wandb",
            expected=lightning.pytorch.loggers.Logger,
        )


def test_the_names_of_a_class_arguments_are_found():
    assert argument_names(PERCENTILE, key="pruner")[0][0] == "percentile"
    assert argument_names("lightning.pytorch.loggers.WandbLogger", key="logger")[1]


def test_untrusted_parts_are_found_in_settings_without_importing_them(evil):
    settings = {"callbacks": {"mine": {"_target_": "evil_parts.Pruner"}, "theirs": {"_target_": PERCENTILE}}}
    with pytest.raises(ConfigError, match=r"`callbacks.mine._target_` must be a class of a package that is trusted"):
        require_trusted(settings)
    set_trusted([EVERY_PACKAGE])
    require_trusted(settings)
    assert not evil.exists()


def test_settings_of_a_part_are_the_same_after_a_round_trip():
    given = {"_target_": PERCENTILE, "percentile": 25.0, "inner": {"_target_": "optuna.pruners.NopPruner"}, "list": [1]}
    made = build(Component, given, key="pruner")
    assert (made.target, made.name) == (PERCENTILE, "PercentilePruner")
    assert as_settings(made) == given


def test_a_part_without_a_target_is_refused():
    with pytest.raises(ConfigError, match=r"`pruner._target_` must be set, but is missing"):
        build(Component, {"percentile": 25.0}, key="pruner")
