"""Tasks are declared in their folders alone."""

import ast
from pathlib import Path

import lorasweep
from lorasweep.tasks import DATA, OBJECTIVES, PLAIN_TEXT
from lorasweep.tasks.task import Task, find_task

PACKAGE = Path(lorasweep.__file__).parent
TASKS = {"text", "chat", "table", "preferences", "embeddings"}
NAMES = {*DATA, *OBJECTIVES} - {PLAIN_TEXT, "module", "default", "dpo"}
"""Words that name a task or its objective. Others have further meanings, such as `dpo`, a stage of other tools."""
OWN_CLASSES = {
    kind.__name__ for kind in (*DATA.values(), *OBJECTIVES.values()) if "lorasweep.tasks." in kind.__module__
}


def find_names(node):
    """Yields what names a task in a node of Python's syntax."""
    if isinstance(node, ast.Constant) and node.value in NAMES:
        yield node.value
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorasweep.tasks."):
        yield from {*node.module.split(".")[2:3]} & TASKS
    if isinstance(node, ast.Compare):
        yield from {PLAIN_TEXT} & {getattr(one, "value", None) for one in (node.left, *node.comparators)}
    if isinstance(node, ast.Name | ast.Attribute):
        yield from {getattr(node, "id", getattr(node, "attr", None))} & OWN_CLASSES


def test_no_file_outside_of_tasks_names_a_task_or_asks_for_its_class():
    files = [file for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).parts[0] != "tasks"]
    found = {
        (file.relative_to(PACKAGE).as_posix(), name)
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        for name in find_names(node)
    }
    assert found == set()


def test_every_task_has_a_folder_and_declares_what_it_needs():
    tasks = {kind.task_path.split(".")[2]: find_task(kind) for kind in DATA.values() if kind.task_path}
    assert tasks.keys() == TASKS
    assert all(isinstance(task, Task) for task in tasks.values())
