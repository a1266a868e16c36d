"""Settings of conversations: how they become text, and which answers are generated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from datetime import date
from typing import Any, ClassVar, Literal, get_args

from pydantic.dataclasses import dataclass

from lorasweep.config.data import AnswersConfig, RowSettings
from lorasweep.errors import ConfigError
from lorasweep.tasks.text.settings import TextMetric


@dataclass(frozen=True, kw_only=True)
class ConversationSettings(RowSettings):
    """Settings of data whose examples are conversations: how they become text, and which answers are generated."""

    loss_metrics: ClassVar[tuple[str, ...]] = get_args(TextMetric)
    """The metrics that `metric` can name."""

    template: str
    """`model`: the tokenizer's chat template; `plain`: texts with `separator` between them; `auto`: `model` if the
    tokenizer has a template, else `plain`; or a template's file, whose name ends with `.jinja`."""
    template_arguments: Mapping[str, Any] = field(hash=False)
    """Variables of the template by name, such as `{enable_thinking: false}`. Serve the model with the same."""
    template_date: str
    """The day that a template gets as today, as YEAR-MONTH-DAY, so that the data does not change from day to day."""
    separator: str
    """Text between the prompt and the answer of a `plain` template."""
    answers: AnswersConfig
    """Generated answers and their score."""

    @property
    def generated(self) -> AnswersConfig | None:
        return None if self.answers.score is None else self.answers

    @property
    def scored_turns(self) -> Literal["all", "last"]:
        """Answers of a conversation that are scored: all, or only the last."""
        return "last"

    @property
    def template_file(self) -> str | None:
        return self.template if self.template.endswith(".jinja") else None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (name := self.answers.metric.name) in self.loss_metrics:
            raise ConfigError(
                f"`data.answers.score` must have another name than a metric of the loss, but got {name!r}. Rename it."
            )
        if self.template not in ("auto", "model", "plain") and self.template_file is None:
            raise ConfigError(
                f"`data.template` must be auto, model, plain or the name of a .jinja file, but got {self.template!r}."
            )
        try:
            date.fromisoformat(self.template_date)
        except ValueError:
            raise ConfigError(
                f"`data.template_date` must be a day such as 2024-07-26, but got {self.template_date!r}."
            ) from None


@dataclass(frozen=True, kw_only=True)
class ChatConfig(ConversationSettings):
    """Prompts with completions, or conversations. The loss covers only the answers of the assistant."""

    task_path = "lorasweep.tasks.chat.task.TASK"

    name: Literal["chat"]
    prompt: str | None
    """Column of the prompt. If `completion` and `messages` are null too, the columns are found by their usual names."""
    input: str | None
    """Column of a text that follows the prompt on a new line, unless it is empty, as in Alpaca's files."""
    completion: str | None
    """Column of the answer, which the model learns."""
    messages: str | None
    """Column of a list of messages, each with `role` and `content`; instead of `prompt` and `completion`."""
    turns: Literal["all", "last"]
    """Answers of a conversation that are scored: all, or only the last."""
    metric: TextMetric
    """Metric of the answers that is the run's score. Lower is better."""

    @property
    def scored_turns(self) -> Literal["all", "last"]:
        return self.turns

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.messages is not None and (self.prompt, self.completion) != (None, None):
            raise ConfigError(
                f"`data.messages` must be null if `data.prompt` or `data.completion` is set, but got {self.messages!r}."
            )
        if (self.prompt is None) != (self.completion is None):
            raise ConfigError(
                "`data.prompt` and `data.completion` must be set together, but got "
                f"{self.prompt!r} and {self.completion!r}."
            )
        if self.input is not None and self.prompt is None:
            raise ConfigError(f"`data.input` must be null without `data.prompt`, but got {self.input!r}.")
