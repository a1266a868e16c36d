"""In-batch negatives: an anchor must be closer to its positive than to the passages of the other examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from torchmetrics.retrieval.base import RetrievalMetric

from lorasweep.config.data import Direction
from lorasweep.config.objective import ObjectiveComponent, ObjectiveConfig
from lorasweep.data.rows import Batch, Rows, select_model_inputs
from lorasweep.data.source import DataSource
from lorasweep.objectives.objective import ExampleScores, Objective
from lorasweep.tasks.embeddings.pooling import pool, read_embedder_files
from lorasweep.tasks.embeddings.settings import InBatchConfig, Pooling

COSINE_SCALE = 20.0
"""Factor of cosines if `objective.scale` is null, as in sentence-transformers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class InBatchNegatives(Objective):
    """The loss of an anchor is the cross-entropy of its positive among all passages of its slot's batch.

    The logits are similarities times `scale` (Henderson et al. 2017, arXiv 1705.00652): cosines, or dot products if the
    model's files say so. Passages of other examples that are known to belong to the anchor are left out: its positive
    again, its other positives, and its own text.

    Metrics are means over the different anchors of an evaluation, whose passages are all ranked by similarity:

    - `ndcg_at_10`: the discounted gain of the first ten passages, divided by the best possible one.
    - `mrr_at_10`: 1 / place of the first passage that belongs to the anchor; 0 if it is not among ten.
    - `accuracy_at_1`: share of the anchors whose first passage belongs to them.

    An own metric gets the similarities (anchors, passages), and 1 for each passage that belongs to the anchor, else 0.
    Metrics of `torchmetrics.retrieval` also get the anchor of each similarity.
    """

    settings_type = InBatchConfig
    metrics: ClassVar[Mapping[str, Direction]] = dict.fromkeys(("ndcg_at_10", "mrr_at_10", "accuracy_at_1"), "maximize")

    settings: InBatchConfig = field(default_factory=InBatchConfig)
    found_pooling: Pooling | None = None
    """The pooling in the model's own files."""
    is_cosine: bool = True
    """Whether embeddings have length 1, so that they are compared by cosines."""
    num_texts: int = 2
    """Number of rows of a training example."""
    num_scored_texts: int = 2
    """Number of rows of an example of the split that is scored. `for_split` sets it."""

    @classmethod
    def find_facts(cls, source: DataSource, model: nn.Module) -> dict[str, Any]:
        folder = getattr(model, "name_or_path", "")
        found = read_embedder_files(Path(folder)) if folder else None
        return {**(found._asdict() if found else {}), "num_texts": 1 + len(source.train.items[0].passages)}

    def get_slot_numbers(self, config: ObjectiveConfig | ObjectiveComponent) -> Mapping[str, float]:
        numbers = super().get_slot_numbers(config)
        return {**numbers, "scale": numbers.get("scale") or (COSINE_SCALE if self.is_cosine else 1.0)}

    def for_split(self, split: Rows) -> InBatchNegatives:
        return replace(self, num_scored_texts=len(split.row_names))

    @property
    def pooling(self) -> Pooling:
        named: Pooling | Literal["auto"] = getattr(self.settings, "pooling", "auto")  # a user's own class may lack it
        return named if named != "auto" else self.found_pooling or "mean"

    def embed(self, model: nn.Module, batch: Batch) -> Float[Tensor, "rows size"]:
        """Returns the embedding of each row, in fp32 or wider."""
        hidden = model(**select_model_inputs(batch)).last_hidden_state
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        vectors = pool(hidden, batch.get("attention_mask"), self.pooling)
        return normalize(vectors, dim=-1) if self.is_cosine else vectors

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        slots = len(batch["step_weight"])
        shape = slots, len(batch["text_id"]) // (slots * self.num_texts), self.num_texts  # (slots, examples, texts)
        vectors, ids = self.embed(model, batch).view(*shape, -1), batch["text_id"].view(shape)
        # the positives of all examples, then their first negatives, and so on: (slots, passages, size)
        passages, passage_ids = (values[:, :, 1:].transpose(1, 2).flatten(1, 2) for values in (vectors, ids))
        logits = (vectors[:, :, 0] @ passages.mT) * batch["scale"].view(shape)[:, :, :1]
        anchor_ids, own = ids[:, :, :1], torch.arange(shape[1], device=logits.device)
        # whether a passage is the positive of an example with the same anchor; counted by a product
        has_anchor, is_positive = anchor_ids == anchor_ids.mT, passage_ids[:, None] == ids[:, :, 1:2]
        is_known = (has_anchor.float() @ is_positive.float() > 0) | (passage_ids[:, None] == anchor_ids)
        is_known[:, own, own] = False
        logits = logits.masked_fill(is_known, -torch.inf)
        return cross_entropy(logits.flatten(0, 1), own.repeat(slots), reduction="none")

    def score(self, model: nn.Module, batch: Batch) -> ExampleScores:
        """Returns the embeddings of each example's texts as `details`, with the texts' ids as `target`.

        Metrics need the passages of all examples, so `loss` is 1 - the cosine of anchor and positive.
        """
        ids = batch["text_id"].view(-1, self.num_scored_texts)
        vectors = self.embed(model, batch).view(*ids.shape, -1)
        loss = 1 - cosine_similarity(vectors[:, 0], vectors[:, 1], dim=-1)
        return ExampleScores(loss=loss, items=torch.ones_like(loss), target=ids, details=vectors.flatten(1))

    def compute_metrics(self, scores: ExampleScores) -> dict[str, Tensor]:
        return {name: values.mean() for name, values in rank_passages(scores)[0].items()}

    def compute(self, scores: ExampleScores) -> dict[str, Tensor]:
        values = self.compute_metrics(scores)
        if self.own_metric is not None:
            found, relevant, _ = compare_texts(scores)
            more = {}
            if isinstance(self.own_metric.metric, RetrievalMetric):
                more["indexes"] = torch.arange(len(found), device=found.device)[:, None].expand_as(found)
            values[self.own_metric.score.name] = self.own_metric.compute(found, relevant.long(), **more)
        return values

    def per_example(self, metric: str, scores: ExampleScores) -> tuple[Tensor, Tensor] | None:
        """Returns the metric of each example's anchor. The weights of the examples of an anchor add up to 1."""
        if metric not in self.metrics:
            return None
        by_anchor, anchors = rank_passages(scores)
        return by_anchor[metric][anchors], 1 / anchors.bincount().double()[anchors]


