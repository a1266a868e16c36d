"""Settings of pairs for embedding models, and of the objective that learns from them."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from lorasweep.config.build import PositiveFloat
from lorasweep.config.data import MetricComponent, RowSettings
from lorasweep.config.objective import ObjectiveConfig

RankingMetric = Literal["auto", "ndcg_at_10", "mrr_at_10", "accuracy_at_1"]
"""Scores of a ranking of passages. `auto`: NDCG@10."""
Pooling = Literal["mean", "cls", "last", "max"]
"""How the embedding of a text follows from the last hidden states of its tokens."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingsConfig(RowSettings):
    """Pairs of an anchor and a positive, a passage that belongs to it, perhaps with negatives that do not."""

    task_path = "lorasweep.tasks.embeddings.task.TASK"
    model_kind = "embedder"
    needs_whole_batch = True

    name: Literal["embeddings"]
    anchor: str | None
    """Column of the anchor, such as a question; null finds it by its usual names, or takes the first column."""
    positive: str | None
    """Column of the passage that belongs to the anchor; null finds it by its usual names, or takes the second one."""
    negatives: tuple[str, ...] | None
    """Columns of passages that do not belong to the anchor; null takes `negative`, `negative_1` and so on."""
    anchor_prompt: str
    """Text before each anchor, such as `query: `."""
    passage_prompt: str
    """Text before each positive and negative."""
    distractors: bool
    """Whether validation and test anchors also have to find their positives among all training passages."""
    metric: RankingMetric | MetricComponent
    """Metric of the rankings that is the run's score. `auto`: NDCG@10."""


@dataclass(frozen=True, kw_only=True)
class InBatchConfig(ObjectiveConfig):
    """In-batch negatives (`MultipleNegativesRankingLoss` of sentence-transformers)."""

    slot_keys = ("scale",)

    name: Literal["in_batch_negatives"] = "in_batch_negatives"
    scale: PositiveFloat | None = None
    """Factor of the similarities, the inverse of a temperature. Null is 20 for cosines and 1 for dot products, as
    sentence-transformers advises."""
    pooling: Literal["auto", Pooling] = "auto"
    """Pooling of the hidden states. `auto` reads the files of sentence-transformers; `mean` without such files."""
