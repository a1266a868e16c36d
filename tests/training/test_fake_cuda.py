"""GPU code without a GPU: packs and runs alone train on fake CUDA tensors, and no step lets the CPU wait."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tests.tiny_tokenizer import WORDS, make_word_tokenizer

pytestmark = pytest.mark.slow  # one process trains all cases in 15 to 30 s
HERE = Path(__file__).parent
SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
WINDOW = {"sliding_window": 4, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": []}
MODELS = {
    "llama": transformers.LlamaConfig(**SIZES, **HEADS, num_hidden_layers=1),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, **HEADS, **WINDOW, num_hidden_layers=2),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SIZES, **HEADS, **EXPERTS, num_hidden_layers=1),
}
LORA = {"method.rank": 2, "method.dropout": 0.1}
CASES = {
    "llama": {**LORA, "trainer.accumulate": 2, "trainer.max_steps": 2, "trainer.eval_every_steps": 2},
    "gemma3": LORA,
    "qwen3_moe": LORA,
    "llama, flash attention": {**LORA, "model.attention": "flash_attention_2"},
    "llama, in 4 bits": {**LORA, "model.quantization": "nf4"},
    "llama, checkpointed": {**LORA, "trainer.activation_checkpointing": True},
    "llama, full, autocast": {"method": "full"},
}
SETTINGS = {
    "model": "causal_lm",
    "model.attention": "sdpa",
    "data": "chat",
    "data.template": "plain",
    "trainer.device": "gpu",
    "trainer.precision": "bf16",
    "trainer.batch_size": 3,
    "trainer.max_steps": 1,
    "trainer.eval_every_steps": 1,
    "trainer.eval_batch_size": 8,
    "trainer.progress": False,
    "logger": "none",
}
NEEDED = {
    ("training", "copy", "logger_connector/result.py"): "Lightning's metric of the loss, once in a run",
    ("training", "read", "_flush"): "waits at a boundary, so that the time of the last steps is that of training",
    ("training", "read", "_ignore_causal_mask_sdpa"): "transformers looks for padding, once or twice in a pass",
    ("training", "read", "flash_attention"): "transformers looks for padding in each layer",
    ("evaluating", "read", "_ignore_causal_mask_sdpa"): "as in training",
    ("evaluating", "read", "flash_attention"): "as in training",
    ("evaluating", "read", "read_metrics"): "the metrics of all slots, once in an evaluation",
    ("evaluating", "copy", "logger_connector/result.py"): "Lightning's metrics of the evaluation",
}
"""What lets the CPU wait, by phase, kind and a part of the lines, with the reason."""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Returns what the cases noted. They run in one process, in which CUDA tensors are fake."""
    if torch.version.cuda is not None:
        pytest.skip("a torch that is built for CUDA has its own device guard")
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile the device guard of the fake GPU")
    folder, root = tmp_path_factory.mktemp("fake_cuda"), Path(torch.__file__).parent
    links = [f"-I{root}/include", f"-L{root}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib"]
    guard = ["-std=c++20", "-O0", "-shared", "-fPIC", str(HERE / "fake_cuda.cpp"), "-o", str(folder / "guard.so")]
    subprocess.run(["g++", *guard, *links], check=True)
    with torch.random.fork_rng():
        for name, config in MODELS.items():
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
            make_word_tokenizer().save_pretrained(folder / name)
    sentences = [" ".join(WORDS[n : n + 1 + n * 5 % 7]) for n in range(24)]
    for name, part in (("train", sentences), ("validation", sentences[:4])):
        rows = [json.dumps({"prompt": text, "completion": text[::-1].replace("w", "")}) for text in part]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    data = {f"data.{name}": str(folder / f"{name}.jsonl") for name in ("train", "validation")}
    has_bits = importlib.util.find_spec("bitsandbytes") is not None
    cases = {
        name: {**SETTINGS, **data, "model.path": str(folder / name.split(",")[0]), **own}
        for name, own in CASES.items()
        if has_bits or "bits" not in name
    }
    (folder / "task.json").write_text(json.dumps({"cases": cases}))
    # the guard must be there when torch is imported, which counts the devices
    environment = {**os.environ, "LD_PRELOAD": str(folder / "guard.so"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(HERE / "fake_cuda_child.py"), str(folder / "task.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


def find_case(results, case):
    if case not in results:
        pytest.skip("bitsandbytes, an optional extra, is not installed")
    assert "error" not in results[case], results[case]["error"]
    return results[case]


def find_reason(phase, kind, lines):
    return next((key for key in NEEDED if key[:2] == (phase, kind) and key[2] in lines), None)


def test_each_kind_of_wait_is_noted(results):
    assert results["modes"] == [["read"]] * 6 + [["copy"]] * 3 + [["pinned"]] + [["mixed"]] * 2


@pytest.mark.parametrize("case", CASES)
def test_neither_a_step_nor_an_evaluation_lets_the_cpu_wait_but_where_it_must(results, case):
    found = find_case(results, case)
    assert found["ended"] == (["a", "b"] if "method.rank" in CASES[case] else [])
    assert found["steps"] == CASES[case].get("trainer.max_steps", 1)
    notes = [(run, *note) for run, notes in found["notes"].items() for note in notes]
    assert {"training", "evaluating"} <= {phase for _, phase, *_ in notes}
    assert "mixed" not in {kind for _, _, kind, *_ in notes}  # no operation gets tensors of both devices
    waits = [note for note in notes if note[1] in ("training", "evaluating") and note[2] != "pinned"]
    assert not [note for note in waits if find_reason(*note[1:4]) is None]


def test_a_pack_copies_what_belongs_to_a_micro_batch_once_and_nothing_for_each_layer(results):
    notes = find_case(results, "llama")["notes"]["pack"]
    pinned = [count for phase, kind, _, count in notes if (phase, kind) == ("training", "pinned")]
    # 2 steps of 2 micro-batches: tokens, mask, targets, weights and places
    assert sum(pinned) <= 2 * 2 * 5
    assert not [note for note in notes if note[:2] == ["training", "copy"]]


def test_every_exception_is_needed_by_a_case(results):
    notes = [
        note for case in CASES if case in results for run in find_case(results, case)["notes"].values() for note in run
    ]
    assert {find_reason(*note[:3]) for note in notes} >= set(NEEDED)


def test_masks_are_drawn_on_the_gpu_from_the_same_seeds_alone_and_in_a_pack(results):
    seeds = find_case(results, "llama")["seeds"]
    assert len(seeds["pack"]) == 2 * len(seeds["alone"]) > 0
    assert set(seeds["alone"]) < set(seeds["pack"])


def test_a_resumed_run_continues_the_random_stream_of_the_gpu_from_which_fused_kernels_draw(results):
    find_case(results, "llama")
    assert results["restored"] == [list(range(16))]
