"""A run can be repeated, stopped and resumed, and its folder says how it ended."""

from __future__ import annotations

import errno
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lorasweep.training.callbacks as callbacks_file
import lorasweep.training.run_log as run_log_file
from lorasweep.data.tasks import LanguageModelling
from lorasweep.errors import ConfigError, Diverged, OutOfMemory, RecordError
from lorasweep.methods import METHODS
from lorasweep.models.load import fingerprint_weights
from lorasweep.record import RUN_FILE, compute_sha256, read_run, read_steps
from lorasweep.training.environment import has_cpu_bf16
from lorasweep.training.inputs import build_inputs
from lorasweep.training.prepare import check_run, prepare_model
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunFolder, prune_paused_run

ADAPTER = "adapter_model.safetensors"
KEPT = {
    "lora": {"adapter_config.json", ADAPTER},
    "full": {"config.json", "generation_config.json", "model.safetensors"},
    "head": {"head.safetensors"},
    "bitfit": {"bitfit.safetensors"},
    "intrinsic": {"intrinsic.safetensors"},
    "frozen": set(),
    "peft": {"adapter_config.json", ADAPTER},
}
VERA = {"peft_type": "VERA", "r": 8, "d_initial": 0.1, "target_modules": ["q_proj", "down_proj"]}
EVA = {"peft_type": "LORA", "r": 2, "init_lora_weights": "eva", "target_modules": ["q_proj", "down_proj"]}
ADALORA = {"peft_type": "ADALORA", "init_r": 3, "target_r": 1, "target_modules": ["q_proj"], "lora_dropout": 0.2}


def train(folder, config, *, inputs, **hooks):
    return train_run(config, RunFolder(path=Path(folder)), inputs=inputs, **hooks)


def losses(folder):
    return [(row["step"], row["loss"], row["lr"]) for row in read_steps(folder) if "loss" in row]


def evaluations(folder):
    return [(row["step"], row["validation"]) for row in read_steps(folder) if "validation" in row]


def stop_after(steps):
    """A `stop_requested` that says yes at its `steps`-th question; it is asked once per step."""
    asked = itertools.count(1)
    return lambda: next(asked) >= steps


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def assert_same_weights(file, other):
    found, expected = load_file(file), load_file(other)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def assert_same_run(folder, other):
    assert (losses(folder), evaluations(folder)) == (losses(other), evaluations(other))
    one, two = read_run(folder), read_run(other)
    for name in ("status", "reason", "best", "last", "steps_done", "tokens_trained", "files", "adapter_bytes"):
        assert getattr(one, name) == getattr(two, name), name
    for name in one.files:
        assert (folder / name).read_bytes() == (other / name).read_bytes()


