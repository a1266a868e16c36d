"""`lorasweep plan` fits a terminal, and names stages, times, memory, packs and warnings."""

from __future__ import annotations

import io

from rich.console import Console

from lorasweep.sweep.plan.estimate import ArmPlan, Seconds, SweepPlan
from lorasweep.sweep.plan.measure import SweepCost
from lorasweep.sweep.plan.render import render_plan


def test_a_plan_fits_eighty_columns_and_says_which_stages_there_are(begin, content):
    del content["arms"]["lora"]
    for rank in (1, 16):
        settings = {"method": "lora", "method.rank": rank}
        content["arms"][f"lora-rank{rank}"] = {"settings": settings, "space": {"optim.lr": [0.1, 0.2]}, "trials": 2}
    content["settings"] |= {"worker.pack_size": "auto"}
    folder = begin(content, "confirm.seeds=3")
    folder.close()
    arms = tuple(
        ArmPlan(
            arm=arm,
            pack_size=16,
            confirm_runs=1 if arm.name == "frozen" else 3,
            steps=123_456,
            tokens=1_234_567_890,
            trainable_params=123_456,
            kept_bytes=123 * 2**20,
            memory_bytes=1234 * 2**20,
            seconds=Seconds(11 * 60, 59 * 60),
        )
        for arm in folder.definition.arms
    )
    cost = SweepCost(groups=(), start_s=5, start_bytes=0, report_s=2, report_bytes=0, omitted_loggers=("wandb",))
    stages = {"start": Seconds(5, 5), "search": Seconds(60, 3600)}
    plan = SweepPlan(arms=arms, stages=stages, host_bytes=2 * 2**30, largest_moment="the report", cost=cost)
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(render_plan(folder.definition, plan))
    shown = console.export_text()
    (line,) = [line for line in shown.splitlines() if line.strip().startswith("lora-rank16 ")]
    cells = ["lora-rank16", "2 + 3", "123 k", "1.23 G", "123 k", "16", "1.21 GiB", "123 MiB", "11 to 59 min"]
    assert line.split() == " ".join(cells).split()
    assert "…" not in shown
    notes = " ".join(shown.split())
    assert "search on validation data; then confirm: " in notes
    assert "3 fresh seeds" in notes
    assert "(full 3, lora-rank1 2, lora-rank16 2)" in notes
    assert "`lora-rank1` and `lora-rank16`: trials share packs" in notes
    assert "1.1 to 60 min (start 5.0 s, search 1.0 to 60 min" in notes
    assert "Largest memory of the process: 2 GiB, in the report." in notes
    assert "The time of wandb (`logger`) is not measured." in notes
