"""A run can be repeated, and its folder says how it ended."""

import functools
import itertools
import math

import pytest
import torch
from safetensors.torch import load_file
from tests.files import read_files
from tests.training.runs import ADAPTER, damage, evaluations, losses, out_of_memory_above, settings_of, train

from lorasweep.errors import Diverged, OutOfMemory
from lorasweep.models.load import fingerprint_weights
from lorasweep.record import compute_sha256, read_run
from lorasweep.training.environment import has_cpu_bf16
from lorasweep.training.inputs import load_inputs

KEPT = {
    "lora": {"adapter_config.json", ADAPTER},
    "full": {"model.safetensors"},
    "head": {"model.safetensors"},
    "intrinsic": {"intrinsic.safetensors"},
    "frozen": set(),
    "peft": {"adapter_config.json", ADAPTER},
}


@pytest.mark.parametrize("method", KEPT)
def test_a_run_leaves_exactly_these_files_and_the_base_bit_equal_and_frozen(tmp_path, make_config, inputs, method):
    before = {name: tensor.clone() for name, tensor in inputs.base.model.state_dict().items()}
    record = train(tmp_path, make_config(settings_of(method)), inputs=inputs)
    events = {name for name in set(read_files(tmp_path)) if name.startswith("events.out.tfevents.")}
    weights = {f"best/{name}" for name in KEPT[method]}
    assert len(events) == 1
    assert set(read_files(tmp_path)) - events == {"run.json", "steps.jsonl", "hparams.yaml"} | weights
    assert set(record.files) == weights
    for name, described in record.files.items():
        assert described == {"bytes": (tmp_path / name).stat().st_size, "sha256": compute_sha256(tmp_path / name)}
    after = inputs.base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert fingerprint_weights(inputs.base.model) == inputs.base.fingerprint
    assert not any(p.requires_grad or p.grad is not None for p in inputs.base.model.parameters())
    assert not inputs.base.model.training


def test_the_record_describes_run_data_and_base(finished, inputs):
    record = read_run(finished)
    assert (record.status, record.reason) == ("complete", None)
    assert (record.metric, record.direction) == ("bits_per_byte", "minimize")
    assert record.config["method"]["rank"] == 2
    assert record.base["fingerprint"] == inputs.base.fingerprint
    assert set(record.data) == {"train", "validation"}
    assert (record.steps_planned, record.steps_done, record.tokens_trained) == (4, 4, 4 * 2 * 32)
    weights = load_file(finished / "best" / ADAPTER)
    assert record.trainable_params == sum(tensor.numel() for tensor in weights.values())
    assert record.trainable_fraction == record.trainable_params / record.total_params
    assert record.adapter_bytes == (finished / "best" / ADAPTER).stat().st_size
    assert record.peak_memory_bytes > 10 * 2**20
    assert record.last["step"] == 4
    assert record.score == min(values["bits_per_byte"] for _, values in evaluations(finished))


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


def test_the_same_seeds_give_the_same_losses_and_bytes_whatever_was_drawn_before(tmp_path, make_config, inputs):
    config = make_config({"method.dropout": 0.5})
    train(tmp_path / "a", config, inputs=inputs)
    torch.manual_seed(99)
    torch.rand(7)
    train(tmp_path / "b", config, inputs=inputs)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert (tmp_path / "a" / "best" / ADAPTER).read_bytes() == (tmp_path / "b" / "best" / ADAPTER).read_bytes()


def test_how_often_one_evaluates_changes_no_loss(tmp_path, make_config, inputs):
    """Evaluation draws nothing from training's random stream, so dropout's masks stay as they are."""
    for every in (1, 4):
        config = make_config({"method.dropout": 0.5, "trainer.eval_every_steps": every})
        train(tmp_path / str(every), config, inputs=inputs)
    assert losses(tmp_path / "1") == losses(tmp_path / "4")
    assert evaluations(tmp_path / "1")[-1] == evaluations(tmp_path / "4")[-1]


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


def test_a_wild_learning_rate_and_a_score_that_is_nan_end_the_run_and_the_record_says_so(
    tmp_path, make_config, inputs, monkeypatch
):
    with pytest.raises(Diverged, match=r"became (NaN or infinite|nan|inf) at step \d. Lower `optim.lr`."):
        train(tmp_path / "wild", make_config({"optim.lr": 1e30}), inputs=inputs)
    record = read_run(tmp_path / "wild")
    assert record.status == "failed"
    assert record.reason.endswith("Lower `optim.lr`.")
    assert record.ended_at is not None
    damage(monkeypatch, lambda values: values * math.nan, training=False)
    with pytest.raises(Diverged, match="the validation bits_per_byte became nan at step 2"):
        train(tmp_path / "nan", make_config(), inputs=inputs)
    assert (read_run(tmp_path / "nan").status, read_run(tmp_path / "nan").score) == ("failed", None)


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


@pytest.mark.skipif(not has_cpu_bf16(), reason="this processor does not multiply bf16")
@pytest.mark.parametrize("method", ["lora", "full", "intrinsic"])
def test_bf16_bases_train_in_fp32(tmp_path, make_config, method):
    config = make_config(settings_of(method) | {"trainer.precision": "bf16"})
    inputs = load_inputs(config)
    assert {p.dtype for p in inputs.base.model.parameters()} == {torch.bfloat16}
    before = fingerprint_weights(inputs.base.model)
    record = train(tmp_path, config, inputs=inputs)
    assert record.status == "complete"
    assert record.platform["precision"] == "bf16"
    (file,) = (tmp_path / "best").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values() if tensor.is_floating_point()} == {torch.float32}
    assert fingerprint_weights(inputs.base.model) == before


def test_a_run_that_gets_no_better_ends_early_and_says_so(tmp_path, make_config, inputs):
    stuck = {"optim.lr": 1e-12, "trainer.max_steps": 12, "trainer.early_stop_evaluations": 2}
    record = train(tmp_path, make_config(stuck), inputs=inputs)
    assert record.status == "complete"
    assert record.steps_done < 12
    best = f"{record.best['step']:.0f}"
    assert record.reason == f"no better score since step {best}: stopped early at step {record.steps_done}"
    better = make_config({**stuck, "optim.lr": 1e-3, "trainer.batch_size": 4})
    assert train(tmp_path / "better", better, inputs=inputs).steps_done == 12


def test_recomputed_activations_train_the_same(tmp_path, make_config, inputs):
    train(tmp_path / "kept", make_config({"method.dropout": 0.1}), inputs=inputs)
    again = make_config({"method.dropout": 0.1, "trainer.activation_checkpointing": True})
    train(tmp_path / "again", again, inputs=inputs)
    assert losses(tmp_path / "again") == losses(tmp_path / "kept")


@pytest.mark.release
@pytest.mark.slow
# torch's compiler, of torch, and of `.grad` of the rows of A and B, which it looks at
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")
# g++ builds inductor's kernels for a minute; the other backend traces the same graphs and runs them as they are
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_a_compiled_model_trains_the_same(tmp_path, make_config, inputs, finished, monkeypatch, backend):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    train(tmp_path, make_config({"trainer.compile": True}), inputs=inputs)
    found = [loss for _, loss, _ in losses(tmp_path)]
    # fused kernels round otherwise in fp32
    assert found == pytest.approx([loss for _, loss, _ in losses(finished)], rel=1e-3)
    assert load_file(tmp_path / "best" / ADAPTER).keys() == load_file(finished / "best" / ADAPTER).keys()
