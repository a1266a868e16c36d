"""Pairs of answers for the embedded model, and the inputs of a run that learns which of them are chosen."""

import functools
from dataclasses import replace

import torch

from lorasweep.config.run import ObjectiveConfig
from lorasweep.data.split import IGNORED, CompletionSplit, PreferenceSplit, Ragged
from lorasweep.objectives.data_splits import DataSplits
from lorasweep.objectives.preferences import Preferences
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
    ends = torch.tensor([len(row) for row in tokens]).cumsum(0)
    shared = {"name": name, "fingerprint": f"pairs {seed}"}
    rows = CompletionSplit(
        **shared,
        tokens=Ragged(values=torch.cat(tokens), ends=ends),
        targets=Ragged(values=torch.cat(targets), ends=ends),
        pad_token=0,
        bytes=number,
        scored_bytes=number,
        answer_starts=torch.ones(2 * number, dtype=torch.int64),
        rows=(None,) * 2 * number,
    )
    return PreferenceSplit(**shared, groups=tuple(map(str, range(number))), completions=rows)


load_text = functools.cache(load_inputs)


def make_preference_inputs(config, *, number=24, **settings):
    """Returns inputs of a config, with pairs instead of its data. The reference is not computed yet."""
    inputs = load_text(replace(config, objective=ObjectiveConfig()))  # the objective of text takes no beta
    train, validation, test = (make_pairs(name, number=number, seed=seed) for seed, name in enumerate(SPLITS))
    objective = Preferences(by_chunk=True, **settings)
    metric = replace(inputs.splits.score_metric, name="preference_accuracy", direction="maximize")
    splits = DataSplits(train=train, validation=validation, test=lambda: test, score_metric=metric, objective=objective)
    return replace(inputs, splits=splits)


SPLITS = ("train", "validation", "test")
