"""The site is true: every block of its lessons runs or says why not, and its reference has every name of the code."""

import importlib.util
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from pymdownx.slugs import slugify

import lorasweep
import lorasweep.errors
import lorasweep.lora
from lorasweep.cli import build_parser, run

pytestmark = pytest.mark.docs
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
LESSONS = (
    "start.md",
    "how-to.md",
    "lora.md",
    "own_module.md",
    "command_line.md",
    "troubleshooting.md",
    *(pytest.param(f"{name}.md", marks=pytest.mark.release) for name in ("chats", "pairs", "other_tools", "clusters")),
)
"""Pages whose blocks run."""
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w+)(?: title=\"(?P<file>[^\"\n]+)\")?\n"
    r"(?P<content>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)
EXIT_CODE = re.compile(r"# exit code (\d)")
HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
PORT = "8321"
RUN_BUDGET = ("trainer.max_steps=2", "trainer.eval_every_steps=1", "trainer.batch_size=4", "trainer.device=cpu")
SWEEP_BUDGET = (*RUN_BUDGET, "sweep.trials=2", "confirm.seeds=1")
TABLE_BUDGET = ("data.max_validation_examples=20", "data.max_test_examples=20")
TEXT_BUDGET = ("data.max_validation_blocks=4", "data.max_test_blocks=4")
SHORTER_CODE = {
    "max_steps=60": "max_steps=4",
    "val_check_interval=20": "val_check_interval=2",
    "log_every_n_steps=20": "log_every_n_steps=1",
    '"trainer.batch_size=16"': '"trainer.batch_size=2", "data.block_length=32", "data.max_validation_blocks=4", '
    '"data.max_test_blocks=4"',
}
"""Budgets in Python, and those of a few steps."""


class Block(NamedTuple):
    reason: str | None
    language: str
    file: str | None
    content: str


def read_blocks(page):
    return [Block(**found.groupdict()) for found in BLOCK.finditer((DOCS / page).read_text(encoding="utf-8"))]


def shorten(words):
    """Returns the arguments of a command with a budget of a few steps."""
    if words[0] not in ("train", "sweep", "plan"):
        return words
    data = TABLE_BUDGET if any(word.startswith("data.train=") for word in words) else TEXT_BUDGET
    return [*words, *(RUN_BUDGET if words[0] == "train" else SWEEP_BUDGET), *data]


def run_commands(content):
    """Runs the commands of a block in this process, because a new process would import torch for each."""
    for line in content.splitlines():
        expected = EXIT_CODE.search(line)
        _, *words = shlex.split(line, comments=True)
        code = run(words if expected else shorten(words))
        assert code == int(expected[1] if expected else 0), line


def run_script(content):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    source = str(Path(lorasweep.__file__).parents[1])
    environment = os.environ | {"PATH": path, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1"}
    started = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", content],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = started.communicate(timeout=300)
    finally:
        with suppress(ProcessLookupError):  # a server of the block may be left if the block failed
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 0, errors
    print(output)


def squeeze(text):
    return " ".join(text.split())


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("page", LESSONS)
def test_every_block_of_a_lesson_runs_or_has_a_reason(page, here, monkeypatch, capsys, encoder):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    scope = {}
    port, shown = free_port(), ""
    for reason, language, file, content in read_blocks(page):
        content = content.replace(HUB_ID, encoder).replace(PORT, port)
        if reason:
            continue
        if file:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).write_text(content, encoding="utf-8")
        elif language == "text":  # what the block before it printed
            assert squeeze(content) in squeeze(shown)
        elif language == "python":
            for long, short in SHORTER_CODE.items():
                content = content.replace(long, short)
            exec(compile(content, page, "exec"), scope)
        else:
            assert language == "bash", f"{content}must be a file with a title, or have a reason"
            is_ours = {line.startswith("lorasweep ") for line in content.splitlines()}
            assert len(is_ours) == 1, f"{content}must be commands of lorasweep alone, or have none"
            (run_commands if is_ours == {True} else run_script)(content)
            captured = capsys.readouterr()
            shown = captured.out + captured.err


def load_hook():
    spec = importlib.util.spec_from_file_location("site_reference", DOCS / "hooks" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_setting_and_command_and_public_name_is_in_the_reference():
    text = load_hook().describe_settings()
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \| (.*?) \| (.*?) \|$", text, flags=re.MULTILINE)
    assert {"method.rank", "optim.lr", "confirm.seeds"} <= {key for key, *_ in rows}
    assert [key for key, *cells in rows if not all(cells)] == []
    text = load_hook().describe_commands()
    commands = next(action.choices for action in build_parser()._actions if isinstance(action.choices, dict))
    assert set(re.findall(r"^## (\w+)$", text, flags=re.MULTILINE)) == set(commands)
    hook, page = load_hook(), (DOCS / "reference" / "json.md").read_text(encoding="utf-8")
    for place, classes in hook.JSON_CLASSES.items():
        assert f"<!-- {place} -->" in page
        assert len(hook.describe_fields(classes).splitlines()) > len(classes) + 2
    shown = set(re.findall(r"^::: ([\w.]+)$", (DOCS / "reference" / "api.md").read_text(encoding="utf-8"), flags=re.M))
    for package in (lorasweep, lorasweep.lora):
        public = {f"{getattr(package, name).__module__}.{name}" for name in package.__all__}
        assert public <= shown
    assert "lorasweep.errors" in shown


def test_the_navigation_has_every_page_and_links_to_the_glossary_lead_to_a_term():
    text = re.sub(r"!!python/object/apply:\S+", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = set(re.findall(r": ([\w/-]+\.md)$", yaml.safe_dump(yaml.safe_load(text)["nav"]), flags=re.MULTILINE))
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert named == pages | set(load_hook().ROOT_PAGES.values())
    glossary = (DOCS / "glossary.md").read_text(encoding="utf-8")
    anchors = {slugify(case="lower")(term, "-") for term in re.findall(r"^## (.+)$", glossary, flags=re.MULTILINE)}
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *DOCS.rglob("*.md"))]
    linked = {anchor for page in pages for anchor in re.findall(r"glossary\.md(?:#([^)]+))?\)", page)}
    assert linked - {""} <= anchors
