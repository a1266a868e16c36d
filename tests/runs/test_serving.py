"""`export` says which servers take an adapter, and writes the chat template with which the run trained."""

import json
import shlex

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from lorasweep.config.compose import compose_run
from lorasweep.errors import RecordError
from lorasweep.runs.export import export_run
from lorasweep.runs.serving import describe_serving
from lorasweep.training.inputs import build_inputs
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunFolder

PLAIN = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "/base", "modules_to_save": None}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture
def describe(tmp_path, model_folder):
    """Writes an adapter with these settings and names of layers, and gives what is said of it."""

    def describe(names=("q_proj",), **settings):
        (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN | settings))
        save_file({f"m.{name}.lora_A.weight": torch.zeros(1) for name in names}, tmp_path / "adapter_model.safetensors")
        config = compose_run({"model": "causal_lm", "model.path": str(model_folder)}).model
        return describe_serving(tmp_path, config, out=tmp_path / "my adapter", has_template=False)

    return describe


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return folder


@pytest.mark.parametrize(("rank", "limit"), [(1, "1"), (4, "8"), (8, "8"), (24, "32"), (300, "320"), (512, "512")])
def test_vllm_gets_the_smallest_limit_that_it_accepts_for_the_rank(describe, rank, limit):
    words = shlex.split(describe(r=rank)[0].split("`")[1])
    assert words[:3] == ["vllm", "serve", "/base"]
    assert words[words.index("--max-lora-rank") + 1] == limit
    assert words[-1].endswith("/my adapter")


@pytest.mark.parametrize(
    ("settings", "vllm", "llama"),
    [
        ({"peft_type": "VERA"}, "a VERA", "a VERA"),
        ({"use_dora": True}, "a DoRA", "a DoRA"),
        ({"modules_to_save": ["lm_head"]}, "in full (lm_head)", "in full (lm_head)"),
        ({"alpha_pattern": {"q": 2}}, "different α", "different α"),
        ({"names": ["lm_head"]}, "adapts the head", "adapts the head"),
        ({"rank_pattern": {"q": 2}}, "different ranks", None),
        ({"rank_pattern": {"q": 2}, "use_rslora": True}, "different ranks", "rsLoRA with different ranks"),
        ({"r": 513}, "above 512", None),
        ({"target_parameters": ["experts.down_proj"]}, None, "fused experts"),
        ({"target_parameters": ["mlp.down_proj.weight"]}, None, None),
    ],
)
def test_what_a_server_can_not_take_is_said_with_the_reason(describe, settings, vllm, llama):
    for sentence, reason, name in zip(describe(**settings), (vllm, llama), ("vLLM", "llama.cpp"), strict=True):
        assert sentence.startswith(f"{name} does not take" if reason else f"{name}: `")
        assert (reason or "") in sentence
        assert ("--format merged" in sentence) is bool(reason)


def test_llama_cpp_scales_an_rslora_by_the_root_of_its_rank_and_vllm_refuses_text_models_of_images(
    describe, model_folder
):
    assert "--lora-scaled adapter.gguf:2 " in describe(use_rslora=True)[1].replace("`", " ")
    (model_folder / "config.json").write_text('{"architectures": ["Qwen3_5ForConditionalGeneration"]}')
    assert "other names in Qwen3_5ForConditionalGeneration" in describe()[0]


def test_a_template_of_ones_own_is_exported_with_the_tokenizer(make_config, tmp_path):
    talks = [[{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": str(n)}] for n in range(20)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    data = {"data": "chat", "data.train": str(tmp_path / "talks.jsonl"), "data.template": str(tmp_path / "mine.jinja")}
    trainer = {f"trainer.{key}": value for key, value in {"max_steps": 1, "batch_size": 2, "device": "cpu"}.items()}
    config = compose_run(data | trainer | {"trainer.progress": False, "method.rank": 2})
    train_run(config, RunFolder(path=tmp_path / "run"), inputs=build_inputs(config))
    for form in ("peft", "merged"):
        written = export_run(tmp_path / "run", format=form, out=tmp_path / form)
        assert (written.folder / "chat_template.jinja").read_text() == TEMPLATE
        assert AutoTokenizer.from_pretrained(written.folder).chat_template == TEMPLATE
        assert all("chat_template.jinja" in sentence for sentence in written.serving)
    (tmp_path / "mine.jinja").write_text(TEMPLATE + " ")
    with pytest.raises(RecordError, match=r"mine.jinja' has changed"):
        export_run(tmp_path / "run", format="peft", out=tmp_path / "changed")
    assert not (tmp_path / "changed").exists()
