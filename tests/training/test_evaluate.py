"""A model scored after its training scores what the run said of it, row by row in the part's own order."""

from pathlib import Path

import pytest
import torch

from lorasweep.data.tasks import RowScores
from lorasweep.methods import METHODS
from lorasweep.record import read_run
from lorasweep.training import RunPlace, evaluate_model, train_run
from lorasweep.training.evaluate import in_order
from lorasweep.training.prepare import prepare_model


def restore(config, bench, folder):
    model = prepare_model(config, bench.base)
    METHODS[config.method.name].load(model, folder / "best")
    return model


def score(model, config, bench, part=None):
    part = bench.parts.validation if part is None else part
    return evaluate_model(model, part, task=bench.parts.task_of(part), config=config, precision=bench.precision)


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_the_best_weights_score_what_the_record_says(tmp_path, make_config, bench, method):
    config = make_config({"method": method})
    train_run(config, RunPlace(folder=Path(tmp_path)), bench=bench)
    found = score(restore(config, bench, tmp_path), config, bench)
    record = read_run(tmp_path)
    assert found.values == {name: record.best[name] for name in found.values}
    assert len(found.rows.loss) == len(bench.parts.validation)


def test_scoring_moves_no_random_stream_and_leaves_the_model_evaluating(make_config, bench):
    config = make_config()
    model = prepare_model(config, bench.base)
    before = torch.get_rng_state()
    score(model, config, bench)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training


def test_rows_come_in_the_order_of_the_part(make_config, bench):
    config = make_config({"trainer.eval_batch_size": 1})
    model = prepare_model(config, bench.base)
    together = score(model, make_config(), bench).rows
    one_by_one = score(model, config, bench).rows
    torch.testing.assert_close(together.loss, one_by_one.loss, rtol=1e-4, atol=1e-4)  # fp32, other batch shapes


def test_rows_that_came_sorted_are_put_back():
    rows = RowScores(loss=torch.tensor([30.0, 10.0, 20.0]), items=torch.tensor([3.0, 1.0, 2.0]))
    assert in_order(rows, [2, 0, 1]).loss.tolist() == [10.0, 20.0, 30.0]


def test_the_test_part_is_scored_by_its_own_bytes(make_config, bench):
    config = make_config()
    part = bench.parts.test()
    found = score(prepare_model(config, bench.base), config, bench, part)
    nats = found.rows.loss.sum() / found.rows.items.sum()
    expected = nats.item() / torch.log(torch.tensor(2.0)).item() / part.bytes_per_token
    assert found.values["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
