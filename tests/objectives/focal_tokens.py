"""An objective as a user writes it: the focal loss of next tokens (arXiv 1708.02002)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lorasweep.data.rows import IGNORED, Batch
from lorasweep.objectives.objective import ExampleScores, Objective
from lorasweep.objectives.scored_tokens import compute_logits


@dataclass(frozen=True, kw_only=True, eq=False)
class FocalTokens(Objective):
    """Tokens that the model predicts well count less: loss = -(1 - p)^γ · ln p."""

    metrics: ClassVar = {"token_accuracy": "maximize", "focal_loss": "minimize"}
    gamma: float

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.score(model, batch).loss

    def score(self, model: nn.Module, batch: Batch) -> ExampleScores:
        targets = batch["targets"]
        logits, is_scored = compute_logits(model, batch), targets != IGNORED
        log_p = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        losses = -((1 - log_p.exp()) ** self.gamma) * log_p * is_scored
        hits = (logits.argmax(-1) == targets) & is_scored
        return ExampleScores(loss=losses.sum(-1), items=is_scored.sum(-1), prediction=hits.sum(-1))

    def compute_metrics(self, scores: ExampleScores) -> dict[str, Tensor]:
        total = scores.items.double().sum()
        return {"token_accuracy": scores.prediction.sum() / total, "focal_loss": scores.loss.double().sum() / total}

    def per_example(self, metric: str, scores: ExampleScores) -> tuple[Tensor, Tensor] | None:
        sums = scores.prediction if metric == "token_accuracy" else scores.loss
        return sums.double() / scores.items, scores.items
