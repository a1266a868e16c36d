"""The package about itself: what is shipped works, what is drawn in the documents is so."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from tests.small_runs import TWO_STEPS

import lorasweep
from lorasweep.config.compose import default_options, packaged_folder
from lorasweep.config.method import METHOD_CONFIGS
from lorasweep.methods import METHODS
from lorasweep.sweep.definition.arms import read_definition

ROOT = Path(__file__).parent.parent
SOURCE = Path(lorasweep.__file__).parent.parent

MANDATORY_IN_SWEEPS = ["model.path=owner/name", "data.train=file"]
SWEEPS = sorted(packaged_folder("sweeps").rglob("*.yaml"))


def run_python(code, *, cwd=None, source=SOURCE):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(source), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_folders_of_conf_are_groups_and_methods_its_files():
    folders = {path.name for path in packaged_folder("conf").iterdir() if path.is_dir()}
    assert folders == {*default_options("train"), *default_options("sweep"), "experiment"}  # `+experiment=NAME`
    files = {file.stem for file in (packaged_folder("conf") / "method").glob("*.yaml")}
    assert files == {config.name for config in METHODS}
    assert set(METHOD_CONFIGS) == set(METHODS)


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_file_of_sweeps_reads_as_a_sweep_of_its_name(file):
    settings = yaml.safe_load(file.read_text())["settings"]
    is_own = settings["model"] != "tiny"  # the file names neither a model nor data
    definition = read_definition(file, MANDATORY_IN_SWEEPS if is_own else [])
    assert "?" in file.read_text().splitlines()[0]  # the question that it answers
    assert definition.name == file.stem
    assert definition.description


QUICK = """
import sys
import lorasweep, lorasweep.record, lorasweep.errors, lorasweep.config.compose, lorasweep.report
from lorasweep.cli import run
def check(what):
    assert not {'torch', 'lightning', 'optuna', 'transformers'} & set(sys.modules), what
check("imports")
EXPORT = ["export", "nowhere", "--format", "peft", "--out", "out"]
NOWHERE = [[name, "nowhere"] for name in ("compare", "status", "reproduce")]
for words in (["--help"], ["train", "--cfg", "job"], EXPORT, *NOWHERE):
    try:
        run(words)
    except SystemExit:
        pass
    check(words)
"""


PLAIN_TORCH = """
import sys, lorasweep.lora
assert not {'lightning', 'optuna', 'hydra', 'peft', 'submitit'} & set(sys.modules)
"""
WITHOUT_COLLECTIONS = """
import gc
from lorasweep.training.torch_variables import quick_imports
with quick_imports():
    assert not gc.isenabled()
    import torch
assert gc.isenabled()
assert gc.get_freeze_count() > 100_000  # so that no collection looks at what was imported
assert len(gc.get_objects()) < 1_000
"""


@pytest.mark.parametrize("code", [QUICK, PLAIN_TORCH, WITHOUT_COLLECTIONS], ids=["quick", "torch alone", "collections"])
def test_imports_load_nothing_heavy(code):
    done = run_python(code)
    assert done.returncode == 0, done.stderr


BUDGET = [f"{key}={value}" for key, value in TWO_STEPS.items()]
HELP_OF_EACH = """
import runpy, sys
for file in sys.argv[1:]:
    sys.argv = [file, "--help"]
    try:
        runpy.run_path(file, run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 0, file
"""


@pytest.mark.release
def test_every_benchmark_starts():
    scripts = sorted((ROOT / "benchmarks").glob("*.py"))
    files = [file for file in scripts if "__main__" in file.read_text()]  # another one is imported by these
    done = subprocess.run(
        [sys.executable, "-c", HELP_OF_EACH, *map(str, files)],  # one process, which imports torch once
        env={"PYTHONPATH": f"{SOURCE}:{ROOT / 'benchmarks'}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert [file.name for file in files if f"usage: {file.name}" not in done.stdout] == []


@pytest.mark.release
def test_a_wheel_works_without_the_checkout(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("lorasweep-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = [file for folder in ("conf", "sweeps") for file in packaged_folder(folder).rglob("*.yaml")]
    assert {f"lorasweep/{file.relative_to(ROOT).as_posix()}" for file in shipped} <= names
    assert {"lorasweep/models/tiny/model.safetensors", "lorasweep/py.typed"} <= names
    installed = tmp_path / "installed"
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(installed), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    done = run_python(
        "import lorasweep, sys\n"
        "from lorasweep.cli import run\n"
        "assert 'installed' in lorasweep.__file__\n"
        f"sys.exit(run(['train', 'method=frozen', *{BUDGET}]))",
        cwd=tmp_path,
        source=installed,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "train" / "0001" / "run.json").is_file()


def list_tracked():
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    return [ROOT / name for name in done.stdout.split("\0") if name] if done.returncode == 0 else []


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_tracked_file_names_this_checkouts_folder():
    places = [str(ROOT).encode(), str(Path.home()).encode() + b"/"]
    tracked = [file for file in list_tracked() if file.is_file()]
    assert len(tracked) > 50
    naming = [file.relative_to(ROOT).as_posix() for file in tracked if any(p in file.read_bytes() for p in places)]
    assert naming == []


PACKAGE = Path(lorasweep.__file__).parent
ARCHITECTURE = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()


def test_the_tree_is_the_codes():
    (tree,) = re.findall(r"```text\n(.*?)```", ARCHITECTURE, flags=re.DOTALL)
    drawn = {line.split()[0] for line in tree.splitlines()}
    packages = {f"{path.parent.relative_to(PACKAGE)}/" for path in PACKAGE.rglob("__init__.py")} - {"./"}
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert drawn == packages | modules


def read_path(page):
    """Rows of the paths of a page: file, and the function in it."""
    return re.findall(r"^\d+\. `([\w/]+\.py)`: `(\w+)`", page, flags=re.MULTILINE)


def test_every_step_of_a_path_is_a_function_of_its_file_and_a_trial_of_one_class():
    assert read_path(ARCHITECTURE)
    for file, function in read_path(ARCHITECTURE):
        names = {node.name for node in ast.walk(ast.parse((PACKAGE / file).read_text())) if hasattr(node, "name")}
        assert function in names, file
    of_trial = ARCHITECTURE.split("\n## The path of a trial\n")[1].split("\n## ")[0]
    handled = [file for file, _ in read_path(of_trial) if file.startswith(("sweep/controller", "report"))]
    for file in handled:
        names = {node.id for node in ast.walk(ast.parse((PACKAGE / file).read_text())) if isinstance(node, ast.Name)}
        assert "Trial" in names, file


def test_every_file_that_is_named_is_there():
    for name in re.findall(r"`((?:[a-z_]+/)+[\w.]*)`", ARCHITECTURE):
        roots = (PACKAGE, PACKAGE.parents[1])
        assert any((root / name).exists() for root in roots) or "NAME" in name, name
