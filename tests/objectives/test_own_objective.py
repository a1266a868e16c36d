"""A user's objective, one file, trains in packs, and in a sweep with verdicts."""

import pytest
from tests.small_runs import SMALL_RUN, TWO_STEPS, rates

import lorasweep
from lorasweep.config.compose import compose_run
from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.training.inputs import load_inputs
from lorasweep.training.prepare import check_run

FOCAL = {"objective._target_": "tests.objectives.focal_tokens.FocalTokens", "objective.gamma": 2.0, "logger": "none"}


def test_a_sweep_with_the_objective_ends_with_verdicts(tmp_path):
    sweep = {
        "name": "focal",
        "settings": TWO_STEPS | FOCAL | {"confirm.seeds": 2, "confirm.margin": 0.1, "sweep.trials": 2},
        "arms": {
            "frozen": {"settings": {"method": "frozen"}},
            "full": {"settings": {"method": "full"}, "space": {"optim.lr": rates(1e-4, 1e-3)}},
            "lora": {"settings": {"method": "lora"}, "space": {"method.rank": [1, 2]}},
        },
    }
    assert read_definition(sweep).find_arm("lora").packing.key is not None
    result = lorasweep.run_sweep(sweep, output=tmp_path / "sweep", progress=None)
    assert result.metric == "token_accuracy"
    assert len(result.confirm_dataframe()) == 1 + 2 + 2  # the frozen base has the same score on every seed
    assert "full" in result.table()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective.gama": 1.0}, ["objective", "gama"]),
        ({"objective._target_": "torch.nn.Linear"}, ["objective._target_", "Objective"]),
    ],
)
def test_a_mistake_is_one_sentence(changes, words):
    config = compose_run(SMALL_RUN | FOCAL | changes)
    with pytest.raises(ConfigError) as caught:
        check_run(config, load_inputs(config).base)
    assert all(word in str(caught.value) for word in words), str(caught.value)
