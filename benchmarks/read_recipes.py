"""Counts what `lorasweep new --like` does with stock training files of axolotl, TRL and LLaMA-Factory.

    git clone --depth 1 https://github.com/axolotl-ai-cloud/axolotl
    python benchmarks/read_recipes.py axolotl/examples
    python benchmarks/read_recipes.py axolotl/examples --only adapter=lora,qlora

Each file is read as it is. If it is taken, a sweep is drafted with the embedded model and with stand-in data that have
the columns which the file names, and its settings are printed as `sweep --cfg job` prints them. Files of the other
tools are no part of this repository.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import traceback
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lorasweep.errors import ConfigError
from lorasweep.recipes.keys import UNKNOWN_KEY
from lorasweep.recipes.read import TOOLS, Recipe, load_table, read_recipe
from lorasweep.sweep.definition.arms import describe_definition, read_definition
from lorasweep.sweep.draft import draft_sweep
from lorasweep.training.inputs import InputsCache

NUM_ROWS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with the tool's files")
    parser.add_argument("--only", default="", help="KEY=VALUE,VALUE: only files whose key has one of these values")
    parser.add_argument("--output", type=Path, help="file for the counts, as JSON")
    arguments = parser.parse_args()
    key, _, values = arguments.only.partition("=")
    paths = sorted(path for path in arguments.folder.rglob("*.y*ml") if path.is_file())
    contents = {path: load(path) for path in paths}
    if key:
        contents = {path: content for path, content in contents.items() if str(content.get(key)) in values.split(",")}
    others = [path for path, content in contents.items() if not is_recipe(content)]
    ends: Counter[str] = Counter({"no training file": len(others)})
    reasons: Counter[str] = Counter()
    not_followed: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for path, content in contents.items():
            if path not in others:
                end, recipe = read_one(path, Path(folder))
                ends[end.partition(": ")[0]] += 1
                reasons.update([end.partition(": ")[2]] if ": " in end else [])
                if recipe is not None:
                    ends["keys without a list"] += sum(key not in list_keys(recipe) for key in content)
                    unknown.update(key for key, why in recipe.keys.not_followed.items() if why == UNKNOWN_KEY)
                    not_followed.update({*recipe.keys.not_followed.values()})
    found = {"files": len(contents), **ends}
    print(json.dumps(found, indent=1))
    for title, counts in (("refused", reasons), ("not followed", not_followed), ("unknown", unknown)):
        print(f"{title}:")
        for reason, count in counts.most_common(12):
            print(f"  {count:4d}  {reason}")
    if arguments.output:
        arguments.output.write_text(json.dumps({**found, "refused": reasons, "not followed": not_followed}, indent=1))


def load(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def is_recipe(content: Mapping[str, Any]) -> bool:
    """Returns whether a file has the keys by which a tool is recognised; others start processes, or describe data."""
    return any(not content.keys().isdisjoint(load_table(name)["recognised_by"]) for name in TOOLS)


def list_keys(recipe: Recipe) -> set[str]:
    """Returns the keys of a file that are in one of the lists."""
    keys = recipe.keys
    listed = [*keys.followed, *keys.not_followed, *keys.refused, *recipe.defaults]
    return {*listed, *(key.partition(".")[0] for key in listed)}


def read_one(path: Path, folder: Path) -> tuple[str, Recipe | None]:
    """Returns how one file ended, with the first refused key and its reason, and the file as it was read."""
    try:
        try:
            recipe, end = read_recipe(path), "accepted"
        except ConfigError as error:
            key, _, reason = str(error).partition(" can. ")[2].partition(": ")
            recipe, end = read_recipe(path, has_data=True), f"accepted with other data: {key}: {reason}"
        draft_one(recipe, folder)
    except ConfigError as error:
        key, _, reason = str(error).partition(" can. ")[2].partition(": ")
        return (f"refused: {key}: {reason.partition(';')[0]}" if key else f"refused: {error}"), None
    except Exception:
        traceback.print_exc()
        return "traceback", None
    return end, recipe


def draft_one(recipe: Recipe, folder: Path) -> None:
    """Drafts a sweep for a file with stand-ins, and describes all its settings. Raises ConfigError if it is none."""
    data = folder / ("data.txt" if recipe.settings.get("data") == "text" else "data.jsonl")
    data.write_text("\n".join(write_row(recipe.settings, number) for number in range(NUM_ROWS)))
    stand_ins = {"model.path": "embedded:tiny", "model.quantization": "none", "data.train": str(data)}
    if data.suffix == ".txt":
        stand_ins["data.block_length"] = 128
    with contextlib.redirect_stderr(io.StringIO()):
        draft = draft_sweep(folder / "draft.yaml", stand_ins, InputsCache(), recipe=recipe)
    quantization = recipe.settings.get("model.quantization", "none")  # which the embedded model is too narrow for
    theirs = [f"model.quantization={quantization}"]
    describe_definition(read_definition(yaml.safe_load(draft.text), theirs))


def write_row(settings: Mapping[str, Any], number: int) -> str:
    """Returns a row with the columns that the settings name, or a line of text."""
    if settings.get("data") == "text":
        return f"Line {number} has {number % 7} words and some more text that a small model may learn."
    messages = [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": f"{number}"}]
    texts = {"prompt": f"say {number}", "input": "twice", "completion": f"{number}", "messages": messages}
    if settings.get("data") == "preferences":
        texts = {"prompt": f"say {number}", "chosen": f"{number}", "rejected": "no"}
    usual = ("chosen", "rejected", "prompt") if settings.get("data") == "preferences" else ("prompt", "completion")
    named = {
        key.partition("data.")[2]: column for key, column in settings.items() if key.partition("data.")[2] in texts
    }
    columns = named or dict.fromkeys(usual)
    if settings.get("data") == "preferences":
        columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"} | named
    return json.dumps({column or key: texts[key] for key, column in columns.items()})


if __name__ == "__main__":
    main()
