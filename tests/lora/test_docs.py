import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("page", "printed"),
    [("lora.md", "('0', '2') 768"), ("peft.md", "16 32.0 alpha_over_sqrt_rank ('q_proj', 'v_proj')")],
)
def test_the_guides_code_runs(page, printed, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    scope = {}
    for block in blocks:
        exec(compile(block, page, "exec"), scope)
    assert printed in capsys.readouterr().out
