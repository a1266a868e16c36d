"""A run in a slot of a pack is the run alone: same losses, adapter and record, whoever shares the pack and when."""

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.small_runs import SMALL_RUN
from tests.tiny_tokenizer import WORDS, make_word_tokenizer
from tests.training.gpt2 import save_gpt2
from tests.training.runs import ADAPTER, all_go_on, train, train_together

import lorasweep.training.module as module_file
from lorasweep.config.compose import compose_run
from lorasweep.data import batching
from lorasweep.errors import OutOfMemory
from lorasweep.models.load import fingerprint_weights
from lorasweep.record import read_run, read_steps
from lorasweep.training.checkpoint import split_checkpoint
from lorasweep.training.inputs import load_inputs

MIXED = (
    {"method.rank": 2, "method.dropout": 0.2},
    {"method.rank": 8, "method.alpha": 4.0, "optim.lr": 3e-3, "seed": 3},
    {"method.rank": 4, "method.targets": ["q_proj", "up_proj"], "optim.lr": 2e-2},
    {"method.rank": 3, "method.scaling": "alpha_over_sqrt_rank", "optim.lr_ratio_b": 4.0, "schedule": "cosine"},
)
# fp32 kernels sum in another order for other shapes; Adam's first steps divide by |g|, which magnifies it
LOSS_TOLERANCE = 1e-4
# bf16 keeps 8 bits, half a percent of each number, and rounds where another shape's kernel has another partial sum
BF16_LOSS_TOLERANCE = 0.02


def stop_at(name, step):
    """Returns a hook that stops one run at a step."""
    return lambda evaluated: [
        "poor" if (one.run.run_folder.path.name, one.step) == (name, step) else None for one in evaluated
    ]


def train_pack(configs, folder, *, inputs, **hooks):
    """Trains a pack of runs by name, whose folders and checkpoint are in `folder`. Returns how each run ended."""
    runs = {folder / name: config for name, config in configs.items()}
    ended = train_together(runs, inputs=inputs, checkpoint_file=folder / "pack.ckpt", **hooks)
    assert not (folder / "pack.ckpt").exists()
    return ended


def rows(folder):
    return [(row["step"], row.get("loss", row.get("validation", {}).get("loss"))) for row in read_steps(folder)]


def assert_same_losses(alone, packed, *, rel):
    for (step, a), (other_step, b) in zip(rows(alone), rows(packed), strict=True):
        assert step == other_step
        assert a == pytest.approx(b, rel=rel)


def check_packed_equals_alone(configs, folder, *, inputs, rel=LOSS_TOLERANCE, stopped=None):
    """Trains runs alone and in a pack. One run may be stopped at step 2."""
    for n, config in enumerate(configs):
        stop = (lambda step, values: "poor" if step == 2 else None) if n == stopped else None
        train(folder / f"alone{n}", config, inputs=inputs, on_evaluation=stop)
    stop = all_go_on if stopped is None else stop_at(f"pack{stopped}", 2)
    packed = {f"pack{n}": config for n, config in enumerate(configs)}
    ended = train_pack(packed, folder, inputs=inputs, on_evaluation=stop)
    assert ended == {f"pack{n}": "stopped" if n == stopped else "complete" for n in range(len(configs))}
    for n in range(len(configs)):
        alone, packed = folder / f"alone{n}", folder / f"pack{n}"
        assert_same_losses(alone, packed, rel=rel)
        a, b = load_file(alone / "best" / ADAPTER), load_file(packed / "best" / ADAPTER)
        assert a.keys() == b.keys()
        # Adam's first steps are lr (at most 0.02) whatever a gradient's size: near 0, rounding shows
        assert all(torch.allclose(a[key], b[key], atol=20 * rel) for key in a)
        one, other = read_run(alone), read_run(packed)
        for name in ("status", "metric", "steps_done", "tokens_trained", "trainable_params", "adapter_bytes", "reason"):
            assert getattr(one, name) == getattr(other, name), name
        assert other.pack is not None
        assert other.batching["micro_batches"] == one.batching["micro_batches"] == configs[n].trainer.accumulate
        assert other.best["loss"] == pytest.approx(one.best["loss"], rel=rel)
        assert not list(packed.glob("*.ckpt"))
    base = inputs.base
    assert fingerprint_weights(base.model, exclude=base.new_head_names) == base.fingerprint


