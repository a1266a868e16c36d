"""A model scored after its training scores what the run said of it, row by row in the split's own order."""

from pathlib import Path

import pytest
import torch

from lorasweep.methods import METHODS
from lorasweep.record import read_run
from lorasweep.training.prepare import prepare_model
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunPlace
from lorasweep.training.score import evaluate_model


def restore(config, inputs, folder):
    model = prepare_model(config, inputs.base)
    METHODS[config.method.name].load(model, folder / "best")
    return model


def score(model, config, inputs, split=None):
    split = inputs.splits.validation if split is None else split
    return evaluate_model(model, split, task=inputs.splits.task_of(split), config=config, inputs=inputs)


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_the_best_weights_score_what_the_record_says(tmp_path, make_config, inputs, method):
    config = make_config({"method": method})
    train_run(config, RunPlace(folder=Path(tmp_path)), inputs=inputs)
    found = score(restore(config, inputs, tmp_path), config, inputs)
    record = read_run(tmp_path)
    assert found.values == {name: record.best[name] for name in found.values}
    assert len(found.examples.loss) == len(inputs.splits.validation)


def test_scoring_moves_no_random_stream_and_leaves_the_model_evaluating(make_config, inputs):
    config = make_config()
    model = prepare_model(config, inputs.base)
    before = torch.get_rng_state()
    score(model, config, inputs)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training


def test_rows_come_in_the_order_of_the_part(make_config, inputs):
    config = make_config({"trainer.eval_batch_size": 1})
    model = prepare_model(config, inputs.base)
    together = score(model, make_config(), inputs).examples
    one_by_one = score(model, config, inputs).examples
    torch.testing.assert_close(together.loss, one_by_one.loss, rtol=1e-4, atol=1e-4)  # fp32, other batch shapes


def test_the_test_part_is_scored_by_its_own_bytes(make_config, inputs):
    config = make_config()
    split = inputs.splits.test()
    found = score(prepare_model(config, inputs.base), config, inputs, split)
    nats = found.examples.loss.sum() / found.examples.items.sum()
    expected = nats.item() / torch.log(torch.tensor(2.0)).item() / split.bytes_per_token
    assert found.values["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
