"""Checks a sweep against its base models and data, before anything is written."""

from __future__ import annotations

import math
from pathlib import Path

from lorasweep.activity import doing
from lorasweep.config.data import MetricComponent, ScoreMetric, SplitSettings
from lorasweep.config.run import STEPS_KEY
from lorasweep.disk import require_new_folder
from lorasweep.errors import ConfigError
from lorasweep.record import RetainedRow
from lorasweep.sweep.controller.encoding import History
from lorasweep.sweep.controller.proposals import propose
from lorasweep.sweep.controller.stopping import MIN_STEPS
from lorasweep.sweep.definition.arms import Definition
from lorasweep.sweep.definition.packing import explain_bases, explain_solo_arms, plan_packing
from lorasweep.sweep.definition.sweep_file import name_in_errors
from lorasweep.sweep.workers.train import check_workers
from lorasweep.training.generation import check_answers
from lorasweep.training.inputs import InputsCache, check_batch_memory
from lorasweep.training.prepare import check_run
from lorasweep.wording import format_share

MAX_STEPS = 900
"""Upper bound of the steps that `sweep.epochs` sets, because a sweep trains dozens of runs. `MIN_STEPS` is the lower
one."""


def count_steps(epochs: float, num_examples: int, batch_size: int) -> int:
    """Returns the number of steps of this number of epochs, within the bounds."""
    half = math.ceil(epochs * num_examples / batch_size / 2)  # an even number has an evaluation at its half
    return 2 * min(max(half, MIN_STEPS // 2), MAX_STEPS // 2)


def set_steps(definition: Definition, inputs_cache: InputsCache) -> Definition:
    """Returns the definition with the steps that follow from `sweep.epochs`; unchanged without it.

    Loads the training data. `trainer.max_steps` of the command line wins.
    """
    epochs = definition.sweep_config.sweep.epochs
    if epochs is None or STEPS_KEY in definition.raw["overrides"]:
        return definition
    config = definition.arms[0].base
    steps = count_steps(epochs, len(inputs_cache.load(config).splits.train), config.trainer.batch_size)
    return definition.with_overrides({STEPS_KEY: steps})


@doing("checking every arm")
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
    plan_packing(definition)
    list_retained(definition, inputs_cache)
    for arm in definition.arms:
        with name_in_errors(f"arm `{arm.name}`"):
            if arm.space:  # raises if the sampler can't search this space
                propose(arm, History(arm, metric=ScoreMetric(name="loss", direction="minimize")), number=0)
            for config in arm.corner_configs:
                inputs = inputs_cache.load(config)
                check_run(config, inputs.base)
                check_batch_memory(config.trainer, inputs.splits.train)
                if not definition.sweep_config.confirm.seeds:
                    continue
                try:
                    test = inputs.splits.test()  # now, because the confirm stage reads it after hours of training
                except ConfigError as error:
                    raise ConfigError(f"{error} Or skip the confirm stage with `confirm.seeds=0`.") from error
                if config.data.generated is not None:
                    check_answers(config, test, inputs=inputs)
    metric = find_metric(definition, inputs_cache)
    list_test_metrics(definition, metric)
    check_same_examples(definition, inputs_cache)
    return metric


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


def describe_coverages(definition: Definition, inputs_cache: InputsCache) -> dict[str, bool]:
    """Returns the different sentences on what the LoRA arms adapt, and for each whether it warns of fused experts."""
    coverages = [inputs_cache.load(config).find_coverage(config) for config in definition.corner_configs]
    return {coverage.describe(): bool(coverage.fused_experts) for coverage in coverages if coverage is not None}


def describe_steps(definition: Definition, inputs_cache: InputsCache) -> dict[str, bool]:
    """Returns a sentence on steps that are less than an epoch, and whether it warns: of labels that are not learned."""
    config = next((arm.base for arm in definition.arms if arm.base.num_steps), None)
    if config is None or config.data.name.startswith("stdlib"):
        return {}
    splits, batch_size = inputs_cache.load(config).splits, config.trainer.batch_size
    num_examples, most_frequent = len(splits.train), score_constant_answer(definition, inputs_cache).get("accuracy")
    if (epochs := config.num_steps * batch_size / num_examples) >= 1:
        return {}
    sentences = [
        f"Each run trains {config.num_steps:,} steps of {batch_size}: {epochs:.2f} epochs of {num_examples:,} training "
        "examples."
    ]
    if most_frequent is not None:
        sentences.append(
            "So few steps may not get beyond the answer that is always the most frequent label (accuracy "
            f"{format_share(most_frequent)})."
        )
    is_cut = definition.sweep_config.sweep.minutes is not None
    remedy = "More `--minutes` make" if is_cut else f"`trainer.max_steps={math.ceil(num_examples / batch_size)}` makes"
    return {" ".join([*sentences, f"{remedy} one epoch."]): most_frequent is not None}


def describe_test_data(definition: Definition, inputs_cache: InputsCache) -> list[str]:
    """Returns a sentence on how much test data the verdicts rest; empty without a confirm stage."""
    if not definition.sweep_config.confirm.list_looks():
        return []
    test = inputs_cache.load(definition.arms[0].base).splits.test()
    groups = set(test.groups)
    if len(groups) == 1:
        return [
            f"All test examples ({len(test)}) are in one group ({groups.pop()!r}), which says nothing about other "
            "groups: verdicts will hold for this group alone. Give test data of at least 20 groups."
        ]
    of_groups = f" in {len(groups):,} groups" if groups and len(groups) < len(test) else ""
    return [
        f"The verdicts rest on {len(test):,} test examples{of_groups}; four times as many settle half the difference."
    ]


def list_warnings(definition: Definition, inputs_cache: InputsCache) -> list[str]:
    """Returns a sentence for each base with fused experts, which LoRA leaves out, and on labels with too few steps."""
    described = describe_coverages(definition, inputs_cache) | describe_steps(definition, inputs_cache)
    return [text for text, is_warning in described.items() if is_warning]


def list_notes(definition: Definition, inputs_cache: InputsCache) -> list[str]:
    """Returns notes on each arm's data, attention and base, and on arms whose trials run alone.

    A note that several arms share appears once.
    """
    configs = [arm.base for arm in definition.arms]
    notes = [note for config in configs for note in inputs_cache.load(config).list_notes(config)]
    described = describe_coverages(definition, inputs_cache) | describe_steps(definition, inputs_cache)
    notes += [*described, *explain_bases(definition), *explain_solo_arms(definition)]
    notes += describe_test_data(definition, inputs_cache)
    return [note for note in dict.fromkeys(notes) if not described.get(note)]  # warnings are listed apart
