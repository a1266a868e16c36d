"""Rows of different lengths in packs: sentences with labels and prompts with completions train as alone."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.small_runs import SMALL_RUN
from tests.tiny_tokenizer import WORDS, make_word_tokenizer

from lorasweep.config.compose import compose_run
from lorasweep.record import read_run, read_steps
from lorasweep.training.inputs import build_inputs
from lorasweep.training.packs.pack import train_pack
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunFolder, RunRequest

ADAPTER = "adapter_model.safetensors"
MIXED = (
    {"method.rank": 2, "method.dropout": 0.2},
    {"method.rank": 4, "optim.lr": 3e-3, "seed": 3},
    {"method.rank": 3, "optim.lr": 1e-2, "method.dropout": 0.1, "seed": 5},
)
# fp32 kernels sum in another order for other shapes, and Adam divides by |g| at first, which magnifies it
TOLERANCE = 1e-4


def sentence(n):
    return " ".join(WORDS[(n * 7 + k * (1 + n % 3)) % 40] for k in range(2 + n * 5 % 11))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
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
def make(folder):
    """Makes the settings of a short run on one of the two."""

    def make(kind, settings):
        base = {
            "table": {"model": "classifier", "model.path": str(folder / "bert")},
            "chat": {"model": "causal_lm", "model.path": str(folder / "llama"), "data.template": "plain"},
        }[kind]
        data = {"model.attention": "sdpa", "data": kind, "data.train": str(folder / f"{kind}.jsonl")}
        trainer = {key: value for key, value in SMALL_RUN.items() if key.startswith("trainer.")}
        trainer |= {"trainer.batch_size": 6, "trainer.max_steps": 6, "trainer.accumulate": 2}
        return compose_run({**base, **data, **trainer, "trainer.progress": False, "optim.lr": 5e-3, **settings})

    return make


def numbers(folder):
    return [(row["step"], row.get("loss", row.get("validation", {}).get("loss"))) for row in read_steps(folder)]


BLOCK = {"method.modules_to_save": ["model.layers.1"]}  # a whole block trains in full, so examples are padded

DROPPING = {"model.attention": "eager", "model.dropout": 0.1}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("kind", "shared"), [("table", {}), ("chat", {}), ("chat", BLOCK), ("table", DROPPING)])
def test_packed_rows_of_different_lengths_train_as_alone(make, tmp_path, kind, shared, checkpointing):
    shared = {**shared, "trainer.activation_checkpointing": checkpointing}
    configs = [make(kind, {**settings, **shared}) for settings in MIXED]
    inputs = build_inputs(configs[0])
    jobs = []
    for n, config in enumerate(configs):
        alone = RunFolder(path=tmp_path / f"alone{n}")
        train_run(
            config,
            alone,
            inputs=inputs,
            on_evaluation=lambda step, values, n=n: "poor" if (n, step) == (1, 2) else None,
        )
        run_folder = RunFolder(path=tmp_path / f"pack{n}")
        jobs.append(RunRequest(config=config, run_folder=run_folder))
    late = [jobs[2]]
    assert train_pack(
        jobs[:2],
        inputs=inputs,
        slots=2,
        next_run=lambda: late.pop() if late else None,
        # then the third run takes the second's slot: their steps have other rows
        on_evaluation=lambda evaluated: ["poor" if (one.run, one.step) == (jobs[1], 2) else None for one in evaluated],
        on_end=lambda request, record: None,
        state_file=tmp_path / "pack.json",
    )
    for n in range(3):
        alone, packed = tmp_path / f"alone{n}", tmp_path / f"pack{n}"
        assert [step for step, _ in numbers(alone)] == [step for step, _ in numbers(packed)]
        for (_, a), (_, b) in zip(numbers(alone), numbers(packed), strict=True):
            assert a == pytest.approx(b, rel=TOLERANCE)
        a, b = load_file(alone / "last" / ADAPTER), load_file(packed / "last" / ADAPTER)
        assert a.keys() == b.keys()
        assert all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)
        one, other = read_run(alone), read_run(packed)
        for name in ("status", "metric", "tokens_trained", "trainable_params", "adapter_bytes"):
            assert getattr(one, name) == getattr(other, name), name
        assert one.batching["micro_batches"] == other.batching["micro_batches"] == 2


def test_a_classifier_learns_and_its_score_is_accuracy(make, tmp_path):
    config = make("table", {"trainer.max_steps": 90, "trainer.eval_every_steps": 30, "model.dropout": 0.0})
    inputs = build_inputs(config)
    record = train_run(config, RunFolder(path=tmp_path / "lora"), inputs=inputs)
    assert (record.metric, record.direction) == ("accuracy", "maximize")
    losses = [row["loss"] for row in read_steps(tmp_path / "lora") if "loss" in row]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])  # with the seeds 0 to 3, the last are 0.08 to 0.52 of the first
    assert record.batching["padding_fraction"]["train"] == 0  # rows of different lengths train without padding
    assert record.data["train"]["labels"].keys() == {"even", "odd"}
    assert record.data["validation"]["constant_answer"].keys() == {"accuracy", "f1", "matthews", "loss"}
