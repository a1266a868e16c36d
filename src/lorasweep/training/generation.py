"""Generates answers to the prompts of a split, and scores them against the reference answers."""

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
from lorasweep.training.environment import device_of
from lorasweep.training.inputs import RunInputs

ROUGE = ("rouge1", "rouge2", "rougeL")
MAX_LENGTH_RATIO = 1.5
"""Maximum tokens of an answer, as a multiple of the tokens of the longest reference answer."""


def is_generating(config: DataConfig) -> bool:
    """Returns whether answers to the test split are generated (`data.generate`)."""
    return isinstance(config, ChatConfig) and config.generate


def score_answers(model: nn.Module, split: Split, *, config: RunConfig, inputs: RunInputs) -> dict[str, float]:
    """Answers every prompt of a split by greedy decoding, and returns corpus BLEU (0 to 100) and ROUGE F-measures.

    Source: sacreBLEU with tokenizer 13a (Post 2018), ROUGE (Lin 2004). If examples have the same prompt, their answers
    are references of one generated answer, as in E2E NLG.
    """
    if not hasattr(model, "generate") or not isinstance(split, CompletionSplit | SequenceSplit):
        raise ConfigError("`data.generate` needs a model of transformers that generates text. Set it to false.")
    references = gather_references(split)
    prompts = list(references)
    limit = int(MAX_LENGTH_RATIO * max(len(answer) for answers in references.values() for answer in answers))
    answers: list[str] = []
    size = config.trainer.eval_batch_size
    for first in range(0, len(prompts), size):
        tokens = generate(model, prompts[first : first + size], limit=limit, split=split, config=config, inputs=inputs)
        answers += _decode(tokens, inputs)
    expected = [_decode(list(references[prompt]), inputs) for prompt in prompts]
    rouge = rouge_score(answers, expected, rouge_keys=ROUGE)
    scores = {"bleu": 100 * float(sacre_bleu_score(answers, expected))}
    return scores | {name: float(rouge[f"{name}_fmeasure"]) for name in ROUGE}


def gather_references(split: CompletionSplit | SequenceSplit) -> dict[tuple[int, ...], list[list[int]]]:
    """Returns the reference answers to each prompt of a split, as token ids."""
    references: dict[tuple[int, ...], list[list[int]]] = {}
    for row in range(len(split)):
        tokens, targets = split.tokens[row].tolist(), split.targets[row].tolist()
        scored = [index for index, target in enumerate(targets) if target != IGNORED]
        if isinstance(split, CompletionSplit):  # prompt and answer are one sequence, and only the answer is scored
            if scored != list(range(scored[0], scored[-1] + 1)):
                raise ConfigError(
                    "`data.generate` needs examples with one answer each, but one has several. Set it to false."
                )
            tokens = tokens[: scored[0] + 1]
        references.setdefault(tuple(tokens), []).append([targets[index] for index in scored])
    return references


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
    """Returns the tokens of an answer to each prompt: at most `limit`, without the end-of-text token."""
    device = device_of(config.trainer)
    longest = max(map(len, prompts))
    tokens = torch.full((len(prompts), longest), split.pad_token)
    mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
    continues = isinstance(split, CompletionSplit)
    for row, prompt in enumerate(prompts):
        # A decoder continues its prompt, so padding goes left of it. An encoder only reads it, so padding goes right.
        span = slice(longest - len(prompt), None) if continues else slice(len(prompt))
        tokens[row, span], mask[row, span] = torch.tensor(prompt), 1
    model.to(device).eval()
    end = None if inputs.base.tokenizer is None else inputs.base.tokenizer.eos_token_id
    with inputs.autocast(config):
        generated: Tensor = model.generate(
            input_ids=tokens.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            num_beams=1,
            max_new_tokens=limit,
            pad_token_id=split.pad_token,
            eos_token_id=end,
            use_cache=True,
        )
    model.cpu()
    answers = generated[:, longest if continues else 1 :].tolist()
    return [answer[: answer.index(end)] if end in answer else answer for answer in answers]


def _decode(rows: list[list[int]], inputs: RunInputs) -> list[str]:
    assert inputs.base.tokenizer is not None
    return [str(inputs.base.tokenizer.decode(row, skip_special_tokens=True)).strip() for row in rows]
