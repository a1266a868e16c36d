"""Pre-trains the embedded base model on the standard library's code, and writes its files.

    python benchmarks/pretrain_tiny.py --out src/lorasweep/models/tiny

Takes about an hour on 2 cores. Writes config.json, model.safetensors in bf16 and the tokenizer, and prints the numbers
of README.md, the model card.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from write_stdlib import read_code

from lorasweep.tasks.text.read import Document

END_OF_TEXT = 256
BLOCK_BYTES = 512
"""Bytes per training sequence."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the byte-level tokenizer: token i is byte i, and token 256 ends a text."""
    vocabulary = {letter: byte for byte, letter in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def build_model(width: int) -> LlamaForCausalLM:
    """Returns the untrained network: Llama architecture, 4 layers, tied embeddings; 1.28 M parameters at width 160."""
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=width,
        intermediate_size=width * 27 // 10,
        num_hidden_layers=4,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
    )
    return LlamaForCausalLM(config)


def encode(documents: Sequence[Document]) -> Tensor:
    """Returns the documents' bytes as one row of token ids, each text followed by the end token."""
    ids: list[int] = []
    for document in documents:
        ids.extend(document.text.encode("utf-8"))
        ids.append(END_OF_TEXT)
    return torch.tensor(ids, dtype=torch.int16)


def bits_per_byte(model: LlamaForCausalLM, tokens: Tensor, *, context: int, stride: int) -> float:
    """Returns the bits per byte of a token row in windows of `context`, each scoring its last `stride` tokens only."""
    model.eval()  # type: ignore[no-untyped-call]
    total, count = 0.0, 0
    starts = range(0, len(tokens) - context - 1, stride)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for first in range(0, len(starts), 32):
            rows = torch.stack([tokens[s : s + context + 1] for s in starts[first : first + 32]]).long()
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits[:, -stride:]
            targets = rows[:, -stride:]
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
            total, count = total + loss.item(), count + targets.numel()
    model.train()
    return total / count / math.log(2)


def pretrain(
    model: LlamaForCausalLM, tokens: Tensor, held_out: Tensor, *, steps: int, batch_size: int, lr: float
) -> None:
    """Trains matrices with Muon and other parameters with AdamW, both with a linear decay to zero.

    Muon: Jordan et al. 2024; `match_rms_adamw`: Liu et al. 2025 (arXiv 2502.16982), eq. 4.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=(0.9, 0.95)),
    ]

    def factor(step: int) -> float:
        return min((step + 1) / 200, 1.0) * (1 - step / steps)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    generator = torch.Generator().manual_seed(0)
    started, running = time.monotonic(), 0.0
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < batch_size:  # a new pass over the data, cut at another offset
            offset = int(torch.randint(BLOCK_BYTES, (1,), generator=generator))
            blocks = (len(tokens) - 1 - offset) // BLOCK_BYTES
            order = torch.randperm(blocks, generator=generator) * BLOCK_BYTES + offset
        starts, order = order[:batch_size], order[batch_size:]
        rows = torch.stack([tokens[s : s + BLOCK_BYTES + 1] for s in starts.tolist()]).long()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 99:
            speed = (step + 1) * batch_size * BLOCK_BYTES / (time.monotonic() - started)
            print(
                f"step {step + 1}/{steps}  {running / math.log(2):.3f} bits per byte  {speed:,.0f} bytes/s", flush=True
            )
        if step % 1000 == 999:
            score = bits_per_byte(model, held_out[:200_000], context=BLOCK_BYTES, stride=BLOCK_BYTES // 2)
            print(f"step {step + 1}/{steps}  held out {score:.4f} bits per byte", flush=True)


def main() -> None:
    """Pre-trains, writes the folder, and prints the data's fingerprint and the scores on held-out modules."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=9_000)
    parser.add_argument("--width", type=int, default=160, help="a multiple of 32")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of 512 bytes per step")
    parser.add_argument("--lr", type=float, default=1.2e-2)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    documents = read_code("pretraining")
    tokens, test = encode(documents), encode(read_code("test"))
    held_out = encode(read_code("validation") + read_code("test"))
    fingerprint = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]
    print(f"pre-training on {len(tokens):,} bytes of {len(documents)} modules, fingerprint {fingerprint}", flush=True)
    model = build_model(arguments.width)
    pretrain(model, tokens, held_out, steps=arguments.steps, batch_size=arguments.batch_size, lr=arguments.lr)
    model.bfloat16().save_pretrained(arguments.out)
    build_tokenizer().save_pretrained(arguments.out)
    saved = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.bfloat16)
    for name, scored, context in (("held out", held_out, 512), ("held out", held_out, 128), ("test", test, 512)):
        score = bits_per_byte(saved, scored, context=context, stride=context // 2)
        print(f"{name}, context {context}: {score:.3f} bits per byte", flush=True)


if __name__ == "__main__":
    main()
