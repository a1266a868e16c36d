"""Settings of pairs of answers, and of the objectives that learn from them."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from lorasweep.config.build import PositiveFloat
from lorasweep.config.objective import ObjectiveConfig
from lorasweep.tasks.chat.settings import ConversationSettings

PreferenceMetric = Literal["auto", "preference_accuracy", "reward_margin", "loss"]
"""Scores of pairs of answers. `auto`: the accuracy, which is 0.5 for the base under DPO."""


@dataclass(frozen=True, kw_only=True)
class PreferencesConfig(ConversationSettings):
    """Pairs of answers to one prompt, of which one was preferred. The last answer of each conversation is scored."""

    task_path = "lorasweep.tasks.preferences.task.TASK"
    loss_metrics = get_args(PreferenceMetric)

    name: Literal["preferences"]
    prompt: str | None
    """Column of the prompt, a text or a list of messages; null finds it by its usual names. Without such a column, the
    prompt is what both answers begin with."""
    chosen: str
    """Column of the preferred answer: a text, a message, or a list of messages."""
    rejected: str
    """Column of the other answer, in the same form."""
    metric: PreferenceMetric
    """Metric of the pairs that is the run's score. `auto`: the accuracy."""


@dataclass(frozen=True, kw_only=True)
class DpoConfig(ObjectiveConfig):
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290), which compares with the frozen base."""

    slot_keys = ("beta",)

    name: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1
    """β, the factor of a reward. The authors use 0.1 unless they say otherwise (appendix B)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability ε that the answers of a pair are swapped, 0 <= ε < 0.5 (conservative DPO, Mitchell 2023)."""


@dataclass(frozen=True, kw_only=True)
class OrpoConfig(ObjectiveConfig):
    """Odds ratio preference optimization (Hong et al. 2024, arXiv 2403.07691), which needs no reference."""

    slot_keys = ("beta",)

    name: Literal["orpo"] = "orpo"
    beta: PositiveFloat = 0.1
    """The paper's λ, the weight of the odds ratio beside the loss of the chosen answer."""
