"""Generates answers to examples of a split greedily, as a server does, and scores each of them."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from lorasweep.config.components import find_function
from lorasweep.config.data import AnswersConfig, AnswerScore
from lorasweep.config.run import RunConfig
from lorasweep.data.batching import batch_by_length
from lorasweep.data.rows import Answers, Rows, SplitFacts
from lorasweep.data.source import choose_evenly
from lorasweep.disk import csv_text
from lorasweep.errors import ConfigError, describe_error
from lorasweep.models.pretrained import quiet_transformers
from lorasweep.record import is_number
from lorasweep.training.environment import get_device
from lorasweep.training.run_inputs import RunInputs
from lorasweep.wording import shorten

MAX_PROMPT_CHARACTERS = 10_000
"""Maximum number of characters of a prompt in the file of answers, which is for people to read. The end is kept."""
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
Score = Callable[[str, str, Mapping[str, Any] | None], float]
"""Returns the score of an answer, from the answer, the reference and the example's row of the table."""


@dataclass(frozen=True, kw_only=True)
class ScoredAnswers:
    """Answers of a model to examples of a split."""

    facts: dict[str, Any]
    """The entry of `RunRecord.answers`."""
    values: dict[str, float] = field(default_factory=dict)
    """The mean score by its name; empty if there is a problem."""
    lines: str | None = None
    """The content of `ANSWERS_FILE`; None if no answers were generated."""


def check_answers(config: RunConfig, split: SplitFacts, *, inputs: RunInputs) -> None:
    """Raises ConfigError if the score of a reference, as an answer, is no number, or if no example can be answered.

    A user's function is called for one example, because a call may take long.
    """
    settings, split, answers, chosen = _choose_examples(config, split)
    score = build_score(settings)
    for index in chosen[:1] if isinstance(settings.score, AnswerScore) else chosen:
        reference = _decode(split.split_last_answer(index)[1][:-1], inputs)
        score(reference, reference, answers.table_rows[index])


def score_answers(model: nn.Module, split: SplitFacts, *, config: RunConfig, inputs: RunInputs) -> ScoredAnswers:
    """Answers examples of a split and scores the answers. Afterwards the model is in evaluation mode on its device.

    An error, such as one of the user's function, becomes the `problem` of the result, so that the run keeps its weights
    and its other scores.
    """
    try:
        settings, split, known, chosen = _choose_examples(config, split)
        prompts, references = zip(*map(split.split_last_answer, chosen), strict=True)
        answers, num_cut_off = _generate(
            model, prompts, references, config=config, limit=settings.max_new_tokens, inputs=inputs
        )
    except Exception as error:  # of the model's code, or because memory ran out
        return ScoredAnswers(facts={"problem": f"No answers were generated: {describe_error(error)}."})
    left_out = int((known.starts == 0).sum())
    facts: dict[str, Any] = {"examples": len(chosen), "cut_off": num_cut_off, "left_out": left_out}
    texts = [_decode(ids, inputs) for ids in answers]
    wanted = [_decode(ids[:-1], inputs) for ids in references]  # without the end-of-turn token
    scores: Sequence[float | None] = [None] * len(chosen)
    values = {}
    try:
        score = build_score(settings)
        found = [
            score(text, reference, known.table_rows[index])
            for text, reference, index in zip(texts, wanted, chosen, strict=True)
        ]
        scores, values = found, {settings.metric.name: math.fsum(found) / len(found)}
    except ConfigError as error:
        facts["problem"] = str(error)
    shown = [str(inputs.base.tokenizer.decode(ids))[-MAX_PROMPT_CHARACTERS:] for ids in prompts]
    groups = [split.groups[index] for index in chosen]
    header = "row", "score", "weight", "group", "prompt", "reference", "answer"
    lines = csv_text(header, zip(chosen, scores, [1] * len(chosen), groups, shown, wanted, texts, strict=True))
    return ScoredAnswers(facts=facts, values=values, lines=lines)


