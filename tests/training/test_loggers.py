"""Runs with parts that settings name by `_target_` train, resume exactly, and are recorded to be repeated."""

import csv
from typing import ClassVar

import pytest
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.training.runs import logged_rows, stop_after, train, train_together

from lorasweep.record import read_run, read_steps, restore_config
from lorasweep.training.optim import schedule_factor


def rates(folder):
    return [row["lr"] for row in read_steps(folder) if "lr" in row]


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "sgd"},
        {"optim": "adafactor", "schedule": "cosine"},
        {"schedule": "one_cycle"},
    ],
    ids=["sgd", "adafactor", "one_cycle"],
)
def test_a_run_with_another_optimizer_or_schedule_learns_and_resumes_exactly(tmp_path, make_config, inputs, settings):
    config = make_config({**settings, "optim.lr": 1e-3})
    whole = train(tmp_path / "whole", config, inputs=inputs)
    assert whole.status == "complete"
    assert len({row["loss"] for row in logged_rows(tmp_path / "whole") if "loss" in row}) == whole.steps_done
    asked = iter([False, False, False, True])  # stops after the third step
    train(tmp_path / "halves", config, inputs=inputs, stop_requested=lambda: next(asked))
    assert train(tmp_path / "halves", config, inputs=inputs, resume=True).status == "complete"
    assert logged_rows(tmp_path / "halves") == logged_rows(tmp_path / "whole")
    assert restore_config(read_run(tmp_path / "whole")) == config


def scalars(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def csv_rows(folder):
    (file,) = folder.glob("csv/version_0/metrics.csv")
    with file.open() as opened:
        return list(csv.DictReader(opened))


class Memory(Logger):
    """A logger of a user's own, which keeps what it is told."""

    runs: ClassVar[list[Logger]] = []

    def __init__(self, run_name, tag="none"):
        super().__init__()
        self.run_name, self.tag = run_name, tag
        self.settings, self.metrics, self.status = None, [], None
        Memory.runs.append(self)

    name, version = "memory", 0

    @rank_zero_only
    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, dict(metrics)))

    @rank_zero_only
    def log_hyperparams(self, params, *_):
        self.settings = params

    def finalize(self, status):
        self.status = status


@pytest.fixture(autouse=True)
def _forget_runs():
    Memory.runs.clear()


OWN = {"logger.memory._target_": f"{__name__}.Memory", "logger.memory.tag": "mine"}


def test_several_loggers_get_every_metric_in_the_runs_folder(tmp_path, make_config, inputs):
    config = make_config({"logger": ["tensorboard", "csv"], **OWN})
    train(tmp_path, config, inputs=inputs)
    losses = [(row["step"], row["loss"]) for row in read_steps(tmp_path) if "loss" in row]
    values = [(row["step"], row["validation"]["loss"]) for row in read_steps(tmp_path) if "validation" in row]
    shown = scalars(tmp_path)
    assert [value for _, value in shown["train/loss"]] == pytest.approx([loss for _, loss in losses], rel=1e-6)
    logged = [float(row["validation/loss"]) for row in csv_rows(tmp_path) if row["validation/loss"]]
    assert logged == pytest.approx([value for _, value in values], rel=1e-6)
    (own,) = Memory.runs
    assert (own.tag, own.run_name, own.status) == ("mine", tmp_path.name, "success")
    assert own.settings["optim"]["lr"] == config.optim.lr
    assert len([metrics for _, metrics in own.metrics if "train/loss" in metrics]) == len(losses)


def test_each_slot_of_a_pack_has_its_own_loggers(tmp_path, make_config, inputs):
    settings = {"logger": ["tensorboard", "csv"], **OWN, "trainer.max_steps": 4, "trainer.eval_every_steps": 2}
    jobs = {
        tmp_path / name: make_config({**settings, "optim.lr": rate, "schedule": name})
        for name, rate in (("constant", 1e-3), ("cosine", 2e-3))
    }
    train_together(jobs, inputs=inputs, checkpoint_file=tmp_path / "pack.ckpt")
    assert [own.run_name for own in Memory.runs] == ["constant", "cosine"]
    for own, (folder, config) in zip(Memory.runs, jobs.items(), strict=True):
        expected = {row["step"]: row for row in read_steps(folder) if "loss" in row}
        for step, metrics in own.metrics:
            if "train/loss" in metrics:
                assert (metrics["train/loss"], metrics["train/lr"]) == (expected[step]["loss"], expected[step]["lr"])
        factors = [schedule_factor(config.schedule, n, max_steps=4) for n in range(4)]
        assert [row["lr"] for row in expected.values()] == [config.optim.lr * factor for factor in factors]
        assert [float(row["train/lr"]) for row in csv_rows(folder) if row["train/lr"]] == [
            row["lr"] for row in expected.values()
        ]
        assert [step for step, _ in scalars(folder)["validation/loss"]] == [2, 4]
        assert own.status == "success"


def test_lightnings_callbacks_see_the_run_and_log(tmp_path, make_config, inputs, capsys):
    names = ["lr_monitor", "device_stats", "model_summary"]
    settings = {"callbacks.device_stats.cpu_stats": True}
    config = make_config({"callbacks": names, **settings, "trainer.max_steps": 6})
    plain = make_config({"trainer.max_steps": 6})
    train(tmp_path / "with", config, inputs=inputs)
    train(tmp_path / "without", plain, inputs=inputs)
    assert logged_rows(tmp_path / "with") == logged_rows(tmp_path / "without")  # none of them changes what is learned
    shown = scalars(tmp_path / "with")
    assert [value for _, value in shown["lr-AdamW"]] == pytest.approx(rates(tmp_path / "with"), rel=1e-6)
    assert any("cpu_percent" in tag for tag in shown)
    assert "LlamaForCausalLM" in capsys.readouterr().out


def test_an_early_stopping_of_lightnings_ends_the_run_and_resumes_with_what_it_knew(tmp_path, make_config, inputs):
    settings = {
        "callbacks": "early_stopping",
        "callbacks.early_stopping.min_delta": 9.0,  # so that nothing counts as better than the first
        "callbacks.early_stopping.patience": 2,
        "trainer.max_steps": 10,
        "trainer.eval_every_steps": 2,
    }
    whole = train(tmp_path / "whole", make_config(settings), inputs=inputs)
    assert (whole.status, whole.steps_done) == ("complete", 6)
    assert whole.reason == "a callback stopped it at step 6 of 10"
    train(tmp_path / "halves", make_config(settings), inputs=inputs, stop_requested=stop_after(4))
    assert train(tmp_path / "halves", make_config(settings), inputs=inputs, resume=True).steps_done == 6
