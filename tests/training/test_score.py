"""A finished run's best weights are scored on the test split, once, with a line per row."""

import csv
import dataclasses
import math

import pytest
import torch
from tests.small_runs import SMALL_RUN
from tests.training.runs import settings_of, train_together

from lorasweep.config.compose import compose_run
from lorasweep.config.data import ScoreMetric
from lorasweep.data import batching
from lorasweep.errors import RecordError
from lorasweep.objectives.next_tokens import NextTokens
from lorasweep.record import TEST_SCORES_FILE, compute_sha256, read_run, read_steps, restore_config
from lorasweep.training.evaluation import evaluate_model
from lorasweep.training.finished_run import restore_model, score_run
from lorasweep.training.inputs import load_inputs
from lorasweep.training.open_run import RunFolder
from lorasweep.training.prepare import prepare_model
from lorasweep.training.run import train_alone

NUMBERS = ("row", "score", "weight")
PERPLEXITY = ScoreMetric(name="perplexity", direction="minimize")


@pytest.fixture
def trained(make_config, inputs, tmp_path):
    """Trains a run and returns its folder."""

    def train(settings=None):
        folder = tmp_path / "run"
        train_alone(make_config(settings), RunFolder(path=folder, arm="lora", trial=0), inputs=inputs)
        return folder

    return train


def read_rows(folder):
    with (folder / TEST_SCORES_FILE).open() as file:
        return [{**row, **{name: float(row[name]) for name in NUMBERS}} for row in csv.DictReader(file)]


@pytest.mark.parametrize("method", ["lora", "full", "head", "frozen"])
def test_every_method_is_scored_with_the_weights_of_its_best_evaluation(trained, inputs, method):
    folder = trained(settings_of(method))
    record = score_run(folder, inputs=inputs)
    assert record == read_run(folder)
    assert set(record.test) == set(NextTokens.metrics)
    rows = read_rows(folder)
    assert [row["row"] for row in rows] == list(range(4))
    assert tuple(row["group"] for row in rows) == inputs.splits.test().groups
    mean = sum(row["score"] * row["weight"] for row in rows) / sum(row["weight"] for row in rows)
    assert mean == pytest.approx(record.test["bits_per_byte"], rel=1e-12)
    assert record.data["test"] == inputs.splits.test().describe()
    assert record.files[TEST_SCORES_FILE]["sha256"] == compute_sha256(folder / TEST_SCORES_FILE)


def test_the_scores_are_those_of_the_best_weights_and_not_of_the_last(make_config, tmp_path):
    # so high that the first steps of a trained model are the best
    config = make_config({"model": "tiny", "optim.lr": 0.5, "trainer.eval_every_steps": 1})
    inputs, folder = load_inputs(config), tmp_path
    train_alone(config, RunFolder(path=folder), inputs=inputs)
    record = read_run(folder)
    assert record.best["step"] < record.last["step"]
    scored = score_run(folder, inputs=inputs)
    batch = inputs.splits.test().batch(range(len(inputs.splits.test())))
    model = restore_model(config, inputs.base, folder=folder / "best")
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()).item()
    assert scored.test["loss"] == pytest.approx(loss, rel=1e-4)  # sums of 256 logits and 128 losses in fp32


def evaluate(model, config, inputs):
    return evaluate_model(
        model, inputs.splits.validation, objective=inputs.data.objective, config=config, inputs=inputs
    )


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("fraction", [1, 0.5])
def test_the_best_weights_score_what_the_record_says(trained, make_config, inputs, monkeypatch, method, fraction):
    monkeypatch.setattr(batching, "MIN_PART_EXAMPLES", 1)
    config, folder = make_config({"method": method}), trained({"method": method, "trainer.eval_fraction": fraction})
    during = [row["validation"]["loss"] for row in read_steps(folder) if "validation" in row]
    assert (read_run(folder).best["loss"] in during) is (fraction == 1)  # two of the four blocks have another loss
    found = evaluate(restore_model(config, inputs.base, folder=folder / "best"), config, inputs)
    assert found.values == {name: read_run(folder).best[name] for name in found.values}
    assert len(found.examples.loss) == len(inputs.splits.validation)


def test_an_evaluation_draws_nothing_and_returns_examples_in_the_order_of_the_split(make_config, inputs):
    config = make_config({"trainer.eval_batch_size": 1})
    model = prepare_model(config, inputs.base)
    before = torch.get_rng_state()
    together = evaluate(model, make_config(), inputs).examples
    one_by_one = evaluate(model, config, inputs).examples
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    torch.testing.assert_close(together.loss, one_by_one.loss, rtol=1e-4, atol=1e-4)  # fp32, other batch shapes


