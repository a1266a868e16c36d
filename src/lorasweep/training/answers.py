"""What a model answers to the prompts of a split, token by token, and how like the given answers that is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.text import rouge_score, sacre_bleu_score

from lorasweep.config.data import ChatConfig, DataConfig
from lorasweep.config.run import RunConfig
from lorasweep.data.examples import CompletionSplit, SequenceSplit
from lorasweep.data.split import IGNORED, Split
from lorasweep.errors import ConfigError
from lorasweep.methods import METHODS
from lorasweep.training.environment import device_of
from lorasweep.training.inputs import RunInputs

ROUGE = ("rouge1", "rouge2", "rougeL")
LONGER = 1.5
"""An answer may be so many times as long as the longest given one."""


def wants_answers(config: DataConfig) -> bool:
    """Returns whether the test split's prompts are to be answered."""
    return isinstance(config, ChatConfig) and config.generate


def score_answers(model: nn.Module, split: Split, *, config: RunConfig, inputs: RunInputs) -> dict[str, float]:
    """Answers every prompt of a split by greedy decoding and returns corpus BLEU (0 to 100) and ROUGE F-measures.

    BLEU is that of sacreBLEU (Post 2018, tokenizer 13a), ROUGE that of Lin 2004; rows with the same prompt are
    references of one answer, which E2E NLG and its like have several of.

    Raises:
        ConfigError: The model can't generate, or the rows have several answers each.
    """
    if not hasattr(model, "generate") or not isinstance(split, CompletionSplit | SequenceSplit):
        raise ConfigError("`data.generate` needs a model of transformers that generates text. Set it to false.")
    references = gather_references(split, inputs)
    prompts = list(references)
    limit = int(LONGER * max(len(answer) for answers in references.values() for answer in answers))
    answers: list[str] = []
    size = config.trainer.eval_batch_size
    for first in range(0, len(prompts), size):
        tokens = generate(model, prompts[first : first + size], limit=limit, split=split, config=config, inputs=inputs)
        answers += decode(tokens, inputs)
    expected = [decode(list(references[prompt]), inputs) for prompt in prompts]
    scores = {"bleu": 100 * float(sacre_bleu_score(answers, expected))}
    rouge = rouge_score(answers, expected, rouge_keys=ROUGE)
    return scores | {name: float(rouge[f"{name}_fmeasure"]) for name in ROUGE}


def gather_references(
    split: CompletionSplit | SequenceSplit, inputs: RunInputs
) -> dict[tuple[int, ...], list[list[int]]]:
    """Returns the answers that a split gives to each of its prompts, as token ids."""
    found: dict[tuple[int, ...], list[list[int]]] = {}
    for row in range(len(split)):
        tokens, targets = split.tokens[row].tolist(), split.targets[row].tolist()
        scored = [place for place, target in enumerate(targets) if target != IGNORED]
        if isinstance(split, CompletionSplit):
            if scored != list(range(scored[0], scored[-1] + 1)):
                raise ConfigError(
                    "`data.generate` needs rows with one answer each, but one has several. Set it to false."
                )
            tokens = tokens[: scored[0] + 1]
        found.setdefault(tuple(tokens), []).append([targets[place] for place in scored])
    return found


@torch.no_grad()
def generate(
    model: Any,
    prompts: list[tuple[int, ...]],
    *,
    limit: int,
    split: CompletionSplit | SequenceSplit,
    config: RunConfig,
    inputs: RunInputs,
) -> list[list[int]]:
    """Returns the tokens that follow each prompt, greedily, up to the end of the text or the limit."""
    device = device_of(config.trainer)
    mixed = inputs.precision == "bf16" and METHODS[config.method.name].needs_autocast
    longest = max(map(len, prompts))
    rows, mask = (
        torch.full((len(prompts), longest), split.pad_token),
        torch.zeros(len(prompts), longest, dtype=torch.int64),
    )
    for row, prompt in enumerate(prompts):  # what goes on is padded on the left, what is only read on the right
        place = slice(longest - len(prompt), None) if isinstance(split, CompletionSplit) else slice(len(prompt))
        rows[row, place], mask[row, place] = torch.tensor(prompt), 1
    model.to(device).eval()
    end = None if inputs.base.tokenizer is None else inputs.base.tokenizer.eos_token_id
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        made: Tensor = model.generate(
            input_ids=rows.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            num_beams=1,
            max_new_tokens=limit,
            pad_token_id=split.pad_token,
            eos_token_id=end,
            use_cache=True,
        )
    model.cpu()
    start = longest if isinstance(split, CompletionSplit) else 1
    return [_until(row, end) for row in made[:, start:].tolist()]


def decode(rows: list[list[int]], inputs: RunInputs) -> list[str]:
    """Returns texts of token ids, without special tokens."""
    assert inputs.base.tokenizer is not None
    return [str(inputs.base.tokenizer.decode(row, skip_special_tokens=True)).strip() for row in rows]


def _until(row: list[int], end: int | None) -> list[int]:
    return row[: row.index(end)] if end in row else row
