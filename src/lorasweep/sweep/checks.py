"""Checks a sweep against its base models and data, before anything is written."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from lorasweep.config.data import DataSettings, MetricComponent, RowSettings, ScoreMetric, SplitSettings
from lorasweep.data.rows import Splits
from lorasweep.disk import require_new_folder
from lorasweep.errors import ConfigError
from lorasweep.record import RetainedRow
from lorasweep.sweep.controller.encoding import History
from lorasweep.sweep.controller.proposals import propose
from lorasweep.sweep.definition.arms import Definition
from lorasweep.sweep.definition.packing import check_packing
from lorasweep.sweep.definition.sweep_file import name_in_errors
from lorasweep.sweep.workers.train import check_workers
from lorasweep.training.generation import check_answers
from lorasweep.training.inputs import InputsCache
from lorasweep.training.prepare import check_run
from lorasweep.wording import shorten

MAX_LEFT_OUT_SHARE = 0.5
"""Maximum share of a split's examples that may be left out because they do not fit `data.max_length`."""
MIN_ROWS, MIN_CLASS_ROWS = 30, 3
"""Smallest number of rows of all splits together, and of one class. Less shows nothing about fine-tuning."""


def check_definition(
    definition: Definition, inputs_cache: InputsCache, *, new_folder: str | None = None
) -> ScoreMetric:
    """Checks the workers and every arm, with the settings at the ends of its ranges. Returns the sweep's metric.

    Raises ConfigError if the sweep can't run as asked, or `new_folder` is in use.
    """
    if new_folder is not None:
        remedy = f"To resume a sweep type `lorasweep sweep --resume {new_folder}`."
        require_new_folder(Path(new_folder), key="sweep.output", remedy=remedy)
    check_workers(definition)
    check_packing(definition)
    list_retained(definition, inputs_cache)
    for arm in definition.arms:
        with name_in_errors(f"arm `{arm.name}`"):
            if arm.space:  # raises if the sampler can't search this space
                propose(arm, History(arm, metric=ScoreMetric(name="loss", direction="minimize")), number=0)
            for config in arm.corner_configs:
                inputs = inputs_cache.load(config)
                check_run(config, inputs.base)
                if not definition.sweep_config.confirm.seeds:
                    check_rows(config.data, inputs.splits)
                    continue
                try:
                    test = inputs.splits.test()  # now, because the confirm stage reads it after hours of training
                except ConfigError as error:
                    raise ConfigError(f"{error} Or skip the confirm stage with `confirm.seeds=0`.") from error
                check_rows(config.data, inputs.splits)
                if config.data.generated is not None:
                    check_answers(config, test, inputs=inputs)
    metric = find_metric(definition, inputs_cache)
    list_test_metrics(definition, metric)
    check_same_examples(definition, inputs_cache)
    return metric


def check_rows(config: DataSettings, splits: Splits) -> None:
    """Raises ConfigError if the user's table has too few rows, or too few of a class."""
    if not isinstance(config, RowSettings):
        return
    tests = [splits.test()] if config.test is None else []
    facts = [split.describe() for split in (splits.train, splits.validation, *tests)]
    if (number := sum(one["examples"] + one.get("left_out", 0) for one in facts)) < MIN_ROWS:
        raise ConfigError(
            f"`data.train` must have at least {MIN_ROWS} rows to train, to validate and to test, but has {number}. Add "
            "rows."
        )
    for name, one in zip(("train", "validation", "test"), facts, strict=False):
        lost, total = one.get("left_out", 0), one["examples"] + one.get("left_out", 0)
        if lost > MAX_LEFT_OUT_SHARE * total:
            raise ConfigError(
                f"`data.max_length` must fit at least half of the examples, but leaves out {lost:,} of {total:,} of "
                f"{name}. Raise it."
            )
    counts = Counter[str]()
    for one in facts:
        counts.update(one.get("labels", {}))
    if few := {name: number for name, number in counts.items() if 0 < number < MIN_CLASS_ROWS}:
        column = getattr(config, "label", "")  # often found and not typed
        raise ConfigError(
            f"`data.label={column}` must be a column with at least {MIN_CLASS_ROWS} rows of each class, but "
            f"{shorten(column)} has {shorten(few, 200)}. Add rows, remove these, or name another column."
        )


