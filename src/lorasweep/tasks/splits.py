"""The splits of a data set, with the objective that learns from them and the metric that scores a run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lorasweep.config.components import find_class, instantiate
from lorasweep.config.data import DataSettings, MetricComponent, ModelKind, ScoreMetric
from lorasweep.config.objective import ObjectiveComponent, ObjectiveConfig
from lorasweep.data.batching import choose_part
from lorasweep.data.rows import Rows, Splits
from lorasweep.data.source import DataSource
from lorasweep.errors import ConfigError
from lorasweep.models.load import BaseModel
from lorasweep.objectives.objective import Objective, build_own_metric
from lorasweep.tasks.task import find_task


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSplits(Splits):
    """The tokenised splits of a data set, and their objective."""

    train: Rows
    validation: Rows
    test: Callable[[], Rows]
    objective: Objective
    has_reference: bool = False
    """Whether the splits have the numbers of `Objective.compute_reference`, the test split at its first use."""

    def describe(self, split: Any) -> dict[str, Any]:
        """Returns the entry of a scored split in a run record: with `constant_answer` if it has labels."""
        facts: dict[str, Any] = split.describe()
        scores = self.score_constant_answer(split)
        return facts | ({"constant_answer": scores} if scores else {})

    def score_constant_answer(self, split: Any, *, fraction: float = 1.0) -> dict[str, float]:
        scores = self.objective.score_constant(self.train, split, choose_part(len(split), fraction))
        values = {} if scores is None else self.objective.compute(scores)
        return {name: float(value) for name, value in values.items()}


def check_model_kind(config: DataSettings, kind: ModelKind) -> None:
    """Raises ConfigError if a model of this kind can't learn from the data."""
    if kind != (wanted := config.model_kind):
        raise ConfigError(
            f"`model.kind` must be {wanted} for `data={config.name}`, but got {kind!r}. Use `model={wanted}`, or "
            "other data."
        )


def build_data_splits(
    config: DataSettings,
    *,
    source: DataSource,
    base: BaseModel,
    objective: ObjectiveConfig | ObjectiveComponent | None = None,
) -> DataSplits:
    """Returns the splits for a base model, with their objective, or with that of the task if it is None.

    The test split is read and tokenised at its first use. Raises ConfigError if the model can't learn from the data, a
    split has nothing to predict, or the objective can't be created or does not have the metric.
    """
    check_model_kind(config, base.kind)
    build = functools.partial(find_task(config).build_rows, config=config, source=source, tokenizer=base.tokenizer)
    train, validation = build(source.train), build(source.validation)
    chosen = build_objective(objective or ObjectiveConfig(), data=config, source=source, model=base.model)
    chosen = chosen.for_split(validation)
    if isinstance(config.metric, MetricComponent):
        own_metric = build_own_metric(config.metric)
        chosen, score_metric = replace(chosen, own_metric=own_metric), own_metric.score
    elif config.metric in chosen.metrics:
        score_metric = ScoreMetric(name=config.metric, direction=chosen.metrics[config.metric])
    elif config.metric == "auto" or isinstance(objective, ObjectiveComponent):  # `data.metric` is one of the task's own
        name, direction = next(iter(chosen.metrics.items()))
        score_metric = ScoreMetric(name=name, direction=direction)
    else:
        raise ConfigError(
            f"`data.metric` must be one of auto, {', '.join(chosen.metrics)} for these examples, but got "
            f"{config.metric!r}."
        )
    return DataSplits(
        train=train,
        validation=validation,
        test=functools.cache(lambda: build(source.test())),
        score_metric=score_metric,
        objective=chosen,
        notes=(*source.notes, *train.notes, *validation.notes, *chosen.notes),
    )


def build_objective(
    config: ObjectiveConfig | ObjectiveComponent, *, data: DataSettings, source: DataSource, model: nn.Module
) -> Objective:
    """Creates the objective of settings, which is one of the task or a user's class. Raises ConfigError if it can't."""
    if isinstance(config, ObjectiveComponent):
        expected: type[Objective] = Objective  # type: ignore[type-abstract]
        facts = find_class(config.target, key="objective", expected=expected).find_facts(source, model)
        return replace(instantiate(config, key="objective", expected=expected, **facts), settings=config)
    known = find_task(data).list_objectives(source)
    fitting = [kind for kind in known if type(config) in (ObjectiveConfig, kind.settings_type)]
    if not fitting:
        names = ", ".join(kind.settings_type().name for kind in known)
        raise ConfigError(
            f"`objective` must be one of {names} for `data={data.name}`, but got {config.name!r}. Remove it, or use "
            "other data."
        )
    kind = fitting[0]
    settings = config if isinstance(config, kind.settings_type) else kind.settings_type()
    return kind(settings=settings, **kind.find_facts(source, model))
