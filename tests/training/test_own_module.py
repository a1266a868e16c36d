"""A user's own LightningModule trains with each method, resumes exactly, and every mistake in it is one sentence."""

from pathlib import Path

import pytest
import torch
import yaml
from tests.training.own_modules import DigitClassifier
from tests.training.runs import logged_rows, stop_after

import lorasweep
from lorasweep.config.compose import compose_run
from lorasweep.errors import ConfigError
from lorasweep.record import read_run, read_steps
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.training.finished_run import restore_model, score_run
from lorasweep.training.inputs import load_inputs
from lorasweep.training.open_run import RunFolder
from lorasweep.training.own_module import SeededData
from lorasweep.training.prepare import check_run
from lorasweep.training.run import train_alone

MODULES = "tests.training.own_modules"
SHORT = {
    "trainer.max_steps": 24,  # an epoch of digits has 20
    "trainer.precision": "fp32",
    "trainer.device": "cpu",
    "trainer.progress": False,
    "optim.lr": 1e-2,
}
DIGITS = SHORT | {
    "module._target_": f"{MODULES}.DigitClassifier",
    "module.lr_argument": "learning_rate",
    "module.new_modules": ["classifier"],
    "datamodule._target_": f"{MODULES}.Digits",
    "datamodule.batch_size": 64,
    "metric": {"name": "val_acc", "direction": "maximize"},
    "trainer.batch_size": 64,
    "trainer.eval_every_steps": 10,
}


def prepare(settings):
    config = compose_run(settings)
    inputs = load_inputs(config)
    check_run(config, inputs.base)
    return config, inputs


def train(settings, folder, **arguments):
    config, inputs = prepare(settings)
    return train_alone(config, RunFolder(path=folder), inputs=inputs, **arguments), inputs


@pytest.mark.parametrize("method", ["lora", "full", "part"])
def test_a_method_trains_the_users_module_and_its_kept_weights_have_the_recorded_score(tmp_path, method):
    part = {"method": "full", "method.parameters": "norm.*"}
    settings = DIGITS | (part if method == "part" else {"method": method})
    record, inputs = train(settings, tmp_path)
    assert record.status == "complete"
    assert record.tokens_trained == 23 * 64 + 1258 % 64  # the last batch of an epoch is smaller
    base, model = inputs.base.model, restore_model(compose_run(settings), inputs.base, folder=tmp_path / "best")
    images, labels = map(torch.cat, zip(*SeededData(inputs.splits.data_module, seed=0).val_dataloader(), strict=True))
    with torch.no_grad():
        accuracy = (model(images).argmax(-1) == labels).float().mean()
    assert record.score == pytest.approx(float(accuracy))
    is_same = torch.equal(model.norm.running_mean, base.norm.running_mean)
    assert is_same is (method != "full")  # statistics belong to the frozen base
    record = score_run(tmp_path, inputs=inputs)
    assert 0 < record.test["val_acc"] <= 1
    assert "test_scores.csv" in record.files


@pytest.mark.release
@pytest.mark.parametrize("stop_at", [7, 20, 23])
def test_a_stopped_run_resumes_with_the_same_losses(tmp_path, stop_at):
    settings = DIGITS | {"module.dropout": 0.1, "trainer.eval_every_steps": 20 if stop_at == 20 else 10}
    whole, inputs = train(settings, tmp_path / "whole")
    arguments = {"inputs": inputs, "resume": True}
    config, folder = compose_run(settings), RunFolder(path=tmp_path / "parts")
    assert train_alone(config, folder, stop_requested=stop_after(stop_at), **arguments).status == "interrupted"
    assert 0 < read_run(folder.path).steps_done < 24
    assert train_alone(config, folder, **arguments).score == whole.score
    assert logged_rows(folder.path) == logged_rows(tmp_path / "whole")


def test_the_data_order_depends_on_its_seed_and_not_on_the_method(tmp_path):
    inputs = load_inputs(compose_run(DIGITS))

    def read_labels(seed):
        torch.rand(seed + 1)  # what the model draws
        data = SeededData(inputs.splits.data_module, seed=seed)
        return [labels.tolist() for _, labels in data.train_dataloader()]

    assert read_labels(1) == read_labels(1) != read_labels(2)


class NoOptimizer(DigitClassifier):
    configure_optimizers = lorasweep.TrainingModule.__bases__[0].configure_optimizers

    def test_step(self, batch, batch_idx):
        self.log("test_acc", 0.5)
        lorasweep.record_scores(batch[1].float(), groups=[f"writer {row // 2}" for row in range(len(batch[1]))])


def test_optim_trains_a_module_without_an_optimizer_of_its_own_and_scores_may_have_groups(tmp_path):
    own = {"module._target_": f"{__name__}.NoOptimizer", "module.lr_argument": None}
    _, inputs = train(DIGITS | own, tmp_path)
    rates = [row["lr"] for row in read_steps(tmp_path) if "lr" in row]
    assert max(rates) == 1e-2
    assert rates[-1] < 2e-3  # the schedule's decay
    score_run(tmp_path, inputs=inputs)
    lines = (tmp_path / "test_scores.csv").read_text().splitlines()
    assert lines[0] == "row,score,weight,group"
    assert lines[1].endswith("writer 0")


class NoTest(DigitClassifier):
    test_step = lorasweep.TrainingModule.__bases__[0].test_step


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"module.log_as": "accuracy"}, ["metric.name=val_acc", "validation_step", "accuracy"]),
        ({"method.targets": ["q_prj"]}, ["method.targets", "q_prj"]),
        ({"module.lr_argument": None}, ["module.lr_argument", "optim.lr"]),
        ({"module.lr_argument": "lr"}, ["`module` must have arguments that", "'lr'"]),
        ({"module.new_modules": ["clasifier"]}, ["module.new_modules", "`clasifier`"]),
        ({"module._target_": f"{MODULES}.Digits"}, ["module._target_", "LightningModule"]),
        ({"module._target_": f"{__name__}.NoTest"}, ["test_step"]),
        ({"datamodule._target_": f"{MODULES}.DigitClassifier"}, ["datamodule._target_", "LightningDataModule"]),
        ({"trainer.batch_size": 32}, ["trainer.batch_size", "64"]),
        ({"metric.direction": None}, ["metric.direction"]),
        ({"trainer.accumulate": 2}, ["trainer.accumulate", "module._target_"]),
        ({"model.quantization": "nf4"}, ["model.quantization", "module._target_"]),
    ],
)
def test_a_mistake_is_one_sentence(changes, words):
    settings = {key: value for key, value in DIGITS.items() if key != "metric"}
    settings |= {"metric.name": "val_acc", "metric.direction": "maximize"} | changes
    with pytest.raises(ConfigError) as caught:
        prepare(settings)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_sweep_file_of_the_page_is_a_sweep_whose_trials_run_alone():
    page = Path("docs/own_module.md").read_text()
    content = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0].replace("mine.", f"{MODULES}."))
    definition = read_definition(content)
    for arm in definition.arms:
        for config in arm.corner_configs:
            check_run(config, load_inputs(config).base)
    plan = definition.find_arm("lora").packing
    assert plan.key is None
    assert "module._target_" in plan.reason