@pytest.fixture(scope="module")
def finished(make_config, inputs, tmp_path_factory):
    """A LoRA run of 4 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    train(folder, make_config(), inputs=inputs)
    return folder


def settings_of(method):
    """What names a method; the embedded model has no biases, so its norms train."""
    more = {"bitfit": {"method.train": "biases_and_norms"}, "peft": {"method.config": VERA}}
    return {"method": method} | more.get(method, {})


@pytest.mark.parametrize("method", KEPT)
def test_a_run_leaves_exactly_these_files_and_the_base_bit_equal_and_frozen(tmp_path, make_config, inputs, method):
    before = {name: tensor.clone() for name, tensor in inputs.base.model.state_dict().items()}
    record = train(tmp_path, make_config(settings_of(method)), inputs=inputs)
    events = {name for name in files_below(tmp_path) if name.startswith("events.out.tfevents.")}
    weights = {f"{part}/{name}" for part in ("best", "last") for name in KEPT[method]}
    assert len(events) == 1
    patch = {"code.patch"}  # beside the record where the checkout is modified
    assert files_below(tmp_path) - events - patch == {"run.json", "steps.jsonl"} | weights
    assert set(record.files) == weights
    for name, described in record.files.items():
        assert described == {"bytes": (tmp_path / name).stat().st_size, "sha256": compute_sha256(tmp_path / name)}
    after = inputs.base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert fingerprint_weights(inputs.base.model) == inputs.base.fingerprint
    assert not any(p.requires_grad or p.grad is not None for p in inputs.base.model.parameters())
    assert not inputs.base.model.training


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_lowers_the_loss(tmp_path, make_config, inputs, method):
    lr = 2e-4 if method == "full" else 1e-3
    longer = {"optim.lr": lr, "trainer.max_steps": 8, "trainer.batch_size": 4}
    config = make_config(settings_of(method) | longer)
    train(tmp_path, config, inputs=inputs)
    base = train(tmp_path / "base", make_config({"method": "frozen"}), inputs=inputs)
    assert read_run(tmp_path).score < base.score


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_alpha_of_zero_scores_exactly_as_the_base(tmp_path, make_config, precision):
    inputs = build_inputs(make_config({"trainer.precision": precision}))
    silent = make_config({"method.alpha": 0.0, "trainer.precision": precision})
    frozen = make_config({"method": "frozen", "trainer.precision": precision})
    base = train(tmp_path / "base", frozen, inputs=inputs)
    record = train(tmp_path / "silent", silent, inputs=inputs)
    assert record.score == base.score
    assert {values["loss"] for _, values in evaluations(tmp_path / "silent")} == {base.last["loss"]}


def test_the_record_says_everything(finished, make_config, inputs):
    record = read_run(finished)
    assert record.status == "complete"
    assert record.reason is None
    assert record.config["method"]["rank"] == 2
    assert record.config == json.loads(json.dumps(record.config))
    assert (record.metric, record.direction) == ("bits_per_byte", "minimize")
    assert {"version"} <= set(record.code)
    assert record.packages["torch"]
    assert record.platform["precision"] == "fp32"
    assert set(record.data) == {"train", "validation"}
    for part in record.data.values():
        assert set(part) >= {"documents", "bytes", "blocks", "fingerprint"}
    assert record.base == {
        "path": "embedded:tiny",
        "fingerprint": inputs.base.fingerprint,
        "parameters": inputs.base.num_parameters,
        "kind": "causal_lm",
        "head": [],
        "labels": None,
    }
    assert record.started_at <= record.ended_at
    assert (record.steps_planned, record.steps_done) == (4, 4)
    assert record.tokens_trained == 4 * 2 * 32
    assert record.tokens_per_s > 0
    assert record.wall_s > 0
    assert record.total_params == inputs.base.num_parameters
    weights = load_file(finished / "best" / ADAPTER)
    assert record.trainable_params == sum(tensor.numel() for tensor in weights.values())
    assert record.trainable_fraction == record.trainable_params / record.total_params
    assert record.adapter_bytes == (finished / "best" / ADAPTER).stat().st_size
    assert record.peak_memory_bytes > 10 * 2**20
    assert record.last["step"] == 4
    assert set(record.last) == {"step", "bits_per_byte", "loss", "perplexity"}
    assert record.score == min(values["bits_per_byte"] for _, values in evaluations(finished))


def test_the_metrics_agree_with_each_other(finished):
    for _, values in evaluations(finished):
        assert values["perplexity"] == pytest.approx(math.exp(values["loss"]), rel=1e-4)  # fp32
        # one token a byte, but for the tokens between documents, which are no bytes
        assert values["bits_per_byte"] == pytest.approx(values["loss"] / math.log(2), rel=1e-2)


def test_every_step_and_evaluation_is_logged(finished):
    assert [step for step, _, _ in losses(finished)] == [1, 2, 3, 4]
    assert [step for step, _ in evaluations(finished)] == [2, 4]
    assert [lr for _, _, lr in losses(finished)] == pytest.approx([0.005, 0.01, 0.02 / 3, 0.01 / 3])  # 1 warm-up step


def test_the_arm_and_the_trial_are_in_the_record(tmp_path, make_config, inputs):
    run_folder = RunFolder(path=tmp_path, arm="lora", trial=3)
    record = train_run(make_config({"method": "frozen"}), run_folder, inputs=inputs)
    assert (record.arm, record.trial) == ("lora", 3)
    assert read_run(tmp_path) == record


def test_a_frozen_run_is_evaluated_once_and_trains_nothing(tmp_path, make_config, inputs):
    record = train(tmp_path, make_config({"method": "frozen"}), inputs=inputs)
    assert (record.status, record.steps_planned, record.steps_done) == ("complete", 0, 0)
    assert (record.trainable_params, record.trainable_fraction, record.adapter_bytes) == (0, 0.0, 0)
    assert record.tokens_trained == 0
    assert record.best == record.last
    assert [step for step, _ in evaluations(tmp_path)] == [0]


@pytest.mark.parametrize(("max_steps", "every", "expected"), [(3, 2, [2, 3]), (2, 50, [2]), (2, 1, [1, 2])])
def test_the_last_step_is_evaluated_whatever_the_interval(tmp_path, make_config, inputs, max_steps, every, expected):
    config = make_config({"trainer.max_steps": max_steps, "trainer.eval_every_steps": every})
    record = train(tmp_path, config, inputs=inputs)
    assert [step for step, _ in evaluations(tmp_path)] == expected
    assert (record.status, record.steps_done, record.last["step"]) == ("complete", max_steps, max_steps)
    assert not list(tmp_path.glob("*.ckpt"))


def test_the_same_seeds_give_the_same_losses_and_bytes(tmp_path, make_config, inputs, finished):
    train(tmp_path, make_config(), inputs=inputs)
    assert losses(tmp_path) == losses(finished)
    assert evaluations(tmp_path) == evaluations(finished)
    for part in ("best", "last"):
        assert (tmp_path / part / ADAPTER).read_bytes() == (finished / part / ADAPTER).read_bytes()


def test_what_was_drawn_before_a_run_changes_nothing(tmp_path, make_config, inputs):
    config = make_config({"method.dropout": 0.5})
    train(tmp_path / "a", config, inputs=inputs)
    torch.manual_seed(99)
    torch.rand(7)
    train(tmp_path / "b", config, inputs=inputs)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.parametrize("seed", ["seeds.init", "seeds.data_order", "seeds.dropout"])
def test_each_seed_moves_the_run(tmp_path, make_config, inputs, seed):
    train(tmp_path / "a", make_config({"method.dropout": 0.5}), inputs=inputs)
    train(tmp_path / "b", make_config({"method.dropout": 0.5, seed: 1}), inputs=inputs)
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


def test_the_dropout_seed_moves_nothing_without_dropout(tmp_path, make_config, inputs, finished):
    train(tmp_path, make_config({"seeds.dropout": 1}), inputs=inputs)
    assert losses(tmp_path) == losses(finished)


def test_how_often_one_evaluates_changes_no_loss(tmp_path, make_config, inputs):
    """Evaluation draws nothing from training's random stream, so dropout's masks stay as they are."""
    for every in (1, 4):
        config = make_config({"method.dropout": 0.5, "trainer.eval_every_steps": every})
        train(tmp_path / str(every), config, inputs=inputs)
    assert losses(tmp_path / "1") == losses(tmp_path / "4")
    assert evaluations(tmp_path / "1")[-1] == evaluations(tmp_path / "4")[-1]


def test_evaluation_drops_nothing(tmp_path, make_config, inputs):
    """With a learning rate near 0 the model stays the base, and dropout must not show in the score."""
    config = make_config({"method.dropout": 0.9, "optim.lr": 1e-12})
    record = train(tmp_path / "lora", config, inputs=inputs)
    base = train(tmp_path / "base", make_config({"method": "frozen"}), inputs=inputs)
    assert record.score == pytest.approx(base.score, rel=1e-6)  # fp32, and a change of about 1e-12


def test_accumulated_micro_batches_train_as_the_whole_batch(tmp_path, make_config, inputs):
    settings = {"trainer.batch_size": 4, "optim.lr": 1e-3}
    train(tmp_path / "whole", make_config(settings), inputs=inputs)
    train(tmp_path / "split", make_config({**settings, "trainer.accumulate": 4}), inputs=inputs)
    whole, split = losses(tmp_path / "whole"), losses(tmp_path / "split")
    assert [row[0] for row in split] == [1, 2, 3, 4]
    # fp32 sums in another order; Adam's first steps magnify a gradient's rounding where it is near 0
    assert [row[1] for row in split] == pytest.approx([row[1] for row in whole], rel=1e-4)
    assert [row[2] for row in split] == [row[2] for row in whole]
    assert read_run(tmp_path / "split").tokens_trained == read_run(tmp_path / "whole").tokens_trained


RESUMED = [
    pytest.param({}, [1], id="before the first evaluation"),
    pytest.param({}, [1, 1, 1, 1], id="at every step"),
    pytest.param({"trainer.eval_every_steps": 3}, [3], id="at an evaluation that does not divide the run"),
    pytest.param({"trainer.eval_every_steps": 4}, [6], id="after the last step, before its evaluation"),
    pytest.param({"method.dropout": 0.5}, [2], id="with dropout at an evaluation"),
    pytest.param({"trainer.accumulate": 2, "method.dropout": 0.5}, [3], id="with accumulation and dropout"),
    pytest.param({"method": "full", "optim.lr": 1e-3}, [3], id="full"),
    pytest.param(settings_of("bitfit"), [3], id="bitfit"),
    pytest.param({"method": "intrinsic"}, [3], id="intrinsic"),
    pytest.param(settings_of("peft"), [3], id="peft"),
    pytest.param({**settings_of("peft"), "method.config": ADALORA}, [3], id="peft, with ranks that training drops"),
    pytest.param({**settings_of("peft"), "method.config": EVA}, [3], id="peft, with a start from data"),
    pytest.param({"optim.lr_ratio_b": 4.0, "schedule": "cosine", "optim.weight_decay": 0.1}, [3], id="two groups"),
]


@pytest.mark.parametrize(("settings", "stops"), RESUMED)
def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(tmp_path, make_config, inputs, settings, stops):
    config = make_config({"trainer.max_steps": 6, **settings})
    whole = train(tmp_path / "whole", config, inputs=inputs)
    folder, done = tmp_path / "stopped", 0
    for steps in stops:
        record = train(folder, config, inputs=inputs, stop_requested=stop_after(steps), resume=True)
        done += steps
        assert (record.status, record.steps_done) == ("interrupted", done)
        assert record.reason == f"stopped at step {done} of 6"
        assert [row[0] for row in losses(folder)] == list(range(1, done + 1))
    record = train(folder, config, inputs=inputs, resume=True)
    assert record.status == "complete"
    assert record.reason is None
    assert losses(folder) == losses(tmp_path / "whole")
    assert evaluations(folder) == evaluations(tmp_path / "whole")
    assert (record.best, record.last) == (whole.best, whole.last)
    assert record.tokens_trained == whole.tokens_trained
    assert set(record.files) == set(whole.files)
    for name in (name for name in whole.files if name.endswith(".safetensors")):
        assert_same_weights(folder / name, tmp_path / "whole" / name)
    assert not list(folder.glob("*.ckpt"))


def test_a_run_that_was_killed_goes_on_from_its_last_evaluation(tmp_path, make_config, inputs):
    config = make_config({"method.dropout": 0.5, "trainer.max_steps": 6})
    killed = tmp_path / "killed"

    def copy_at_step_4(step, value):
        if step == 4:
            shutil.copytree(tmp_path / "whole", killed)
        return True

    whole = train(tmp_path / "whole", config, inputs=inputs, on_evaluation=copy_at_step_4)
    with (killed / "steps.jsonl").open("a") as file:  # a line that was cut off
        file.write('{"step": 5, "lo')
    reported = []

    def report(step, value):
        reported.append((step, value["bits_per_byte"]))
        return True

    record = train(killed, config, inputs=inputs, resume=True, on_evaluation=report)
    assert reported == [(step, values["bits_per_byte"]) for step, values in evaluations(killed) if step > 2]
    assert losses(killed) == losses(tmp_path / "whole")
    assert evaluations(killed) == evaluations(tmp_path / "whole")
    assert record.files == whole.files


def test_time_of_all_sessions_is_added(tmp_path, make_config, inputs):
    config = make_config()
    first = train(tmp_path, config, inputs=inputs, stop_requested=stop_after(1))
    second = train(tmp_path, config, inputs=inputs, resume=True)
    assert second.wall_s > first.wall_s > 0
    assert second.started_at == first.started_at


def test_a_run_without_a_checkpoint_begins_anew(tmp_path, make_config, inputs, finished):
    train(tmp_path, make_config(), inputs=inputs, stop_requested=stop_after(3))
    for path in tmp_path.glob("*.ckpt"):
        path.unlink()
    record = train(tmp_path, make_config(), inputs=inputs, resume=True)
    assert record.status == "complete"
    assert losses(tmp_path) == losses(finished)


def test_a_run_that_is_not_to_resume_begins_anew(tmp_path, make_config, inputs, finished):
    train(tmp_path, make_config({"optim.lr": 1e-4}), inputs=inputs, stop_requested=stop_after(3))
    train(tmp_path, make_config(), inputs=inputs)
    assert losses(tmp_path) == losses(finished)


def test_a_checkpoint_has_only_what_trains(tmp_path, make_config, inputs):
    train(tmp_path, make_config(), inputs=inputs, stop_requested=stop_after(1))
    (checkpoint,) = tmp_path.glob("last-00000001-*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert sum(tensor.numel() for tensor in state.values()) == read_run(tmp_path).trainable_params
    assert all(".lora_a" in name or ".lora_b" in name for name in state)


def test_a_paused_run_ends_there_and_its_schedule_is_as_long_as_ever(tmp_path, make_config, inputs, finished):
    asked = []

    def pause(step, value):
        asked.append((step, value["bits_per_byte"]))
        return False

    record = train(tmp_path, make_config(), inputs=inputs, on_evaluation=pause)
    assert (record.status, record.steps_done, record.steps_planned) == ("paused", 2, 4)
    assert record.reason == "paused at step 2 of 4"
    assert asked == [(2, record.score)]
    assert losses(tmp_path) == losses(finished)[:2]  # rates included
    assert record.tokens_trained == 2 * 2 * 32
    kept = read_run(tmp_path)
    assert (kept.status, kept.files, kept.tokens_trained) == ("paused", record.files, record.tokens_trained)
    (checkpoint,) = tmp_path.glob("*.ckpt")
    assert checkpoint.name.startswith("last-00000002-")
    assert set(record.files) == {f"{part}/{name}" for part in ("best", "last") for name in KEPT["lora"]}


def test_a_run_reports_every_evaluation_and_is_never_paused_at_its_end(tmp_path, make_config, inputs):
    asked = []

    def pause_at_the_end(step, value):
        asked.append(step)
        return step < 4

    record = train(tmp_path, make_config(), inputs=inputs, on_evaluation=pause_at_the_end)
    assert (record.status, record.reason, asked) == ("complete", None, [2, 4])


@pytest.mark.parametrize(
    "settings",
    [
        {"method.dropout": 0.5, "schedule": "cosine"},
        {"optim.ema_decay": 0.9, "trainer.accumulate": 2},
    ],
)
def test_a_paused_run_that_goes_on_ends_as_one_that_was_never_paused(tmp_path, make_config, inputs, settings):
    config = make_config({"trainer.max_steps": 6, **settings})
    train(tmp_path / "whole", config, inputs=inputs)
    for step in (2, 4):
        record = train(
            tmp_path / "run", config, inputs=inputs, resume=True, on_evaluation=lambda at, _, s=step: at != s
        )
        assert (record.status, record.steps_done) == ("paused", step)
    train(tmp_path / "run", config, inputs=inputs, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert not list((tmp_path / "run").glob("*.ckpt"))


def test_a_paused_run_is_pruned_once_and_its_checkpoints_are_gone(tmp_path, make_config, inputs):
    paused = train(tmp_path, make_config(), inputs=inputs, on_evaluation=lambda step, value: False)
    for reason in ("its sweep ended", "said again"):
        record = prune_paused_run(tmp_path, reason=reason)
        assert (record.status, record.reason) == ("pruned", "its sweep ended")
        assert not list(tmp_path.glob("*.ckpt"))
    assert read_run(tmp_path).files == paused.files


def test_a_run_that_is_not_paused_is_not_pruned(tmp_path, make_config, inputs):
    train(tmp_path, make_config(), inputs=inputs)
    with pytest.raises(RecordError, match=r"must be paused .* is complete"):
        prune_paused_run(tmp_path, reason="its sweep ended")
    assert read_run(tmp_path).status == "complete"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "pause_at"),
    [
        ({"method.dropout": 0.5}, 2),
        ({"trainer.early_stop_evaluations": 1, "optim.lr": 1e-12}, None),
        ({"method.dropout": 0.5, "trainer.max_steps": 3}, None),
    ],
    ids=["paused", "stopped early", "complete after a last interval that is shorter"],
)
def test_a_run_killed_at_any_moment_of_an_evaluation_ends_the_same(
    tmp_path, make_config, inputs, monkeypatch, settings, pause_at
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

    def decide(step, value):
        return step != pause_at

    with monkeypatch.context() as patch:
        for module, name in ((callbacks_file, "save_checkpoint"), (run_log_file, "write_record")):
            patch.setattr(module, name, around(getattr(module, name)))
        first = train(whole, config, inputs=inputs, on_evaluation=decide)
    assert first.status == ("paused" if pause_at else "complete")
    for folder in killed:
        if read_run(folder).status != "paused":  # a controller need not train it again
            train(folder, config, inputs=inputs, resume=True, on_evaluation=decide)
        assert_same_run(folder, whole)
    if pause_at:
        train(whole, config, inputs=inputs, resume=True)
        for folder in killed:
            train(folder, config, inputs=inputs, resume=True)
            assert_same_run(folder, whole)


def test_a_wild_learning_rate_diverges_and_the_record_says_so(tmp_path, make_config, inputs):
    with pytest.raises(Diverged, match=r"became (NaN or infinite|nan|inf) at step \d. Lower `optim.lr`."):
        train(tmp_path, make_config({"optim.lr": 1e30}), inputs=inputs)
    record = read_run(tmp_path)
    assert record.status == "failed"
    assert record.reason.endswith("Lower `optim.lr`.")
    assert record.ended_at is not None


def damage(monkeypatch, action, *, training):
    """Does `action` to the losses of training or of validation batches."""
    true_losses = LanguageModelling._token_losses

    def token_losses(task, model, batch):
        values = true_losses(task, model, batch)
        return action(values) if model.training == training else values

    monkeypatch.setattr(LanguageModelling, "_token_losses", token_losses)


def test_a_loss_that_is_nan_ends_the_run_at_the_next_evaluation(tmp_path, make_config, inputs, monkeypatch):
    damage(monkeypatch, lambda values: values * math.nan, training=True)
    with pytest.raises(Diverged, match=r"training loss .* at step 1. Lower `optim.lr`"):
        train(tmp_path, make_config(), inputs=inputs)
    assert [row[1] for row in losses(tmp_path)] == [None, None]
    assert read_run(tmp_path).status == "failed"


def test_a_score_that_is_nan_ends_the_run(tmp_path, make_config, inputs, monkeypatch):
    damage(monkeypatch, lambda values: values * math.nan, training=False)
    with pytest.raises(Diverged, match="the validation bits_per_byte became nan at step 2"):
        train(tmp_path, make_config(), inputs=inputs)
    assert read_run(tmp_path).status == "failed"
    assert read_run(tmp_path).score is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee documentation"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError("Unable to allocate"),
        MemoryError(),
    ],
)
def test_a_run_that_does_not_fit_is_infeasible(tmp_path, make_config, inputs, monkeypatch, error):
    def fail(values):
        raise error

    damage(monkeypatch, fail, training=True)
    with pytest.raises(OutOfMemory) as caught:
        train(tmp_path, make_config(), inputs=inputs)
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)
    record = read_run(tmp_path)
    assert record.status == "infeasible"
    assert record.reason == str(caught.value) != ""
    assert (record.batching["micro_batches"], record.batching["too_large"]) == (2, [1])  # 2 rows a step


def out_of_memory_above(rows):
    """Lets micro-batches of more rows run out of memory, at the third step as well as at the first."""

    def action(values):
        if values.shape[0] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return values

    return action


@pytest.mark.slow
def test_a_run_that_runs_out_of_memory_halves_its_micro_batches_and_learns_the_same(
    tmp_path, make_config, inputs, monkeypatch
):
    config = make_config({"trainer.batch_size": 8})
    train(tmp_path / "asked", make_config({"trainer.batch_size": 8, "trainer.accumulate": 4}), inputs=inputs)
    train(tmp_path / "large", config, inputs=inputs)
    calls = itertools.count(1)
    narrow = out_of_memory_above(2)
    damage(monkeypatch, lambda values: values if next(calls) < 4 else narrow(values), training=True)
    record = train(tmp_path / "halved", config, inputs=inputs)
    assert record.status == "complete"
    assert (record.batching["micro_batches"], record.batching["too_large"]) == (4, [1, 2])
    assert record.config["trainer"]["batch_size"] == 8
    assert losses(tmp_path / "halved") == losses(tmp_path / "asked")
    # fp32 sums in another order, and Adam's first steps divide by |g|
    halved, large = ([row[1] for row in losses(tmp_path / name)] for name in ("halved", "large"))
    assert halved == pytest.approx(large, rel=1e-4)


@pytest.mark.slow
def test_a_run_with_halved_micro_batches_goes_on_with_them(tmp_path, make_config, inputs, monkeypatch):
    config = make_config({"trainer.batch_size": 4})
    damage(monkeypatch, out_of_memory_above(2), training=True)
    train(tmp_path / "whole", config, inputs=inputs)
    train(tmp_path / "stopped", config, inputs=inputs, stop_requested=stop_after(3))
    record = train(tmp_path / "stopped", config, inputs=inputs, resume=True)
    assert (record.batching["micro_batches"], record.batching["too_large"]) == (2, [1])
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


@pytest.mark.parametrize("left", [1, 0])
def test_a_run_whose_checkpoint_is_damaged_goes_on_from_the_one_before_or_begins_anew(
    tmp_path, make_config, inputs, left
):
    config = make_config({"method.dropout": 0.5, "trainer.max_steps": 6})
    train(tmp_path / "whole", config, inputs=inputs)
    train(tmp_path / "stopped", config, inputs=inputs, stop_requested=stop_after(5))
    newest_first = sorted((tmp_path / "stopped").glob("*.ckpt"), reverse=True)
    assert [path.name[:13] for path in newest_first] == ["last-00000005", "last-00000004"]
    for path in newest_first[: 2 - left]:
        path.write_bytes(path.read_bytes()[:-100])
    record = train(tmp_path / "stopped", config, inputs=inputs, resume=True)
    step = 4 if left else 0
    assert record.notes[-1].endswith(f"was damaged or missing, so the run resumed from step {step}.")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert evaluations(tmp_path / "stopped") == evaluations(tmp_path / "whole")
    assert {name: kept["sha256"] for name, kept in record.files.items()} == {
        name: kept["sha256"] for name, kept in read_run(tmp_path / "whole").files.items()
    }


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


def test_a_run_that_breaks_leaves_the_traceback_in_its_record(tmp_path, make_config, inputs, monkeypatch):
    def fail(values):
        raise RuntimeError("shapes differ")

    damage(monkeypatch, fail, training=True)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(tmp_path, make_config(), inputs=inputs)
    record = read_run(tmp_path)
    assert record.status == "failed"
    assert record.reason.startswith("Traceback")
    assert record.reason.endswith("RuntimeError: shapes differ")


def test_a_setting_that_does_not_fit_the_model_is_refused(tmp_path, make_config, inputs):
    with pytest.raises(ConfigError, match=r"`method.rank <= \d+` must hold"):
        train(tmp_path, make_config({"method.rank": 100_000}), inputs=inputs)


def test_tensorboard_has_the_curves(finished):
    events = EventAccumulator(str(finished)).Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert set(scalars) >= {"train/loss", "train/lr", "train/tokens_per_s", "validation/bits_per_byte"}
    logged = [value for _, value in scalars["train/loss"]]
    assert logged == pytest.approx([loss for _, loss, _ in losses(finished)])  # fp32 in the event file
    assert [value for _, value in scalars["train/lr"]] == pytest.approx([lr for _, _, lr in losses(finished)])
    expected = [values["bits_per_byte"] for _, values in evaluations(finished)]
    assert [value for _, value in scalars["validation/bits_per_byte"]] == pytest.approx(expected)
    assert all(value > 0 for _, value in scalars["train/tokens_per_s"])


@pytest.mark.skipif(not has_cpu_bf16(), reason="this processor does not multiply bf16")
@pytest.mark.parametrize("method", ["lora", "full", "intrinsic"])
def test_bf16_bases_train_in_fp32(tmp_path, make_config, method):
    config = make_config(settings_of(method) | {"trainer.precision": "bf16"})
    inputs = build_inputs(config)
    assert {p.dtype for p in inputs.base.model.parameters()} == {torch.bfloat16}
    before = fingerprint_weights(inputs.base.model)
    record = train(tmp_path, config, inputs=inputs)
    assert record.status == "complete"
    assert record.platform["precision"] == "bf16"
    (file,) = (tmp_path / "best").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}
    assert fingerprint_weights(inputs.base.model) == before


def test_a_run_that_gets_no_better_ends_early_and_says_so(tmp_path, make_config, inputs):
    stuck = {"optim.lr": 1e-12, "trainer.max_steps": 12, "trainer.early_stop_evaluations": 2}
    record = train(tmp_path, make_config(stuck), inputs=inputs)
    assert record.status == "complete"
    assert record.steps_done < 12
    assert record.reason == (
        f"no better score since step {record.best['step']:.0f}: stopped early at step {record.steps_done}"
    )
    better = make_config({**stuck, "optim.lr": 1e-3, "trainer.batch_size": 4})
    assert train(tmp_path / "better", better, inputs=inputs).steps_done == 12


def test_recomputed_activations_train_the_same(tmp_path, make_config, inputs):
    train(tmp_path / "kept", make_config({"method.dropout": 0.1}), inputs=inputs)
    again = make_config({"method.dropout": 0.1, "trainer.activation_checkpointing": True})
    train(tmp_path / "again", again, inputs=inputs)
    assert losses(tmp_path / "again") == losses(tmp_path / "kept")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch
def test_a_compiled_model_trains_the_same(tmp_path, make_config, quantisable_model):
    of_two_layers = {"model": "causal_lm", "model.path": str(quantisable_model)}  # compiling four takes long
    inputs = build_inputs(make_config(of_two_layers))
    train(tmp_path / "compiled", make_config({**of_two_layers, "trainer.compile": True}), inputs=inputs)
    train(tmp_path / "eager", make_config(of_two_layers), inputs=inputs)
    found = [loss for _, loss, _ in losses(tmp_path / "compiled")]
    # fused kernels round otherwise in fp32
    assert found == pytest.approx([loss for _, loss, _ in losses(tmp_path / "eager")], rel=1e-3)
    kept = [load_file(tmp_path / name / "best" / ADAPTER).keys() for name in ("compiled", "eager")]
    assert kept[0] == kept[1]


def test_the_running_mean_of_the_weights_is_what_is_evaluated_and_saved(tmp_path, make_config, inputs):
    averaged = make_config({"optim.ema_decay": 0.5})
    train(tmp_path / "mean", averaged, inputs=inputs)
    plain = make_config()
    train(tmp_path / "plain", plain, inputs=inputs)
    assert losses(tmp_path / "mean") == losses(tmp_path / "plain")  # training itself is the same
    mean: dict[str, torch.Tensor] = {}
    for step in range(5):  # by hand: the mean over the weights after 0, 1, ... steps
        folder = tmp_path / f"after{step}"
        if step == 0:
            model = prepare_model(plain, inputs.base)
            METHODS["lora"].save(model, folder / "last", base=inputs.base)
        else:
            stop = stop_after(step)
            short = make_config({"trainer.eval_every_steps": 1})
            train(folder, short, inputs=inputs, stop_requested=stop)
        weights = load_file(folder / "last" / ADAPTER)
        mean = {name: weights[name] if not mean else 0.5 * mean[name] + 0.5 * weights[name] for name in weights}
    kept = load_file(tmp_path / "mean" / "last" / ADAPTER)
    for name, expected in mean.items():
        torch.testing.assert_close(kept[name], expected, rtol=1e-5, atol=1e-7)  # fp32, another order of operations


def test_a_run_with_a_running_mean_goes_on_exactly(tmp_path, make_config, inputs):
    config = make_config({"optim.ema_decay": 0.9})
    train(tmp_path / "whole", config, inputs=inputs)
    train(tmp_path / "broken", config, inputs=inputs, stop_requested=stop_after(3))
    train(tmp_path / "broken", config, inputs=inputs, resume=True)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert evaluations(tmp_path / "broken") == evaluations(tmp_path / "whole")
    assert_same_weights(tmp_path / "broken" / "last" / ADAPTER, tmp_path / "whole" / "last" / ADAPTER)


def test_a_rate_of_a_head_that_there_is_not_is_refused(make_config, inputs):
    with pytest.raises(ConfigError, match=r"`optim.lr_ratio_head` must be 1"):
        check_run(make_config({"optim.lr_ratio_head": 5.0}), inputs.base)
