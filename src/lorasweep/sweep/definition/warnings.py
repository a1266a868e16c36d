"""Warns of settings that would make a sweep's comparisons less fair or less certain, before the first trial.

After the sweep, `report.caveats` judges the trials that ran.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lorasweep.config.data import BlockSettings, ModuleDataConfig
from lorasweep.config.run import RunConfig
from lorasweep.config.sweep import HalvingPruner, parse_margin
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.wording import join_words

MIN_RELIABLE_SEEDS = 3
"""Fewer confirm seeds give a warning. A 95 % interval over seeds reaches 12.7 standard errors to each side with two
seeds, 4.3 with three and 2.8 with five (Student's t)."""


def find_warnings(definition: Definition) -> list[str]:
    # the frozen base has neither a budget nor a learning rate to compare
    trained = [arm for arm in definition.arms if max(map(count_tokens, arm.corner_configs))]
    warnings = list(_warn_of_budgets(trained))
    halved = [arm for arm in trained if isinstance(arm.sweep_config.pruner, HalvingPruner)]
    trainers = {arm.name: arm.corner_configs[0].trainer for arm in halved}
    if late := [name for name, trainer in trainers.items() if trainer.eval_every_steps >= trainer.max_steps]:
        warnings.append(
            f"Trials of {', '.join(late)} are never stopped early, because they have no evaluation before their last "
            "step. Lower `trainer.eval_every_steps`, or choose `pruner=none`."
        )
    confirm = definition.sweep_config.confirm
    if 0 < (num_seeds := max(confirm.list_looks(), default=0)) < MIN_RELIABLE_SEEDS:
        warnings.append(
            f"`confirm.seeds` is {num_seeds}. One seed gives no interval, and two give a very wide one. Take "
            f"`confirm.seeds={MIN_RELIABLE_SEEDS}` or more."
        )
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
    data, tokens = config.data, 1  # unknown before a module's data is read
    if not isinstance(data, ModuleDataConfig):
        tokens = data.block_length if isinstance(data, BlockSettings) else data.max_length
    return config.num_steps * config.trainer.batch_size * tokens


def _warn_of_budgets(arms: Sequence[Arm]) -> Iterator[str]:
    trials = {arm.name: arm.trials for arm in arms}
    tokens = {arm.name: max(map(count_tokens, arm.corner_configs)) for arm in arms}
    if len(set(trials.values())) > 1:
        yield (
            f"Arms have unequal numbers of trials ({_format_by_arm(trials)}): an arm with more trials has more "
            "chances of a good score. `sweep.trials=N` gives every arm with a `space` the same number."
        )
    if len(set(tokens.values())) > 1:
        yield (
            f"Arms train on unequal numbers of tokens per trial ({_format_by_arm(tokens)}): a better score may come "
            "from more training."
        )


def _format_by_arm(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in numbers.items())
