"""What runs can do is what docs/architecture.md says."""

from pathlib import Path

import pytest
from tests.small_runs import OWN_MODULE

from lorasweep.config.compose import compose_run

CHAT = {"data": "chat", "data.train": "chat.jsonl"}
COLUMNS = {
    "LoRA": CHAT,
    "full": CHAT | {"method": "full"},
    "frozen": CHAT | {"method": "frozen"},
    "LoRA, `trainer.compile`": CHAT | {"trainer.compile": True},
    "LoRA, `trainer.strategy=fsdp`": CHAT | {"trainer.strategy": "fsdp"},
    "your own LightningModule": OWN_MODULE,
}


@pytest.mark.parametrize("column", COLUMNS)
def test_the_table_of_the_documentation_is_what_runs_declare(column):
    lines = Path("docs/architecture.md").read_text().split("| can |")[1].split("\n\n")[0].splitlines()
    names, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]
    declared = compose_run(COLUMNS[column]).capabilities._asdict()
    documented = {row[0].split(" ")[0]: row[1:][names.index(column)] for row in rows}
    assert documented == {name: "yes" if able is True else "no" for name, able in declared.items()}
    assert all(able is True or able.endswith(".") for able in declared.values())
