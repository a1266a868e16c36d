"""The splits of a data set, with the objective that learns from them and the metric that scores a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lorasweep.config.build import convert
from lorasweep.config.components import Component, find_class, instantiate
from lorasweep.config.data import DataConfig, MetricComponent, ScoreMetric
from lorasweep.config.run import ObjectiveConfig
from lorasweep.data.batching import choose_part
from lorasweep.data.build_splits import build_splits
from lorasweep.data.source import DataKind, DataSource
from lorasweep.data.split import Split, SplitFacts, Splits
from lorasweep.errors import ConfigError
from lorasweep.models.load import BaseModel
from lorasweep.objectives.labels import Classification, Regression
from lorasweep.objectives.next_tokens import NextTokens
from lorasweep.objectives.objective import Objective, build_own_metric
from lorasweep.objectives.preferences import Preferences
from lorasweep.wording import join_words

OBJECTIVES: Mapping[DataKind, type[Objective]] = {
    "documents": NextTokens,
    "conversations": NextTokens,
    "single_label": Classification,
    "regression": Regression,
    "preferences": Preferences,
}
"""The objective of each kind of data, unless `objective._target_` names another one."""
DATA_OBJECTIVE = ObjectiveConfig()
"""The settings of the objective of the data's kind."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSplits(Splits):
    """The tokenised splits of a data set, and their objective."""

    train: Split
    validation: Split
    test: Callable[[], Split]
    objective: Objective
    has_reference: bool = False
    """Whether the splits have the numbers of `Objective.compute_reference`, the test split at its first use."""

    def describe(self, split: SplitFacts) -> dict[str, Any]:
        """Returns the entry of a scored split in a run record: with `constant_answer` if it has labels."""
        scores = self.score_constant_answer(split)
        return split.describe() | ({"constant_answer": scores} if scores else {})

    def score_constant_answer(self, split: SplitFacts, *, fraction: float = 1.0) -> dict[str, float]:
        scores = self.objective.score_constant(self.train, split, choose_part(len(split), fraction))
        values = {} if scores is None else self.objective.compute(scores)
        return {name: float(value) for name, value in values.items()}


def build_data_splits(
    config: DataConfig, *, source: DataSource, base: BaseModel, objective: ObjectiveConfig = DATA_OBJECTIVE
) -> DataSplits:
    """Returns the splits for a base model, with their objective. The test split is tokenised at its first use.

    Raises ConfigError as `build_splits`, or if the objective can't be created or does not have the metric.
    """
    train, validation, test, notes = build_splits(config, source=source, tokenizer=base.tokenizer, model_kind=base.kind)
    chosen = build_objective(objective, source=source, model=base.model).for_split(validation)
    if isinstance(config.metric, MetricComponent):
        own_metric = build_own_metric(config.metric)
        chosen, score_metric = replace(chosen, own_metric=own_metric), own_metric.score
    elif config.metric in chosen.metrics:
        score_metric = ScoreMetric(name=config.metric, direction=chosen.metrics[config.metric])
    elif config.metric == "auto" or objective.target is not None:  # `data.metric` names one of the data's own objective
        name, direction = next(iter(chosen.metrics.items()))
        score_metric = ScoreMetric(name=name, direction=direction)
    else:
        raise ConfigError(
            f"`data.metric` must be one of auto, {', '.join(chosen.metrics)} for data of the kind {source.kind}, but "
            f"got {config.metric!r}."
        )
    splits = DataSplits(train=train, validation=validation, test=test, score_metric=score_metric, objective=chosen)
    if scores := splits.score_constant_answer(validation):
        values = [f"{name} {value:.4f}" for name, value in scores.items() if name != "loss"]
        answer = chosen.describe_constant(train)
        notes = (*notes, f"Always answering {answer}, has {join_words(values)} on validation.")
    return replace(splits, notes=(*notes, *chosen.notes))


def build_objective(config: ObjectiveConfig, *, source: DataSource, model: nn.Module) -> Objective:
    """Creates the objective of `objective._target_`, or that of the data's kind. Raises ConfigError if it can't be."""
    own = OBJECTIVES[source.kind]
    if config.target is None and not config.arguments:
        return own(**own.find_facts(source, model))
    target = config.target or f"{own.__module__}.{own.__qualname__}"
    expected: type[Objective] = Objective  # type: ignore[type-abstract]
    chosen = find_class(target, key="objective", expected=expected)
    fitting = [kind for kind, objective in OBJECTIVES.items() if issubclass(chosen, objective)]
    if fitting and source.kind not in fitting:
        raise ConfigError(
            f"`objective._target_` must be an objective for {source.kind}, but {target!r} is one for "
            f"{join_words(fitting)}. Use other data, or remove `objective._target_`."
        )
    arguments = {name: value for name, value in config.arguments.items() if name not in chosen.slot_settings}
    component, facts = Component(target=target, arguments=arguments), chosen.find_facts(source, model)
    return instantiate(component, key="objective", expected=expected, **facts)


def list_objectives(config: ObjectiveConfig) -> list[type[Objective]]:
    """Returns the class of `objective._target_`, or without it those of all kinds of data."""
    if config.target is None:
        return list(dict.fromkeys(OBJECTIVES.values()))
    return [find_class(config.target, key="objective", expected=Objective)]  # type: ignore[type-abstract]


def list_slot_settings(config: ObjectiveConfig) -> list[str]:
    """Returns the names of the settings of an objective that may differ between the slots of a pack."""
    return [name for each in list_objectives(config) for name in each.slot_settings]


def read_slot_settings(config: ObjectiveConfig, objective: type[Objective]) -> dict[str, float]:
    """Returns the values of `Objective.slot_settings` in a run. Raises ConfigError if one is missing or wrong."""
    given = {**objective.slot_defaults, **config.arguments}
    return {
        name: convert(kind, given.get(name), key=f"objective.{name}") for name, kind in objective.slot_settings.items()
    }


def drop_slot_settings(config: ObjectiveConfig) -> ObjectiveConfig:
    """Returns the settings that all slots of a pack share."""
    dropped = list_slot_settings(config)
    return replace(config, arguments={name: x for name, x in config.arguments.items() if name not in dropped})