def check_same_examples(definition: Definition, inputs_cache: InputsCache) -> None:
    """Raises ConfigError if arms are scored on different examples of the user's data."""
    configs = [config for config in definition.corner_configs if isinstance(config.data, SplitSettings)]
    has_test = definition.sweep_config.confirm.seeds != 0
    splits = [inputs_cache.load(config).splits for config in configs]
    scored = {(one.validation.fingerprint, one.test().fingerprint if has_test else "") for one in splits}
    if len(scored) > 1:
        raise ConfigError(
            "`data` must have the same validation and test examples in all arms, because they are compared example by "
            "example, but they differ. Set `data.validation` and `data.test` once for the whole sweep."
        )


def list_test_metrics(definition: Definition, metric: ScoreMetric) -> list[ScoreMetric]:
    """Returns the metrics on test data, first that of the verdicts; empty if no answers are generated.

    `metric` is that of `find_metric`. Raises ConfigError if `confirm.metric` is not measured, or if arms have different
    settings of `data.answers`.
    """
    first, *others = (config.data.generated for config in definition.corner_configs)
    if any(answers != first for answers in others):
        raise ConfigError("`data.answers` must be the same for all arms, because they are compared, but differs.")
    metrics = [metric] if first is None else [metric, first.metric]
    names, chosen = ["auto", *(measured.name for measured in metrics)], definition.sweep_config.confirm.metric
    if chosen not in names:
        raise ConfigError(
            f"`confirm.metric` must be one of {', '.join(names)}, but got {chosen!r}. `data.answers.score` measures "
            "generated answers."
        )
    return sorted(metrics, key=lambda measured: measured.name != chosen) if len(metrics) > 1 else []


def list_retained(definition: Definition, inputs_cache: InputsCache) -> list[RetainedRow]:
    """Returns the data sets of `retain.data` with their metrics. Raises `ConfigError` if a model can't be scored."""
    rows = []
    for name, data in definition.retained.items():
        with name_in_errors(f"`retain.data.{name}`"):
            for arm in definition.arms:
                splits = inputs_cache.load_splits(data, arm.base)
            splits.test()  # now, because the confirm stage reads it after hours of training
        rows.append(RetainedRow(name=name, metric=splits.score_metric))
    return rows


def find_metric(definition: Definition, inputs_cache: InputsCache) -> ScoreMetric:
    """Returns the metric by which every trial is scored. With `data.metric=auto` it depends on the data."""
    configs = definition.corner_configs
    metrics = sorted({inputs_cache.load(config).splits.metric for config in configs})
    if len(metrics) > 1:
        raise ConfigError(f"`data.metric` must be the same for all arms, but got {', '.join(metrics)}.")
    components = [c.data.metric for c in configs if isinstance(c.data.metric, MetricComponent)]
    if any(component != components[0] for component in components):
        raise ConfigError(
            f"`data.metric` must be the same for all trials, but {components[0].target!r} has different arguments."
        )
    return inputs_cache.load(configs[0]).splits.score_metric


def score_constant_answer(definition: Definition, inputs_cache: InputsCache) -> dict[str, float]:
    """Returns every metric of a model that always gives the same answer, on the validation data of evaluations.

    Empty for data without labels, or if these scores are not the same for all trials.
    """
    configs = [config for config in definition.corner_configs if config.num_steps]
    evaluated = {(inputs_cache.load(config).splits, config.eval_fraction) for config in configs}
    scored = [splits.score_constant_answer(splits.validation, fraction=fraction) for splits, fraction in evaluated]
    scores = scored[0] if scored and all(each == scored[0] for each in scored) else {}
    return {name: score for name, score in scores.items() if math.isfinite(score)}
