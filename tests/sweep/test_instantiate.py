"""A pruner of the user's own is imported, checked and made, or refused in one sentence."""

from __future__ import annotations

import optuna
import pytest

from lorasweep.config.compose import compose_driver
from lorasweep.errors import ConfigError
from lorasweep.sweep.instantiate import build_pruner


class Refusing(optuna.pruners.BasePruner):
    """A pruner that can't be made, and says why in two lines."""

    def __init__(self):
        raise RuntimeError("no pruner today\nnor tomorrow")

    def prune(self, study, trial):
        return False


def build(settings):
    return build_pruner(compose_driver(settings).pruner)


def test_a_pruner_is_made_with_its_arguments():
    made = build({"pruner._target_": "optuna.pruners.PercentilePruner", "pruner.percentile": 25.0})
    assert type(made) is optuna.pruners.PercentilePruner


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pruner._target_": "optuna.pruners.NoSuch"}, "`pruner._target_` must be the import path of a class, but got"),
        ({"pruner._target_": "no_such_module.Pruner"}, "`pruner._target_` must be the import path of a class, but got"),
        ({"pruner._target_": "words"}, "`pruner._target_` must be the import path of a class, but got 'words'"),
        ({"pruner._target_": ""}, "`pruner._target_` must be the import path of a class, but got ''"),
        (
            {"pruner._target_": "optuna.create_study"},
            "must be a subclass of `optuna.pruners.BasePruner`, but 'optuna.cr",
        ),
        ({"pruner._target_": "pathlib.Path"}, "must be a subclass of `optuna.pruners.BasePruner`, but 'pathlib.Path'"),
        (
            {"pruner._target_": "optuna.pruners.PercentilePruner"},
            "`pruner` must have arguments that 'optuna.pruners.Pe",
        ),
        ({"pruner._target_": "optuna.pruners.PercentilePruner", "pruner.percentile": 200.0}, "`pruner` must have argu"),
        ({"pruner._target_": "tests.sweep.test_instantiate.Refusing"}, "no pruner today"),
        (
            {"pruner._target_": "optuna.pruners.PatientPruner", "pruner.wrapped_pruner._target_": "optuna.NoSuch"},
            "`pruner` must have arguments that 'optuna.pruners.PatientPruner' takes",
        ),
    ],
)
def test_what_is_no_pruner_is_refused_in_one_sentence(settings, message, caplog):
    with pytest.raises(ConfigError) as refused:
        build(settings)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert caplog.text == ""  # a log would stand beside the sentence


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_pruner_around_another_is_made():
    made = build(
        {
            "pruner._target_": "optuna.pruners.PatientPruner",
            "pruner.patience": 2,
            "pruner.wrapped_pruner._target_": "optuna.pruners.PercentilePruner",
            "pruner.wrapped_pruner.percentile": 25.0,
        }
    )
    assert type(made) is optuna.pruners.PatientPruner
    assert type(made._wrapped_pruner) is optuna.pruners.PercentilePruner


def test_a_module_that_fails_when_it_is_imported_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "broken_pruner.py").write_text("raise RuntimeError('no licence\\nfor this machine')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"`pruner._target_` must be .* got 'broken_pruner.Pruner': RuntimeError: no"):
        build({"pruner._target_": "broken_pruner.Pruner"})
