"""A tiny Llama of words with a chat template, and prompts whose answer is their last word."""

import json

import torch
import transformers
from tests.tiny_tokenizer import WORDS, make_word_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)


def make_word_chats(folder):
    """Writes `llama` and `chat.jsonl` into a folder, and returns the settings of a run on them."""
    tokenizer = make_word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>", "<end>"]})
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    # its own end is [END], which no answer of the data has: they end with <end>
    config = transformers.LlamaConfig(vocab_size=64, max_position_embeddings=64, eos_token_id=2, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    prompts = [[WORDS[(n * 7 + k * 3 + n // 40) % 40] for k in range(1 + n % 5)] for n in range(120)]
    rows = [{"prompt": " ".join(words), "completion": words[-1], "number": n} for n, words in enumerate(prompts)]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "model": "causal_lm",
        "model.path": str(folder / "llama"),
        "data": "chat",
        "data.train": str(folder / "chat.jsonl"),
        "data.test_fraction": 0.3,
        "data.max_length": 32,
        "data.answers.score": "exact_match",
        "data.answers.max_new_tokens": 4,
        "trainer.batch_size": 16,
        "trainer.max_steps": 30,
        "trainer.eval_every_steps": 30,
        "trainer.precision": "fp32",
        "trainer.device": "cpu",
        "optim.lr": 1e-2,
    }


@torch.no_grad()
def compute_answer_logits(model, tokenizer, line):
    """Returns the logits, (steps, vocabulary), from which a greedy answer's words and its end were chosen."""
    prompt, answer = (tokenizer(line[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "answer"))
    return model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 :]


def find_margin(logits):
    """Returns by how much the largest logit exceeds the second, at the step where they are closest."""
    first, second = logits.topk(2).values.unbind(-1)
    return float((first - second).min())
