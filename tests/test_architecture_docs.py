"""docs/architecture.md is true: its tree is the code's, and its path of a trial can be followed from file to file."""

import ast
import re
from pathlib import Path

import lorasweep

SOURCE = Path(lorasweep.__file__).parent
DOCUMENT = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()


def test_the_tree_is_the_codes():
    (tree,) = re.findall(r"```text\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    drawn = {line.split()[0] for line in tree.splitlines()}
    packages = {f"{path.parent.relative_to(SOURCE)}/" for path in SOURCE.rglob("__init__.py")} - {"./"}
    modules = {path.name for path in SOURCE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert drawn == packages | modules


def read_path():
    """Rows of the path: file, and the function in it."""
    return re.findall(r"^\| \d+ \| `([\w/]+\.py)` \| `(\w+)`", DOCUMENT, flags=re.MULTILINE)


def test_every_step_of_a_trials_path_is_a_function_of_its_file_and_a_trial_of_one_class():
    assert read_path()
    for file, function in read_path():
        names = {node.name for node in ast.walk(ast.parse((SOURCE / file).read_text())) if hasattr(node, "name")}
        assert function in names, file
    handled = [file for file, _ in read_path() if file.startswith(("sweep/controller", "report"))]
    for file in handled:
        names = {node.id for node in ast.walk(ast.parse((SOURCE / file).read_text())) if isinstance(node, ast.Name)}
        assert "Trial" in names, file


def test_every_file_that_is_named_is_there():
    for name in re.findall(r"`((?:[a-z_]+/)+[\w.]*)`", DOCUMENT):
        roots = (SOURCE, SOURCE.parents[1])
        assert any((root / name).exists() for root in roots) or "NAME" in name, name