def _generate(
    model: Any,
    prompts: Sequence[Tensor],
    references: Sequence[Tensor],
    *,
    config: RunConfig,
    limit: int,
    inputs: RunInputs,
) -> tuple[list[Tensor], int]:
    """Returns the tokens of each answer without the end-of-turn token, and the number of answers that were cut off."""
    tokenizer, device = inputs.base.tokenizer, get_device(config.trainer)
    # An answer ends with the end-of-turn token that the references end with, or where the model's makers say.
    own = model.generation_config.eos_token_id
    ends = {*(int(ids[-1]) for ids in references), tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    ends -= {None}
    pad = min(ends) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # Settings that are not given here, such as a penalty for repetitions, would come from the model's own.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=limit, eos_token_id=sorted(ends), pad_token_id=pad, use_cache=True
    )
    lengths = torch.tensor([len(prompt) + limit for prompt in prompts])
    answers: dict[int, Tensor] = {}
    num_cut_off = 0

    model.to(device).eval()
    for batch in batch_by_length(lengths, budget=config.trainer.eval_batch_size * int(lengths.max())):
        chosen = [prompts[index] for index in batch]
        ids = pad_sequence(chosen, batch_first=True, padding_value=pad, padding_side="left").to(device)
        mask = pad_sequence([torch.ones_like(ids) for ids in chosen], batch_first=True, padding_side="left").to(device)
        with torch.no_grad(), inputs.autocast(config), quiet_transformers():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=model.generation_config,
            )
        for index, row in zip(batch, output[:, ids.shape[1] :].cpu(), strict=True):
            end = next((place for place, token in enumerate(row.tolist()) if token in ends), None)
            answers[index], num_cut_off = row[:end], num_cut_off + (end is None)
    return [answers[index] for index in range(len(prompts))], num_cut_off


def build_score(settings: AnswersConfig) -> Score:
    """Returns the score as a function that raises ConfigError if it fails or returns no finite number.

    Raises ConfigError if the user's function can't be imported.
    """
    own, name = settings.score, settings.metric.name
    score = {"exact_match": match_exactly, "last_number": match_last_number}.get(name)
    if isinstance(own, AnswerScore):
        score = functools.partial(find_function(own.target, key="data.answers.score"), **own.arguments)
    assert score is not None

    def compute(answer: str, reference: str, example: Mapping[str, Any] | None) -> float:
        try:
            value = score(answer, reference, example)
            result = f"returned {shorten(value)}"
            number = math.nan if isinstance(value, str) else float(value)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the function is the user's, and may even call `sys.exit`
            result, number = f"raised {describe_error(error)}", math.nan
        if is_number(number):
            return number
        raise ConfigError(
            f"`data.answers.score` must give a finite number, but `{name}` {result} for the answer {shorten(answer)}, "
            f"the reference {shorten(reference)} and the row {shorten(example, 100)}. Correct the function or the data."
        )

    return compute


def match_exactly(answer: str, reference: str, example: Any = None) -> float:
    """Returns 1 if both texts are equal, apart from the amount of white space; else 0."""
    return float(answer.split() == reference.split())


def match_last_number(answer: str, reference: str, example: Any = None) -> float:
    """Returns 1 if the last number of the answer is that of the reference, else 0. Commas in numbers do not count.

    Raises ValueError if the reference has no number.
    """
    found, wanted = ([float(n.replace(",", "")) for n in NUMBER.findall(text)][-1:] for text in (answer, reference))
    if not wanted:
        raise ValueError("the reference has no number")
    return float(found == wanted)


def _choose_examples(config: RunConfig, split: SplitFacts) -> tuple[AnswersConfig, Rows, Answers, list[int]]:
    """Returns the settings, the split, its answers, and the indices of the examples to answer, spread over groups."""
    settings = config.data.generated
    assert settings is not None
    assert isinstance(split, Rows)
    answers = split.answers
    assert answers is not None
    usable = answers.starts.nonzero().flatten().tolist()
    if not usable:
        raise ConfigError(
            f"`data.max_length` must fit the prompt and the answer of an example of {split.name}, which the model has "
            f"to answer, but got {config.data.max_tokens}. Raise it."
        )
    places = {group: place for place, group in enumerate(dict.fromkeys(split.groups))}
    usable.sort(key=lambda index: places[split.groups[index]])
    if (limit := settings.max_examples) is not None and limit < len(usable):
        usable = choose_evenly(usable, limit)
    return settings, split, answers, sorted(usable)


def _decode(ids: Tensor, inputs: RunInputs) -> str:
    """Returns the text of an answer without its reasoning and special tokens."""
    text = str(inputs.base.tokenizer.decode(ids, skip_special_tokens=True))
    return text.rpartition("</think>")[2].strip()
