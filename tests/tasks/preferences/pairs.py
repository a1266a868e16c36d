"""Pairs of answers for the embedded model, and the inputs of a run that learns which of them are chosen."""

import functools
from dataclasses import replace

import torch
from tests.data.conftest import make_ragged
from transformers import LlamaConfig, LlamaForCausalLM

from lorasweep.config.objective import ObjectiveConfig
from lorasweep.data.rows import IGNORED, Rows
from lorasweep.tasks.preferences.dpo import Dpo
from lorasweep.tasks.preferences.orpo import Orpo
from lorasweep.tasks.splits import DataSplits
from lorasweep.training.inputs import load_inputs


def make_pairs(name, *, number, seed):
    """Random prompts with two random answers of other lengths, of bytes; a chosen answer has capital letters only."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, size):
        return torch.randint(low, high, (size,), generator=generator)

    tokens, targets = [], []
    for _ in range(number):
        prompt_length, *sizes = draw(2, 9, 3).tolist()
        prompt = draw(48, 58, prompt_length)
        for size, (low, high) in zip(sizes, [(65, 91), (97, 123)], strict=True):
            ids = torch.cat([prompt, draw(low, high, size)])
            tokens.append(ids[:-1])
            targets.append(torch.cat([ids.new_full((prompt_length - 1,), IGNORED), ids[prompt_length:]]))
    return Rows(
        name=name,
        fingerprint=f"pairs {seed}",
        groups=tuple(map(str, range(number))),
        sequences={"input_ids": make_ragged(tokens), "targets": make_ragged(targets)},
        weights=torch.ones(number),
        row_names=("chosen", "rejected"),
        facts={"examples": number},
    )


def compute_log_p(model, split, row):
    """Returns the log probabilities of the scored tokens of a row, which stands alone and has no padding."""
    ids, targets = split.sequences["input_ids"][row], split.sequences["targets"][row]
    scored = targets != IGNORED
    return model(input_ids=ids[None]).logits[0].log_softmax(-1)[scored].gather(-1, targets[scored][:, None])


def make_small(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return (
        LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=257, use_cache=False)).to(dtype).eval().requires_grad_(False)
    )


load_text = functools.cache(load_inputs)


def make_preference_inputs(config, *, number=24):
    """Returns inputs of a config, with pairs instead of its data. The reference is not computed yet."""
    inputs = load_text(replace(config, objective=ObjectiveConfig()))
    train, validation, test = (make_pairs(name, number=number, seed=seed) for seed, name in enumerate(SPLITS))
    kind = {"dpo": Dpo, "orpo": Orpo}[config.objective.name]
    objective = kind(by_chunk=True, settings=config.objective)
    metric = replace(inputs.splits.score_metric, name="preference_accuracy", direction="maximize")
    splits = DataSplits(train=train, validation=validation, test=lambda: test, score_metric=metric, objective=objective)
    return replace(inputs, splits=splits)


SPLITS = ("train", "validation", "test")