def test_packed_runs_equal_runs_alone_while_one_leaves(make_config, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(batching, "MIN_PART_EXAMPLES", 1)  # so that half of the four examples are evaluated
    shared = {"trainer.accumulate": 2, "trainer.max_steps": 6, "trainer.eval_fraction": 0.5}
    configs = [make_config({**settings, **shared}) for settings in MIXED]
    check_packed_equals_alone(configs, tmp_path, inputs=inputs, stopped=1)
    for n in range(len(configs)):  # on all examples if the run ended
        packed = tmp_path / f"pack{n}"
        assert (read_run(packed).best["loss"] in dict(rows(packed)).values()) is (n == 1)


NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"trainer.precision": "bf16"}, BF16_LOSS_TOLERANCE),
        ({"model.quantization": "nf4", "trainer.activation_checkpointing": True}, LOSS_TOLERANCE),  # as in `qlora`
        # a GPU may multiply fp32 in TF32, which keeps 10 bits
        pytest.param({"trainer.device": "gpu"}, 1e-2, marks=NEEDS_GPU),
    ],
)
def test_packed_runs_equal_runs_alone_on_other_bases(make_config, tmp_path, settings, tolerance):
    if "model.quantization" in settings:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes, an optional extra, is not installed")
    configs = [make_config({**own, **settings}) for own in MIXED[:3]]
    check_packed_equals_alone(configs, tmp_path, inputs=load_inputs(configs[0]), rel=tolerance)


DROPPING = ({"method.rank": 2, "method.dropout": 0.2}, {"method.rank": 4, "seed": 3}, {"method.rank": 3, "seed": 1})


@pytest.mark.parametrize("attention", [0.0, 0.3], ids=["no dropout of attention", "dropout of attention"])
def test_a_base_that_drops_draws_the_masks_of_each_slot_as_alone(make_config, tmp_path, attention):
    model = save_gpt2(tmp_path / "model", attention=attention, others=0.1)
    configs = [make_config({**model, **own, "model.attention": "eager"}) for own in DROPPING]
    inputs = load_inputs(configs[0])
    check_packed_equals_alone(configs, tmp_path, inputs=inputs)
    assert not any(read_run(tmp_path / f"pack{n}").pack["shared_draws"] for n in range(len(configs)))
    undropped = dataclasses.replace(configs[1], seeds=dataclasses.replace(configs[1].seeds, dropout=8))
    train(tmp_path / "other", undropped, inputs=inputs)
    assert rows(tmp_path / "other")[0][1] != pytest.approx(rows(tmp_path / "alone1")[0][1], rel=LOSS_TOLERANCE)


ROWS = (
    {"method.rank": 2, "method.dropout": 0.2},
    {"method.rank": 4, "optim.lr": 3e-3, "seed": 3},
    {"method.rank": 3, "optim.lr": 1e-2, "method.dropout": 0.1, "seed": 5},
)
BLOCK = {"method.modules_to_save": ["model.layers.1"]}  # a whole block trains in full
RECOMPUTED = {"trainer.activation_checkpointing": True}
DROPS = {"model.attention": "eager", "model.dropout": 0.1}


def sentence(n):
    return " ".join(WORDS[(n * 7 + k * (1 + n % 3)) % 40] for k in range(2 + n * 5 % 11))


