"""Makes the embedded base model: pre-trains it on the standard library's code and writes this folder's files.

    python -m lorasweep.models.tiny.pretrain --out src/lorasweep/models/tiny

A script, imported by nothing. It writes what transformers' `from_pretrained` loads (config.json, model.safetensors in
bf16, tokenizer) and README.md, the model card with recipe, data fingerprint and score. About an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorasweep.data.source import Document
from lorasweep.data.stdlib import read_code

END_OF_TEXT = 256
BLOCK = 512  # bytes per training sequence


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the byte-level tokenizer: token i is byte i, and token 256 ends a text."""
    bytes_to_unicode = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(shifted)}
    if sorted(vocabulary) != bytes_to_unicode:
        raise RuntimeError("the byte alphabet of `tokenizers` changed; the mapping above must follow it")
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


def build_model() -> LlamaForCausalLM:
    """Returns the untrained network: Llama architecture, 4 layers of width 160, tied embeddings, 1.28 M parameters."""
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
    )
    return LlamaForCausalLM(config)


def encode(documents: list[Document]) -> Tensor:
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
    """Trains with Muon on the matrices and AdamW on the rest, both with a linear decay to zero.

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
            offset = int(torch.randint(BLOCK, (1,), generator=generator))
            blocks = (len(tokens) - 1 - offset) // BLOCK
            order = torch.randperm(blocks, generator=generator) * BLOCK + offset
        starts, order = order[:batch_size], order[batch_size:]
        rows = torch.stack([tokens[s : s + BLOCK + 1] for s in starts.tolist()]).long()
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
            speed = (step + 1) * batch_size * BLOCK / (time.monotonic() - started)
            print(
                f"step {step + 1}/{steps}  {running / math.log(2):.3f} bits per byte  {speed:,.0f} bytes/s", flush=True
            )
        if step % 1000 == 999:
            score = bits_per_byte(model, held_out[:200_000], context=BLOCK, stride=BLOCK // 2)
            print(f"step {step + 1}/{steps}  held out {score:.4f} bits per byte", flush=True)


def main() -> None:
    """Reads the command line, pre-trains, scores on held-out modules and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=9_000)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of 512 bytes per step")
    parser.add_argument("--lr", type=float, default=1.2e-2)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    documents = read_code("pretraining")
    tokens = encode(documents)
    held_out = encode(read_code("validation") + read_code("test"))
    print(f"pre-training on {len(tokens):,} bytes of {len(documents)} modules, {len(held_out):,} held out", flush=True)
    model = build_model()
    started = time.monotonic()
    pretrain(model, tokens, held_out, steps=arguments.steps, batch_size=arguments.batch_size, lr=arguments.lr)
    minutes = (time.monotonic() - started) / 60

    arguments.out.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(arguments.out)
    build_tokenizer().save_pretrained(arguments.out)
    recipe = (
        f"{arguments.steps:,} steps of {arguments.batch_size} × {BLOCK} bytes, Muon (matrices), AdamW (the rest) at "
        f"{arguments.lr:g}, 200 steps of warm-up, linear decay to zero, seed 0, bf16 autocast; {minutes:.0f} minutes "
        "on 2 cores"
    )
    write_card(arguments.out, documents, tokens, recipe=recipe, scores=score_folder(arguments.out))


def score_folder(folder: Path) -> dict[str, float]:
    """Returns the bits per byte on held-out modules of the weights as a user loads them."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    parts = {name: read_code(name) for name in ("validation", "test")}
    both = encode(parts["validation"] + parts["test"])
    scores = {
        "validation + test, context 512": bits_per_byte(model, both, context=512, stride=256),
        "validation + test, context 128": bits_per_byte(model, both, context=128, stride=64),
        "test, context 512": bits_per_byte(model, encode(parts["test"]), context=512, stride=256),
    }
    for name, score in scores.items():
        print(f"held out ({name}): {score:.4f} bits per byte", flush=True)
    return scores


def write_card(
    folder: Path, documents: list[Document], tokens: Tensor, *, recipe: str, scores: dict[str, float]
) -> None:
    """Writes the model card: what it is, its data, recipe and score."""
    fingerprint = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]
    lines = [
        "# tiny: the embedded base model",
        "",
        f"A byte-level causal language model, Llama architecture, {build_model().num_parameters():,} parameters, "
        "stored in bf16.",
        "It exists so that lorasweep's main job runs anywhere with no network; it is of no other use.",
        "",
        f"- **Data:** {len(documents)} modules ({len(tokens):,} bytes) of the standard library of Python "
        f"{platform.python_version()}, test suites included, without the held-out modules "
        f"(`lorasweep.data.stdlib.read_code`). SHA-256 of the token row: `{fingerprint}`.",
        f"- **Recipe:** {recipe}. `python -m lorasweep.models.tiny.pretrain --out FOLDER` repeats it.",
        "- **Score**, bits per byte on held-out modules (in windows that score their second half):",
        *[f"    - {name}: {score:.3f}" for name, score in scores.items()],
        "- **Licence:** the text is Python's (PSF-2.0); the weights come under the licence of this repository.",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