def rank_passages(scores: ExampleScores) -> tuple[dict[str, Float[Tensor, " anchors"]], Int[Tensor, " examples"]]:
    """Returns each metric of each different anchor, and the anchor of each example."""
    similarities, relevant, anchor_of_example = compare_texts(scores)
    best = similarities.topk(min(10, similarities.shape[1]), dim=1).indices
    hits, places = relevant.gather(1, best).double(), torch.arange(1, best.shape[1] + 1, device=best.device)
    gains = 1 / (places + 1).double().log2()
    ideal = gains.cumsum(0)[relevant.sum(1).clamp(max=len(gains)) - 1]
    values = (hits * gains).sum(1) / ideal, (hits / places).amax(1), hits[:, 0]
    return dict(zip(InBatchNegatives.metrics, values, strict=True)), anchor_of_example


def compare_texts(
    scores: ExampleScores,
) -> tuple[Float[Tensor, "anchors passages"], Bool[Tensor, "anchors passages"], Int[Tensor, " examples"]]:
    """Returns similarities of the different anchors and passages, whether they belong together, and examples' anchors.

    A passage that is the anchor's own text has the similarity -inf.
    """
    assert scores.target is not None
    assert scores.details is not None
    ids, vectors = scores.target, scores.details.view(*scores.target.shape, -1)
    anchors, anchor_ids, anchor_of_example = _keep_different(vectors[:, 0], ids[:, 0])
    passages, passage_ids, places = _keep_different(vectors[:, 1:].flatten(0, 1), ids[:, 1:].flatten())
    similarities = (anchors @ passages.T).masked_fill(anchor_ids[:, None] == passage_ids, -torch.inf)
    relevant = torch.zeros_like(similarities, dtype=torch.bool)
    relevant[anchor_of_example, places.view(len(ids), -1)[:, 0]] = True
    return similarities, relevant, anchor_of_example


def _keep_different(vectors: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the first vector of each different id, the ids in ascending order, and the place of each vector."""
    different, places = torch.unique(ids, return_inverse=True)
    numbers = torch.arange(len(ids), device=ids.device)
    first = numbers.new_full((len(different),), len(ids)).scatter_reduce(0, places, numbers, "amin")
    return vectors[first], different, places
