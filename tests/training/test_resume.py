"""A run that was interrupted or killed resumes, and ends as if nothing had happened."""

import errno
import itertools
import shutil
from pathlib import Path

import pytest
import torch
from tests.training.runs import assert_same_run, damage, losses, out_of_memory_above, settings_of, stop_after, train

import lorasweep.training.open_run as open_run_file
import lorasweep.training.run_writer as writer_file
from lorasweep.record import RUN_FILE, read_run

RESUMED = [
    pytest.param({}, [0], id="while the first batch was prepared"),
    pytest.param({}, [1, 1, 1, 1], id="at every step"),
    pytest.param({"trainer.eval_every_steps": 3}, [3], id="at an evaluation that does not divide the run"),
    pytest.param({"trainer.eval_every_steps": 4}, [6], id="after the last step, before its evaluation"),
    pytest.param({"trainer.accumulate": 2, "method.dropout": 0.5}, [3], id="with accumulation and dropout"),
    pytest.param({"method": "full", "optim.lr": 1e-3}, [3], id="full"),
    pytest.param(settings_of("peft"), [3], id="peft"),
    pytest.param({"method": "intrinsic"}, [3], id="intrinsic"),
    pytest.param({"optim.lr_ratio_b": 4.0, "schedule": "cosine", "optim.weight_decay": 0.1}, [3], id="two groups"),
]


@pytest.mark.parametrize(("settings", "stops"), RESUMED)
def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(tmp_path, make_config, inputs, settings, stops):
    config = make_config({"trainer.max_steps": 6, **settings})
    train(tmp_path / "whole", config, inputs=inputs)
    folder, done = tmp_path / "stopped", 0
    for steps in stops:
        record = train(folder, config, inputs=inputs, stop_requested=stop_after(steps), resume=True)
        done += steps
        assert (record.status, record.steps_done) == ("interrupted", done)
        assert record.reason == f"stopped at step {done} of 6"
        assert [row[0] for row in losses(folder)] == list(range(1, done + 1))
    record = train(folder, config, inputs=inputs, resume=True)
    assert record.status == "complete"
    assert_same_run(folder, tmp_path / "whole")
    assert not list(folder.glob("*.ckpt"))


def test_a_checkpoint_has_only_what_trains(tmp_path, make_config, inputs):
    train(tmp_path, make_config(), inputs=inputs, stop_requested=stop_after(1))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert sum(tensor.numel() for tensor in state.values()) == read_run(tmp_path).trainable_params
    assert all(".lora_a" in name or ".lora_b" in name for name in state)


def test_a_run_that_must_stop_ends_there_and_its_schedule_is_as_long_as_ever(tmp_path, make_config, inputs, finished):
    asked = []

    def stop(step, values):
        asked.append((step, values["bits_per_byte"]))
        return "poor"

    record = train(tmp_path, make_config(), inputs=inputs, on_evaluation=stop)
    assert (record.status, record.steps_done, record.steps_planned) == ("stopped", 2, 4)
    assert record.reason == "poor"
    assert asked == [(2, record.score)]
    assert losses(tmp_path) == losses(finished)[:2]  # rates included
    assert record.tokens_trained == 2 * 2 * 32
    kept = read_run(tmp_path)
    assert (kept.status, kept.files, kept.tokens_trained) == ("stopped", record.files, record.tokens_trained)
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize(
    ("settings", "stop_at"),
    [
        ({"method.dropout": 0.5}, 2),
        ({"trainer.early_stop_evaluations": 1, "optim.lr": 1e-12}, None),
        ({"method.dropout": 0.5, "trainer.max_steps": 3}, None),
    ],
    ids=["stopped by the hook", "stopped early", "complete after a last interval that is shorter"],
)
def test_a_run_killed_at_any_moment_of_an_evaluation_ends_the_same(
    tmp_path, make_config, inputs, monkeypatch, settings, stop_at
):
    """Killed before and after each write of the record and of a checkpoint: between report and checkpoint as well."""
    config = make_config({"trainer.max_steps": 6, **settings})
    whole, killed = tmp_path / "whole", []

    def snapshot():
        if (whole / RUN_FILE).exists():
            killed.append(Path(shutil.copytree(whole, tmp_path / f"killed-{len(killed)}")))

    def around(write):
        def wrapped(*args, **kwargs):
            snapshot()
            write(*args, **kwargs)
            snapshot()

        return wrapped

    def decide(step, values):
        return "poor" if step == stop_at else None

    with monkeypatch.context() as patch:
        for module, name in (
            (writer_file, "write_atomically"),
            (writer_file, "write_checkpoint"),
            (open_run_file, "write_record"),
        ):
            patch.setattr(module, name, around(getattr(module, name)))
        first = train(whole, config, inputs=inputs, on_evaluation=decide)
    assert first.status == ("stopped" if stop_at else "complete")
    for folder in killed:
        if read_run(folder).status != "stopped":  # a controller does not train it again
            train(folder, config, inputs=inputs, resume=True, on_evaluation=decide)
        assert_same_run(folder, whole)


@pytest.mark.slow
def test_a_run_with_halved_micro_batches_goes_on_with_them(tmp_path, make_config, inputs, monkeypatch):
    config = make_config({"trainer.batch_size": 4})
    damage(monkeypatch, out_of_memory_above(2), training=True)
    train(tmp_path / "whole", config, inputs=inputs)
    train(tmp_path / "stopped", config, inputs=inputs, stop_requested=stop_after(3))
    record = train(tmp_path / "stopped", config, inputs=inputs, resume=True)
    assert (record.batching["micro_batches"], record.batching["too_large"]) == (2, [1])
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_what_is_not_the_runs_fault_leaves_its_checkpoint(tmp_path, make_config, inputs, monkeypatch, error):
    config = make_config()
    train(tmp_path / "whole", config, inputs=inputs)
    calls = itertools.count(1)

    def fail_at_step_4(values):
        if next(calls) == 4:
            raise error
        return values

    with monkeypatch.context() as patch:
        damage(patch, fail_at_step_4, training=True)
        with pytest.raises((OSError, SystemExit, KeyboardInterrupt)):
            train(tmp_path / "broken", config, inputs=inputs)
    assert read_run(tmp_path / "broken").status == "interrupted"
    train(tmp_path / "broken", config, inputs=inputs, resume=True)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