@pytest.fixture(scope="module")
def rows_folder(tmp_path_factory):
    """A tiny BERT with a tokenizer of words, and data of two kinds."""
    folder = tmp_path_factory.mktemp("rows")
    tokenizer = make_word_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    bert = transformers.BertConfig(vocab_size=64, attention_probs_dropout_prob=0.0, **sizes)
    transformers.BertModel(bert, add_pooling_layer=True).save_pretrained(folder / "bert")
    llama = transformers.LlamaConfig(vocab_size=64, max_position_embeddings=64, **sizes)
    transformers.LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    for name in ("bert", "llama"):
        tokenizer.save_pretrained(folder / name)
    rows = [{"text": sentence(n), "label": ("odd", "even")[n % 2]} for n in range(60)]
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chats = [{"prompt": sentence(n), "completion": sentence(n + 1)} for n in range(60)]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, chats)))
    return folder


@pytest.fixture
def make_rows_config(rows_folder):
    """Makes the settings of a short run on one of the two."""

    def make(kind, settings):
        base = {
            "table": {"model": "classifier", "model.path": str(rows_folder / "bert")},
            "chat": {"model": "causal_lm", "model.path": str(rows_folder / "llama"), "data.template": "plain"},
        }[kind]
        data = {"model.attention": "sdpa", "data": kind, "data.train": str(rows_folder / f"{kind}.jsonl")}
        trainer = {key: value for key, value in SMALL_RUN.items() if key.startswith("trainer.")}
        trainer |= {"trainer.batch_size": 6, "trainer.max_steps": 6, "trainer.accumulate": 2}
        return compose_run({**base, **data, **trainer, "trainer.progress": False, "optim.lr": 5e-3, **settings})

    return make


@pytest.mark.parametrize(
    ("kind", "shared"),
    [("table", {}), ("table", DROPS | RECOMPUTED), ("chat", BLOCK | RECOMPUTED)],
)
def test_packed_rows_of_different_lengths_train_as_alone(make_rows_config, tmp_path, kind, shared):
    configs = [make_rows_config(kind, {**settings, **shared}) for settings in ROWS]
    check_packed_equals_alone(configs, tmp_path, inputs=load_inputs(configs[0]), stopped=1)


def test_a_classifier_learns_and_its_score_is_accuracy(make_rows_config, tmp_path):
    config = make_rows_config("table", {"trainer.max_steps": 90, "trainer.eval_every_steps": 30, "model.dropout": 0.0})
    inputs = load_inputs(config)
    record = train(tmp_path / "lora", config, inputs=inputs)
    assert (record.metric, record.direction) == ("accuracy", "maximize")
    losses = [row["loss"] for row in read_steps(tmp_path / "lora") if "loss" in row]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])  # with the seeds 0 to 3, the last are 0.08 to 0.52 of the first
    assert record.data["train"]["labels"].keys() == {"even", "odd"}
    assert record.data["validation"]["constant_answer"].keys() == {"accuracy", "f1", "matthews", "loss"}


