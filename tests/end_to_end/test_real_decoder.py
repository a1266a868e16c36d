"""A real decoder with a chat template: packs equal runs alone, and transformers generates with the exported adapter."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from real_weights import smollm_folder
from tests.training.runs import losses, train, train_together

from lorasweep.config.compose import compose_run
from lorasweep.data.rows import list_passages
from lorasweep.runs.export import export_run
from lorasweep.training.finished_run import restore_model
from lorasweep.training.inputs import load_inputs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # what PEFT calls
]
QUESTION = {"role": "user", "content": "What is the capital of France?"}
# fp32 kernels sum in another order for other shapes; Adam's first step divides by |g|, which magnifies it
LOSS_TOLERANCE = 1e-4


def say(answer):
    return {"role": "assistant", "content": answer}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Two conversations of two turns with a model that answers in English, and is taught to answer in one word."""
    folder = tmp_path_factory.mktemp("smollm2")
    answers = [("Paris", "About two million"), ("Paris.", "Two million")]
    more = {"role": "user", "content": "How many people live there?"}
    lines = [
        json.dumps({"messages": [QUESTION, say(first), more, say(second)]}) + "\n" for first, second in answers * 2
    ]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(lines))
    trainer = {"max_steps": 2, "batch_size": 2, "eval_every_steps": 2, "precision": "fp32", "progress": False}
    return {
        "model": "causal_lm",
        "model.path": str(smollm_folder(folder / "model")),
        "data": "chat",
        "data.train": str(folder / "train.jsonl"),
        "data.validation": str(folder / "validation.jsonl"),
        "optim.lr": 1e-3,
        **{f"trainer.{key}": value for key, value in trainer.items()},
    }


@pytest.mark.release
def test_packs_of_a_real_decoder_equal_runs_alone_and_the_adapter_generates(settings, tmp_path):
    configs = [compose_run(settings | {"method.rank": rank}) for rank in (2, 8)]
    inputs = load_inputs(configs[0])
    passages = list_passages(inputs.splits.train, 0, tokenizer=inputs.base.tokenizer)
    answers = [text for text, is_scored in passages if is_scored]
    assert answers == ["Paris<|im_end|>", "About two million<|im_end|>"]
    train_together(
        {tmp_path / f"pack{n}": config for n, config in enumerate(configs)},
        inputs=inputs,
        checkpoint_file=tmp_path / "pack.ckpt",
    )
    for n, config in enumerate(configs):
        train(tmp_path / f"alone{n}", config, inputs=inputs)
        packed, alone = losses(tmp_path / f"pack{n}"), losses(tmp_path / f"alone{n}")
        assert [row[1] for row in packed] == pytest.approx([row[1] for row in alone], rel=LOSS_TOLERANCE)
    export_run(tmp_path / "pack1", format="peft", out=tmp_path / "adapter")
    served = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    tokenizer = inputs.base.tokenizer
    prompt = tokenizer.apply_chat_template(
        [QUESTION], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ours = restore_model(configs[1], inputs.base, folder=tmp_path / "pack1" / "best").eval()
    with torch.no_grad():
        assert torch.allclose(served(**prompt).logits, ours(**prompt).logits, atol=1e-3)
    tokens = served.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])
