"""A run is scored by a metric that `data.metric._target_` names: alone, in a pack, and on test data."""

import pytest
from tests.small_runs import SMALL_RUN
from tests.training.runs import train_together

from lorasweep.config.compose import compose_run
from lorasweep.record import read_run
from lorasweep.training.inputs import build_inputs
from lorasweep.training.restore import restore_config
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunFolder
from lorasweep.training.score import score_run

ACCURACY = "torchmetrics.classification.MulticlassAccuracy"
METRIC = {"data.metric._target_": ACCURACY, "data.metric.num_classes": 512, "data.metric.average": "micro"}
NAME = "MulticlassAccuracy"
TEXT = SMALL_RUN | {
    "data.block_length": 64,
    "data.max_validation_blocks": 8,
    "trainer.progress": False,
    "logger": "none",
}


@pytest.fixture(scope="module")
def own_inputs():
    return build_inputs(compose_run(TEXT | METRIC))


def test_a_packed_run_scores_as_it_would_alone_and_the_record_restores_the_metric(own_inputs, tmp_path):
    configs = [compose_run(TEXT | METRIC | {"method.rank": rank, "optim.lr": 1e-2}) for rank in (2, 4)]
    for rank, config in enumerate(configs):
        train_run(config, RunFolder(path=tmp_path / f"alone-{rank}"), inputs=own_inputs)
    packed = {tmp_path / f"packed-{rank}": config for rank, config in enumerate(configs)}
    train_together(packed, inputs=own_inputs, state_file=tmp_path / "pack.json")
    for rank in range(2):
        alone, packed = (read_run(tmp_path / f"{how}-{rank}") for how in ("alone", "packed"))
        assert alone.metric == packed.metric == NAME
        assert alone.direction == "maximize"
        assert 0 < alone.score < 1
        # one of 504 tokens may be predicted otherwise, because kernels of other shapes round otherwise
        assert packed.last[NAME] == pytest.approx(alone.last[NAME], abs=1.5 / 504)
        assert packed.last["loss"] == pytest.approx(alone.last["loss"], rel=1e-4)
        assert restore_config(packed) == configs[rank]
    scored = score_run(tmp_path / "alone-0", inputs=own_inputs)
    assert 0 < scored.test[NAME] < 1
    assert not (tmp_path / "alone-0" / "test_scores.csv").exists()  # its parts are not the scores of examples
