"""A task as somebody would add it: answers with a vote, true or false. Liked answers become probable, others not."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import pydantic.dataclasses
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import PreTrainedTokenizerBase

from lorasweep.config.data import MetricComponent, RowSettings
from lorasweep.data.reading.tables import choose_columns, open_tables, parse_rows, require_text
from lorasweep.data.rows import Rows
from lorasweep.data.source import DataSource, Examples, build_source, content_key
from lorasweep.data.tokenise import Columns, cache_key, map_cached, tokenise_plain
from lorasweep.objectives.next_tokens import TokenObjective
from lorasweep.objectives.objective import ExampleScores
from lorasweep.objectives.scored_tokens import score_tokens
from lorasweep.tasks.task import Task


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class VotesConfig(RowSettings):
    """Answers, each with a vote: true or false."""

    task_path = "tests.tasks.votes.TASK"

    name: Literal["votes"]
    answer: str = "answer"
    """Column of the answer."""
    liked: str = "liked"
    """Column of the vote."""
    metric: Literal["auto", "vote_accuracy", "loss"] | MetricComponent = "auto"


class Vote(NamedTuple):
    answer: str
    liked: bool
    group: str | None = None

    def list_texts(self) -> Iterator[str]:
        yield from (self.answer, str(self.liked))


def read_votes(config: VotesConfig) -> DataSource:
    wanted = ("answer", config.answer), ("liked", config.liked)
    tables = open_tables(config, functools.partial(choose_columns, wanted))

    def parse(answer: object, liked: object, group: str | None) -> Vote:
        if not isinstance(liked, bool):
            raise ValueError(f"must have true or false as vote, but has {liked!r}")
        return Vote(require_text(answer), liked, group)

    return build_source(
        parse_rows(tables.pop("train"), parse),
        lambda split: parse_rows(tables.pop(split), parse),
        missing=config.choose_split_percents(),
        key=lambda vote: content_key([vote.answer]),
        describe=lambda train, _: [f"{sum(vote.liked for vote in train)} answers of train are liked."],
        max_examples=config.max_examples,
    )


def build_votes(
    examples: Examples[Vote], *, config: VotesConfig, tokenizer: PreTrainedTokenizerBase, source: DataSource
) -> Rows:
    def tokenise(votes: Sequence[Vote]) -> Columns:
        ids = [row[: config.max_length + 1] for row in tokenise_plain([vote.answer for vote in votes], tokenizer)]
        return {"input_ids": [row[:-1] for row in ids], "targets": [row[1:] for row in ids]}

    return Rows(
        name=examples.name,
        fingerprint=examples.fingerprint,
        notes=examples.notes,
        sequences=map_cached(examples, tokenise, key=cache_key(tokenizer, examples.fingerprint, form="votes")),
        columns={"liked": torch.tensor([vote.liked for vote in examples.items])},
        weights=torch.ones(len(examples)),
        facts={"examples": len(examples), "fingerprint": examples.fingerprint},
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Votes(TokenObjective):
    """The loss of a vote s = ±1 is -log σ(s · (3 + the mean log probability of the answer's tokens))."""

    metrics: ClassVar = {"vote_accuracy": "maximize", "loss": "minimize"}

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return self.score(model, batch).loss

    def score(self, model: nn.Module, batch: dict[str, Tensor]) -> ExampleScores:
        losses = score_tokens(model, batch, by_chunk=self.by_chunk)
        margins = 3 - losses.sum(-1) / (batch["targets"] >= 0).sum(-1)
        votes = 2.0 * batch["liked"] - 1
        hits = (margins * votes > 0).double()
        return ExampleScores(loss=softplus(-votes * margins), items=torch.ones_like(margins), prediction=hits)

    def compute_metrics(self, scores: ExampleScores) -> dict[str, Tensor]:
        return {"vote_accuracy": scores.prediction.mean(), "loss": scores.loss.double().mean()}

    def per_example(self, metric: str, scores: ExampleScores) -> tuple[Tensor, Tensor] | None:
        return (scores.prediction if metric == "vote_accuracy" else scores.loss.double()), scores.items


TASK = Task(read=read_votes, build_rows=build_votes, list_objectives=lambda source: [Votes])
