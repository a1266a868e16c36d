"""Warns of settings that would make a sweep's comparisons less fair or less certain, before the first trial.

After the sweep, `report.fairness` judges the trials that ran.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorasweep.config.data import max_tokens_per_example
from lorasweep.config.method import ALPHA_OVER_RANK, LoraConfig
from lorasweep.config.ranges import MAX_WIDTH_DIFFERENCE_DECADES, width_in_decades
from lorasweep.config.run import ALPHA, LR, RunConfig
from lorasweep.config.sweep import HalvingPruner, parse_margin, warn_of_few_seeds
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.sweep.definition.space import describe_space
from lorasweep.wording import join_words


def find_warnings(definition: Definition) -> list[str]:
    # the frozen base has neither a budget nor a learning rate to compare
    trained = [arm for arm in definition.arms if max(map(count_tokens, arm.corner_configs))]
    warnings = [
        *_warn_of_budgets(trained),
        *_warn_of_learning_rates(trained),
        *(warning for arm in definition.arms for warning in _warn_of_alpha(arm)),
    ]
    if late := ", ".join(arm.name for arm in trained if _has_no_rung(arm)):
        warnings.append(
            f"Trials of {late} are never stopped early, because they have no evaluation before their last step. "
            "Lower `trainer.eval_every_steps`, or choose `pruner=none`."
        )
    confirm = definition.sweep_config.confirm
    warnings += warn_of_few_seeds(max(confirm.list_looks(), default=0))
    methods = {config.method.name for arm in definition.arms for config in arm.corner_configs}
    missing = [f"`method={name}`" for name in ("full", "frozen") if name not in methods]
    has_questions = len(definition.arms) > 1 or any(arm.confirm_each for arm in definition.arms)
    if confirm.seeds and has_questions and missing and parse_margin(confirm.margin).is_share_of_gain:
        warnings.append(
            f"`confirm.margin` is {confirm.margin}, a share of the gain of `full` over `frozen`, but the sweep has no "
            f"arm with {join_words(missing, last='or')}. So no arms can be shown to be equivalent, and no rank to be "
            "enough. Set it to a number in the metric's unit."
        )
    return warnings


def count_tokens(config: RunConfig) -> int:
    """Returns the maximum number of training tokens of a run; 0 under `method=frozen`."""
    return config.num_steps * config.trainer.batch_size * max_tokens_per_example(config.data)


def _has_no_rung(arm: Arm) -> bool:
    trainer = arm.corner_configs[0].trainer
    return isinstance(arm.sweep_config.pruner, HalvingPruner) and trainer.eval_every_steps >= trainer.max_steps


def _warn_of_budgets(arms: Sequence[Arm]) -> Iterator[str]:
    trials = {arm.name: arm.trials for arm in arms}
    tokens = {arm.name: max(map(count_tokens, arm.corner_configs)) for arm in arms}
    if len(set(trials.values())) > 1:
        yield (
            f"Arms have unequal numbers of trials ({_format_by_arm(trials)}): an arm with more trials has more "
            "chances of a good score. `sweep.trials=N` gives every arm the same number."
        )
    if len(set(tokens.values())) > 1:
        yield (
            f"Arms train on unequal numbers of tokens per trial ({_format_by_arm(tokens)}): a better score may come "
            "from more training."
        )


def _warn_of_learning_rates(arms: Sequence[Arm]) -> Iterator[str]:
    widths = {arm.name: width_in_decades(describe_space(arm.space).get(LR)) or 0.0 for arm in arms}
    if widths and max(widths.values()) - min(widths.values()) > MAX_WIDTH_DIFFERENCE_DECADES:
        yield (
            f"Arms search their learning rates over unequal ranges (in decades: {_format_by_arm(widths, '.1f')}): a "
            "narrow range may not contain an arm's best rate. `arms.NAME.optim.lr=tag(log,interval(LOW,HIGH))` sets "
            "the range of one arm."
        )


def _warn_of_alpha(arm: Arm) -> Iterator[str]:
    """Warns if the ranks of an arm differ but neither α nor the learning rate does, so that α/r differs too."""
    # where the rate is searched, it makes up for α: see the rate law
    if {ALPHA, ALPHA_OVER_RANK, LR} & {*arm.space} or ALPHA_OVER_RANK in arm.settings:
        return
    methods = [config.method for config in arm.corner_configs if isinstance(config.method, LoraConfig)]
    scaled = [method for method in methods if method.scaling == "alpha_over_rank"]
    ranks, alphas = {method.rank for method in scaled}, {method.alpha for method in scaled}
    if len(ranks) < 2 or len(alphas) != 1:
        return
    alpha, low, high = alphas.pop(), min(ranks), max(ranks)
    yield (
        f"`method.alpha` of `{arm.name}` is {alpha:g} at every rank, so ΔW is scaled by α/r = {alpha / low:.3g} at "
        f"rank {low} and {alpha / high:.3g} at rank {high}. An apparent effect of the rank may be an effect of α/r. "
        "Search `optim.lr`, or fix α/r with `method.alpha: {over_rank: 2}`."
    )


def _format_by_arm(numbers: Mapping[str, Any], form: str = ",") -> str:
    return ", ".join(f"{name} {number:{form}}" for name, number in numbers.items())