def test_a_slot_that_diverges_ends_alone_and_changes_no_bit_of_the_others(make_config, inputs, tmp_path):
    """It leaves the pack at the next evaluation, as a run that is stopped there does."""
    good, late = make_config({"method.dropout": 0.1}), make_config({"seed": 2, "method.dropout": 0.3})
    ended = {}
    for name, lr in (("calm", 1e-3), ("wild", 1e30)):
        other = make_config({"seed": 1, "optim.lr": lr, "optim.clip_norm": None})
        configs, stop = {"good": good, "other": other, "late": late}, stop_at("other", 2)
        ended[name] = train_pack(configs, tmp_path / name, inputs=inputs, on_evaluation=stop)
    others = {"good": "complete", "late": "complete"}
    assert ended == {"calm": {**others, "other": "stopped"}, "wild": {**others, "other": "failed"}}
    assert read_run(tmp_path / "wild" / "other").status == "failed"
    for run in others:
        calm, wild = (tmp_path / name / run for name in ("calm", "wild"))
        assert rows(calm) == rows(wild)
        a, b = load_file(calm / "best" / ADAPTER), load_file(wild / "best" / ADAPTER)
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_permuted_slots_give_each_run_the_same_value_and_are_reported_together(make_config, inputs, tmp_path):
    settings, values = [*MIXED[:3], {"optim.lr": 1e30, "optim.clip_norm": None}], []
    for order in ((0, 1, 2, 3), (2, 0, 1)):
        folder, reported = tmp_path / "".join(map(str, order)), []
        folder.mkdir()

        def report(evaluated, reported=reported):
            reported.append(
                {(one.run.run_folder.path.name, one.step): one.metrics["bits_per_byte"] for one in evaluated}
            )
            return ["poor" if one.run.run_folder.path.name == "1" else None for one in evaluated]

        configs = {str(n): make_config(settings[n]) for n in order}
        train_pack(configs, folder, inputs=inputs, on_evaluation=report)
        # slots are sorted by rank; the last run diverges at once
        assert [list(together) for together in reported] == [[(name, 2) for name in "021"], [("0", 4), ("2", 4)]]
        values.append(reported[0] | reported[1])
        for (name, step), value in values[-1].items():
            (row,) = [row for row in read_steps(folder / name) if row["step"] == step and "validation" in row]
            assert value == row["validation"]["bits_per_byte"]
    # a kernel may round the rows of its last block otherwise than those before
    assert values[1] == pytest.approx(values[0], rel=LOSS_TOLERANCE)


def test_a_pack_that_runs_out_of_memory_leaves_a_checkpoint_for_smaller_packs(
    make_config, inputs, tmp_path, monkeypatch
):
    real, calls = module_file.compute_losses, iter(range(1000))

    def fail_at_fifth(*args, **kwargs):
        if next(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return real(*args, **kwargs)

    configs = {str(n): make_config({"trainer.max_steps": 8, "seed": n}) for n in range(3)}
    with monkeypatch.context() as patch:
        patch.setattr(module_file, "compute_losses", fail_at_fifth)
        with pytest.raises(OutOfMemory, match="CUDA out of memory"):
            train_pack(configs, tmp_path, inputs=inputs)
    parts = {tmp_path / "a.ckpt": ["0", "2"], tmp_path / "b.ckpt": ["1"]}
    split_checkpoint(tmp_path / "pack.ckpt", parts)
    assert not (tmp_path / "pack.ckpt").exists()
    for file, names in parts.items():
        runs = {tmp_path / name: configs[name] for name in names}
        assert train_together(runs, inputs=inputs, checkpoint_file=file) == dict.fromkeys(names, "complete")
        assert not file.exists()
    for name in configs:
        assert [step for step, _ in rows(tmp_path / name)] == [1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8]
        train(tmp_path / "alone" / name, configs[name], inputs=inputs)
        assert_same_losses(tmp_path / "alone" / name, tmp_path / name, rel=LOSS_TOLERANCE)


def test_a_slot_that_gets_no_better_ends_early_as_alone(make_config, inputs, tmp_path):
    shared = {"trainer.max_steps": 8, "trainer.early_stop_evaluations": 1}
    stuck, better = (make_config({**shared, "optim.lr": lr}) for lr in (1e-12, 1e-3))
    # the answer makes no difference: the run has nothing left to do
    train_pack({"stuck": stuck, "better": better}, tmp_path, inputs=inputs, on_evaluation=stop_at("stuck", 4))
    alone = train(tmp_path / "alone", stuck, inputs=inputs)
    packed = read_run(tmp_path / "stuck")
    assert (packed.status, packed.steps_done, packed.reason) == ("complete", alone.steps_done, alone.reason)
    assert read_run(tmp_path / "better").steps_done == 8


def test_a_pack_whose_last_interval_is_shorter_is_evaluated_at_its_end(make_config, inputs, tmp_path):
    configs = {str(n): make_config({"trainer.max_steps": 5, "seed": n}) for n in range(2)}
    assert train_pack(configs, tmp_path, inputs=inputs) == {"0": "complete", "1": "complete"}
    assert [row["step"] for row in read_steps(tmp_path / "0") if "validation" in row] == [2, 4, 5]