def test_rows_of_perplexity_are_losses_of_which_it_is_the_exponential(make_config, inputs, tmp_path):
    by_perplexity = dataclasses.replace(inputs, splits=dataclasses.replace(inputs.splits, score_metric=PERPLEXITY))
    config = make_config({"data.metric": "perplexity"})
    train_alone(config, RunFolder(path=tmp_path), inputs=by_perplexity)
    record = score_run(tmp_path, inputs=by_perplexity)
    assert record.metric == "perplexity"
    rows = read_rows(tmp_path)
    mean = sum(row["score"] * row["weight"] for row in rows) / sum(row["weight"] for row in rows)
    assert mean == pytest.approx(record.test["loss"], rel=1e-12)
    assert math.exp(mean) == pytest.approx(record.test["perplexity"], rel=1e-12)


def make_table(folder, **settings):
    """Returns the settings of a run on 150 labelled texts."""
    rows = ["text,label", *(f"words {n},{'often' if n % 3 else 'rare'}" for n in range(150))]
    (folder / "topics.csv").write_text("\n".join(rows) + "\n")
    words = {"model": "classifier", "model.path": "embedded:tiny", "data": "table", "data.text": "text"}
    return {**words, "data.label": "label", "data.train": str(folder / "topics.csv"), **settings}


def test_a_metric_by_its_class_scores_a_slot_as_a_run_alone_and_no_single_example(tmp_path):
    name = "MulticlassAUROC"
    metric = {"data.metric._target_": f"torchmetrics.classification.{name}", "data.metric.num_classes": 2}
    short = {key: value for key, value in SMALL_RUN.items() if key.startswith("trainer.")}
    configs = [compose_run(make_table(tmp_path, **metric, **short, seed=n)) for n in (0, 1)]
    inputs, alone = load_inputs(configs[0]), tmp_path / "alone"
    packed = {tmp_path / f"packed-{n}": config for n, config in enumerate(configs)}
    train_together(packed, inputs=inputs, checkpoint_file=tmp_path / "pack.ckpt")
    train_alone(configs[0], RunFolder(path=alone), inputs=inputs)
    one, slot = read_run(alone), read_run(tmp_path / "packed-0")
    assert (one.metric, one.direction) == (slot.metric, slot.direction) == (name, "maximize")
    # kernels of other shapes round otherwise, which may swap a few of the pairs of examples
    assert slot.last[name] == pytest.approx(one.last[name], abs=0.1)
    assert restore_config(slot) == configs[0]
    assert score_run(alone, inputs=inputs).test.keys() >= {name, "loss"}
    assert not (alone / TEST_SCORES_FILE).exists()  # its parts are not the scores of examples


def test_a_run_is_scored_once(trained, inputs):
    folder = trained()
    first = score_run(folder, inputs=inputs)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    def read():
        raise AssertionError("the test split is read again")

    again = dataclasses.replace(inputs, splits=dataclasses.replace(inputs.splits, test=read))
    assert score_run(folder, inputs=again) == first
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_weights_that_are_missing_or_damaged_are_refused_and_nothing_is_written(trained, inputs):
    folder = trained()
    (folder / "best" / "adapter_model.safetensors").write_bytes(b"damaged")
    before = (folder / "run.json").read_bytes()
    with pytest.raises(RecordError, match=r"adapter_model\.safetensors"):
        score_run(folder, inputs=inputs)
    assert (folder / "run.json").read_bytes() == before
    assert not (folder / TEST_SCORES_FILE).exists()


def test_a_base_with_a_new_head_gives_the_most_frequent_label_on_every_seed(tmp_path):
    config, other = (compose_run(make_table(tmp_path, method="frozen", seed=seed)) for seed in (0, 1))
    inputs = load_inputs(config)
    train_alone(config, RunFolder(path=tmp_path / "a-0", arm="a", trial=0), inputs=inputs)
    record = score_run(tmp_path / "a-0", inputs=inputs)
    expected = inputs.splits.score_constant_answer(inputs.splits.test())
    assert record.test == pytest.approx(expected, rel=1e-2)  # the base computes in bf16
    assert record.test["accuracy"] == expected["accuracy"] > 0.5
    train_alone(other, RunFolder(path=tmp_path / "a-1", arm="a", trial=1), inputs=inputs)
    assert score_run(tmp_path / "a-1", inputs=inputs).test == record.test
