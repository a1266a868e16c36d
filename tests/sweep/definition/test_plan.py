"""`lorasweep plan` fits a terminal, and names stages and warnings."""

from __future__ import annotations

import io

from rich.console import Console

from lorasweep.sweep.definition.packing import ArmPacking
from lorasweep.sweep.definition.plan import ArmPlan, render_plan


def test_a_plan_fits_eighty_columns_and_says_which_stages_there_are(begin, content):
    content["arms"]["lora"] |= {"expand": {"method.rank": [1, 16]}, "space": {"optim.lr": [0.1, 0.2]}, "trials": 2}
    folder = begin(content, "confirm.seeds=3", "confirm.candidates=2", "sweep.searches=2")
    folder.close()
    packing = ArmPacking(key=None, reason="its trials run alone.", largest=None)
    plans = [
        ArmPlan(
            arm=arm,
            packing=packing,
            pack_size=16,
            select_runs=0 if arm.name == "frozen" else 4,
            confirm_runs=1 if arm.name == "frozen" else 3,
            steps=123_456,
            tokens=1_234_567_890,
            trainable_params=123_456,
            kept_bytes=123 * 2**20,
            memory_bytes=1234 * 2**20,
            seconds=59 * 60 + 59,
        )
        for arm in folder.definition.arms
    ]
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(render_plan(folder.definition, plans))
    shown = console.export_text()
    (line,) = [line for line in shown.splitlines() if line.strip().startswith("lora-rank16 ")]
    cells = ["lora-rank16", "4 + 4 + 3", "123 k", "1.23 G", "123 k", "16", "1.21 GiB", "123 MiB", "59 min 59 s"]
    assert line.split() == " ".join(cells).split()
    assert "…" not in shown
    notes = " ".join(shown.split())
    assert "the best 2 trials of each arm again on 2 fresh seeds" in notes
    assert "3 fresh seeds" in notes
    assert "2 searches on validation data" in notes
    assert "(full 3, lora-rank1 2, lora-rank16 2)" in notes
