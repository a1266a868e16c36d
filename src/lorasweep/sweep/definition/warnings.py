"""What may mislead a reader of a sweep's results, as far as its definition shows it: a sentence each.

`report.fairness` judges afterwards, by what ran.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from lorasweep.config.data import max_tokens_per_example
from lorasweep.config.method import LoraConfig
from lorasweep.config.ranges import MAX_WIDTH_DIFFERENCE_DECADES, width_in_decades
from lorasweep.config.run import RunConfig
from lorasweep.config.sweep import HalvingPruner
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.sweep.definition.scaling import MULTIPLIER
from lorasweep.sweep.definition.space import describe_space
from lorasweep.wording import join_words

LR = "optim.lr"


def find_warnings(definition: Definition) -> list[str]:
    """Returns a sentence for each thing in a sweep's definition that makes its comparisons less fair or less sure."""
    families = [list(arms) for _, arms in groupby(definition.arms, key=lambda arm: arm.expanded_from or arm.name)]
    return [
        *_warn_of_budgets(definition.arms),
        *_warn_of_rates(definition.arms),
        *(warning for family in families for warning in _warn_of_alpha(family)),
        *_warn_of_no_rung(definition.arms),
        *_warn_of_one_seed(definition),
    ]


def trained_tokens(config: RunConfig) -> int:
    """Returns the most training tokens that a run with these settings can see; 0 where nothing trains."""
    if config.method.name == "frozen":
        return 0
    return config.trainer.max_steps * config.trainer.batch_size * max_tokens_per_example(config.data)


def _warn_of_budgets(arms: Sequence[Arm]) -> Iterator[str]:
    budgets = {arm.name: (arm.trials, max(map(trained_tokens, arm.corners()))) for arm in arms}
    trained = {name: budget for name, budget in budgets.items() if budget[1]}
    if len({trials for trials, _ in trained.values()}) > 1:
        told = ", ".join(f"{name} {trials}" for name, (trials, _) in trained.items())
        yield (
            f"Arms have unequal numbers of trials ({told}): the one with more has more chances of a good score. "
            "`sweep.trials=N` gives every arm the same."
        )
    if len({tokens for _, tokens in trained.values()}) > 1:
        told = ", ".join(f"{name} {tokens:,}" for name, (_, tokens) in trained.items())
        yield f"Arms train on unequal numbers of tokens per trial ({told}): a better score may come from more training."


def _warn_of_rates(arms: Sequence[Arm]) -> Iterator[str]:
    trained = [arm for arm in arms if any(map(trained_tokens, arm.corners()))]
    widths = {arm.name: width_in_decades(describe_space(arm.space).get(LR)) or 0.0 for arm in trained}
    if widths and max(widths.values()) - min(widths.values()) > MAX_WIDTH_DIFFERENCE_DECADES:
        told = ", ".join(f"{name} {width:.1f}" for name, width in widths.items())
        yield (
            f"Arms search their learning rates over unequal ranges (in decades: {told}): a narrow range may leave out "
            "an arm's best rate. `arms.NAME.optim.lr=tag(log,interval(LOW,HIGH))` sets the range of one arm."
        )


def _warn_of_alpha(family: Sequence[Arm]) -> Iterator[str]:
    """Yields a warning where α stays while the rank moves, so that α/r moves too: in an arm, or over an expansion."""
    if any(_moves_alpha(arm) for arm in family):
        return
    methods = [config.method for arm in family for config in arm.corners()]
    lora = [method for method in methods if isinstance(method, LoraConfig) and method.scaling == "alpha_over_rank"]
    ranks, alphas = {method.rank for method in lora}, {method.alpha for method in lora}
    if len(ranks) < 2 or len(alphas) != 1:
        return
    alpha, low, high = alphas.pop(), min(ranks), max(ranks)
    each = len({method.rank for config in family[0].corners() if isinstance(method := config.method, LoraConfig)}) == 1
    made_up_for = (
        "Each rank searches by itself, which makes up for it as far as the ranges reach."
        if each and all(arm.space for arm in family)
        else "What looks like an effect of rank may then be one of strength."
    )
    yield (
        f"`method.alpha` of `{family[0].expanded_from or family[0].name}` is {alpha:g} at every rank, so the change is "
        f"scaled by α/r = {alpha / low:.3g} at rank {low} and {alpha / high:.3g} at rank {high}. {made_up_for} "
        "`method.alpha: {over_rank: 2}` holds α/r, `{over_rank: [1, 2, 4]}` searches it."
    )


def _moves_alpha(arm: Arm) -> bool:
    """Returns whether α is searched, or follows the rank."""
    return bool({"method.alpha", MULTIPLIER} & {*arm.space, *arm.expanded}) or MULTIPLIER in arm.settings


def _warn_of_no_rung(arms: Sequence[Arm]) -> Iterator[str]:
    """Warns of arms with a pruner whose first evaluation is at the last step."""
    late = [
        arm.name
        for arm in arms
        for trainer in [next(arm.corners()).trainer]
        if isinstance(arm.driver.pruner, HalvingPruner) and trainer.eval_every_steps >= trainer.max_steps
        if next(arm.corners()).method.name != "frozen"
    ]
    if late:
        yield (
            f"No trial of {join_words(late)} is stopped early, because there is no evaluation before the last step. "
            "Lower `trainer.eval_every_steps`, or choose `pruner=none`."
        )


def _warn_of_one_seed(definition: Definition) -> Iterator[str]:
    if definition.driver.confirm.seeds == 1:
        yield "`confirm.seeds` is 1: from one seed no interval over seeds follows."
