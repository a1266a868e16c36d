"""Estimates the time, memory and disk of a sweep from a few measured steps of each arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lorasweep.config.run import RunConfig
from lorasweep.errors import OutOfMemory
from lorasweep.record import describe_stage
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.sweep.definition.packing import ArmPacking, plan_packing
from lorasweep.sweep.definition.seeds import arm_seeds, draw_confirm_seeds, draw_select_seeds
from lorasweep.sweep.definition.warnings import count_tokens, find_warnings
from lorasweep.training.cost import RunCost, measure_run
from lorasweep.training.inputs import InputsCache, RunInputs
from lorasweep.training.packs.size import choose_pack_size
from lorasweep.wording import format_bytes, format_count, format_seconds


@dataclass(frozen=True, kw_only=True)
class ArmPlan:
    """The maximum cost of one arm: every run has the arm's highest rank and no run is pruned."""

    arm: Arm
    packing: ArmPacking
    pack_size: int
    select_runs: int
    confirm_runs: int
    steps: int
    """Optimizer steps of all runs together."""
    tokens: int
    """Maximum number of training tokens of all runs together."""
    trainable_params: int
    kept_bytes: int
    """Size on disk of the best and last weights of all runs."""
    memory_bytes: int
    """Memory in use after a step of all slots: allocated on the GPU, else resident in the process."""
    seconds: float
    """Time for training and evaluating all runs. Scoring on test data counts as one evaluation on validation data,
    because the test data is not read yet."""


def plan_sweep(definition: Definition, inputs_cache: InputsCache) -> list[ArmPlan]:
    """Returns the estimated cost of each arm of a checked definition. Trains a few steps and keeps nothing."""
    packings, confirm = plan_packing(definition), draw_confirm_seeds(definition)
    num_select_seeds = len(draw_select_seeds(definition))
    plans = []
    for arm in definition.arms:
        candidates = min(arm.all_trials, definition.sweep_config.confirm.candidates)
        select_runs = candidates * num_select_seeds if candidates > 1 else 0
        confirm_runs = len(arm_seeds(arm, confirm))
        plan = _plan_arm(arm, packings[arm.name], inputs_cache, select_runs=select_runs, confirm_runs=confirm_runs)
        plans.append(plan)
    return plans


def render_plan(definition: Definition, plans: Sequence[ArmPlan]) -> RenderableType:
    """Returns a table with a row for each arm, followed by the reasons for packs and the warnings."""
    title = escape(f"{definition.name}: nothing is trained yet")
    # an arm's long name may wrap, but numbers never do
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE, padding=(0, 0))
    table.add_column("arm", overflow="fold")
    for name in ("runs", "steps", "tokens", "trained", "pack", "memory", "disk", "at most"):
        table.add_column(name, justify="right", no_wrap=True)
    for plan in plans:
        table.add_row(
            escape(plan.arm.name),
            " + ".join(map(str, filter(None, (plan.arm.all_trials, plan.select_runs, plan.confirm_runs)))),
            format_count(plan.steps),
            format_count(plan.tokens),
            format_count(plan.trainable_params),
            str(plan.pack_size),
            format_bytes(plan.memory_bytes),
            format_bytes(plan.kept_bytes),
            format_seconds(plan.seconds),
        )
    confirm = definition.sweep_config.confirm
    candidates = confirm.candidates
    searches = definition.sweep_config.sweep.searches
    stages = [f"{f'{searches} searches' if searches > 1 else 'search'} on validation data"]
    if any(plan.select_runs for plan in plans):
        stages.append(f"then select: {describe_stage('select', num_seeds=confirm.select_seeds, candidates=candidates)}")
    if confirm.seeds:
        stages.append(f"then confirm: {describe_stage('confirm', num_seeds=confirm.seeds, candidates=candidates)}")
    else:
        stages.append("no confirm stage")
    total = format_seconds(sum(plan.seconds for plan in plans))
    notes = [
        *(f"{plan.arm.name}: {plan.packing.reason}" for plan in plans),
        f"Stages (the numbers of runs): {'; '.join(stages)}.",
        *find_warnings(definition),
        f"All arms: at most {total} on this machine, estimated from a few steps. Pruning shortens this time.",
    ]
    return Group(table, *(Text(f"• {note}") for note in notes))


def _plan_arm(
    arm: Arm, packing: ArmPacking, inputs_cache: InputsCache, *, select_runs: int, confirm_runs: int
) -> ArmPlan:
    config = packing.largest
    inputs = inputs_cache.load(config)
    slots: int | None = None
    if packing.key is not None:
        wanted = arm.sweep_config.worker.pack_size
        slots = choose_pack_size(config, inputs=inputs, trials_left=arm.trials).slots if wanted == "auto" else wanted
    cost = _measure_fitting(config, inputs, slots=slots)
    steps = 0 if config.method.name == "frozen" else config.trainer.max_steps
    # rounded up, because a run is also evaluated after its last step; `or 1`: the frozen base is evaluated once
    evaluations = -(-steps // config.trainer.eval_every_steps) or 1
    runs = arm.all_trials + select_runs + confirm_runs
    return ArmPlan(
        arm=arm,
        packing=packing,
        pack_size=cost.slots,
        select_runs=select_runs,
        confirm_runs=confirm_runs,
        steps=steps * runs,
        tokens=count_tokens(config) * runs,
        trainable_params=cost.trainable_params,
        kept_bytes=2 * 4 * cost.trainable_params * runs,  # best and last, in fp32
        memory_bytes=cost.memory_bytes,
        seconds=runs * (steps * cost.step_s + evaluations * cost.eval_s) + confirm_runs * cost.eval_s,
    )


def _measure_fitting(config: RunConfig, inputs: RunInputs, *, slots: int | None) -> RunCost:
    """Measures a run, alone or in a pack. Like the sweep, halves a pack until it fits."""
    while slots is not None and slots > 1:
        try:
            return measure_run(config, inputs=inputs, slots=slots)
        except OutOfMemory:
            slots //= 2
    return measure_run(config, inputs=inputs, slots=slots)
