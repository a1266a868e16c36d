"""Writes the settings that a sweep decided into a training file of another tool, and nothing else.

Only the lines of the decided keys change. The result is parsed again and compared before a file is written.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lorasweep.config.build import as_settings, dotted_items
from lorasweep.config.compose import compose_run
from lorasweep.config.method import LoraConfig, int_if_whole
from lorasweep.config.run import ALPHA, LR, RANK, SCALING, SEED_KEYS, STEPS_KEY
from lorasweep.disk import write_atomically
from lorasweep.errors import ConfigError, RecordError
from lorasweep.recipes.read import load_table, read_recipe
from lorasweep.record import RunRecord, restore_config
from lorasweep.wording import join_words

NEWLINE = re.compile(r"\r\n|\r|\n")
OWN_COMMENT = re.compile(r"\s*# lorasweep: .*")
"""The comment of an earlier export, which a new one replaces. It is the last comment of its line."""
PEFT_ALPHA, TARGETS, WARMUP = "method.config.lora_alpha", "method.targets", "schedule.warmup_fraction"
ALWAYS_DECIDED = {RANK, ALPHA, SCALING, LR, PEFT_ALPHA, "method.config.r", "method.config.use_rslora", "objective.beta"}
"""The keys that are written even if the sweep did not search them, because rank and rate hold with these alone."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A key of another tool's file with its new value."""

    key: str
    value: Any
    old: str | None = None
    """The value as the file has it; None if the key is missing."""

    @property
    def text(self) -> str:
        """The value as YAML. YAML 1.1 reads `1e-05` as a text, and `1.0e-05` as a number."""
        plain = int_if_whole(self.value) if isinstance(self.value, float) else self.value
        return str(yaml.safe_dump(plain)).partition("\n")[0]

    @property
    def line(self) -> str:
        return f"{self.key}: {self.text}"


def write_recipe(
    path: Path, *, tool: str, run: RunRecord, swept: Collection[str], evidence: str
) -> tuple[list[Change], list[str]]:
    """Writes the decided settings of a run into a training file, whole or not at all.

    The `swept` keys were searched, and `evidence` says how good the run is. Returns the changes, and sentences on
    differences between the file and the run that may move the best rate.

    Raises:
        ConfigError: The file is of another tool, can't be read or written, or trains in another way than the run.
        RecordError: The run is not complete.
    """
    if run.status != "complete":
        raise RecordError(f"a run must be complete to be written into a file, but is {run.status}. Name another one.")
    config, table = restore_config(run), load_table(tool)
    settings, num_steps = dict(dotted_items(as_settings(config))), config.trainer.max_steps
    wanted, recipe = list_changes(tool, settings, swept), read_recipe(path, has_data=True)
    if recipe.tool != table["name"]:
        raise ConfigError(f"`--format {tool}` must get a file of that tool, but {str(path)!r} is one of {recipe.tool}.")
    others = {key: value for key, value in recipe.settings.items() if not key.startswith("data")}
    composed = compose_run({"model": "causal_lm", **others, **recipe.method}, require_all=False)
    theirs = dict(dotted_items(as_settings(composed)))
    theirs |= {LR: recipe.lr, "data.max_length": recipe.length, STEPS_KEY: recipe.settings.get(STEPS_KEY, num_steps)}
    for one, group in itertools.product((theirs, settings), ("optim", "schedule")):  # of a component, its class
        one.setdefault(f"{group}.name", one.get(f"{group}._target_"))
    if STEPS_KEY not in recipe.settings and run.epochs:
        theirs[STEPS_KEY] = round(num_steps * recipe.epochs / run.epochs)
    if recipe.warmup_steps:
        theirs[WARMUP] = recipe.warmup_steps / num_steps
    for key, room in ((STEPS_KEY, num_steps / 20), (WARMUP, 1 / num_steps)):  # tools round in other ways
        if abs(theirs.get(key, 0) - settings.get(key, 0)) <= room:
            theirs[key] = settings.get(key)
    known = {*swept, *(ALWAYS_DECIDED & settings.keys())}
    if wrong := _list_differences(table["must_agree"], theirs, settings, known=known):
        raise ConfigError(
            f"{str(path)!r} must train as the run did, because rank and rate hold for that alone, but "
            f"{join_words(wrong)}. Nothing was written. Change the file, or sweep as it trains: "
            f"`lorasweep new mine.yaml --like {path}`."
        )
    notes = _list_differences(table["may_differ"], theirs, settings, known=known)
    if all(theirs.get(key) == settings[key] for key in known & settings.keys()):  # perhaps by the tool's defaults
        wanted = []
    if "lora_target_modules" in recipe.keys.not_taken:  # it is missing, and PEFT would choose some of the layers
        wanted += [Change(key=key, value=value) for key, value in table["decided"][TARGETS].items()]
    try:
        text, mode = path.read_bytes().decode(), path.stat().st_mode
        edited, changes = edit_text(text, wanted, name=str(path), evidence=evidence)
        if not os.access(path, os.W_OK) or not mode & stat.S_IWUSR:
            raise PermissionError("it is read-only")
        if changes:
            write_atomically(path.resolve(), edited.encode())  # of a link, the file that it names
            path.chmod(mode)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"`--into` must be a file in UTF-8 that can be written, but {str(path)!r} is not: {error}."
        ) from error
    batch = f"A step has {config.trainer.batch_size} examples in the run. In the file: {recipe.batch}."
    return changes, [*(f"The best rate may be a little different: {note}." for note in notes), batch]


def _list_differences(
    names: Mapping[str, str], theirs: Mapping[str, Any], ours: Mapping[str, Any], *, known: Collection[str]
) -> list[str]:
    """Returns a clause for each of the keys in `names` with another value in the file than in the run.

    Only an objective's key has a value if it is missing; other methods and kinds of data have other keys.
    """

    def read(settings: Mapping[str, Any], key: str) -> Any:
        value = settings.get(key)
        if key == "model.path":  # the folder of a base does not matter
            return str(value).rstrip("/").rpartition("/")[2]
        return sorted(value) if isinstance(value, list | tuple) else value or None

    common = theirs.keys() & ours.keys() | {key for key in names if key.startswith("objective.")}
    different = [key for key in names if key in common - {*known} and read(theirs, key) != read(ours, key)]
    return [f"`{names[key]}` is {theirs.get(key)} there and {ours.get(key)} in the run" for key in different]


def list_changes(tool: str, settings: Mapping[str, Any], swept: Collection[str]) -> list[Change]:
    """Returns the lines of a tool's file with the swept keys, and with rank, α, its rule and the rate.

    Raises ConfigError if the run has no LoRA, or a value that the tool's keys can't have.
    """
    decided, taken, found = load_table(tool)["decided"], load_table(tool)["taken"], dict(settings)
    if "lora" not in (found["method.name"], str(found.get("method.config.peft_type")).lower()):
        got = f"`method={found['method.name']}`"
        raise ConfigError(f"`--into` must get a run with LoRA, but got {got}. Name a LoRA arm: `SWEEP/ARM`.")
    if found.get(SCALING) == "alpha":  # no tool has this rule
        found |= {ALPHA: found[ALPHA] * found[RANK], SCALING: LoraConfig.scaling}
    lost = [key for key in swept if not isinstance(decided.get(key), str) and key not in SEED_KEYS]
    alpha = found.get(ALPHA, found.get(PEFT_ALPHA, 0))
    if lost := [*lost, *([ALPHA] if alpha != int(alpha) else [])]:  # the tools declare α as a whole number
        named = join_words([f"`{key}={found.get(key)}`" for key in lost])
        raise ConfigError(
            f"each decided value must have a key in {tool}'s file, but {named} has none. Write it by hand."
        )
    changes = []
    for key in [key for key in decided if key in found and key in {*ALWAYS_DECIDED, *swept}]:
        rule = taken[decided[key]]
        values = rule.get("values", {}) if isinstance(rule, dict) else {}
        value = next((one for one, ours in values.items() if ours == found[key]), found[key])
        changes.append(Change(key=decided[key], value=value))
    return changes


def edit_text(text: str, wanted: Sequence[Change], *, name: str, evidence: str) -> tuple[str, list[Change]]:
    """Returns a file's text with the wanted values, and the changes of keys that had another value or none.

    Order, comments, quotes and line ends stay. A missing key follows the nearest key before it in `wanted` that the
    text has, or the first one after it; else it stands at the end. Raises ConfigError with the lines to write by hand
    if a line can't be changed without changing something else.
    """
    root, newline, before = (
        yaml.compose(text, yaml.SafeLoader),
        (NEWLINE.search(text) or ["\n"])[0],
        yaml.safe_load(text),
    )
    # what is switched off is off if it is missing
    wanted = [change for change in wanted if change.key in before or change.value is not False]
    edits: list[tuple[int, int, str]] = []
    changed: dict[str, Change] = {}
    ends: dict[str, int] = {}
    is_safe = not root.flow_style
    for change in wanted:
        for key, node in [pair for pair in root.value if pair[0].value == change.key]:
            start, end = node.start_mark.index, node.end_mark.index
            # an alias begins where its anchor is, an empty value at the colon
            is_safe &= text[key.end_mark.index : start].strip() == ":" and text[start : start + 1] not in ("&", "!")
            is_safe &= isinstance(node, yaml.ScalarNode) and not NEWLINE.search(text, key.start_mark.index, end)
            is_safe &= change.key not in ends
            ends[change.key] = found.start() if (found := NEWLINE.search(text, end)) else len(text)
            if is_safe and _read_value(node.value) != change.value:
                changed[change.key] = replace(change, old=text[start:end] or "empty")
                quote, space, rest = node.style or "", " " * (start == end), text[end : ends[change.key]]
                comment = f"  # lorasweep: was {changed[change.key].old}; {evidence}"
                line = f"{space}{quote}{change.text}{quote}{OWN_COMMENT.sub('', rest)}{comment}"
                edits.append((start, ends[change.key], line))
    for number, change in enumerate(wanted):
        if change.key not in ends:
            near = next((one.key for one in (*wanted[:number][::-1], *wanted[number:]) if one.key in ends), None)
            place = len(text) if near is None else ends[near]
            line = f"{' ' * root.start_mark.column}{change.line}  # lorasweep: new; {evidence}"
            is_after = place < len(text) or not text.endswith(("\r", "\n"))
            edits.append((place, place, newline + line if is_after else line + newline))
            changed[change.key] = change
    parts: list[str] = []
    done = 0
    for start, end, line in sorted(edits, key=lambda edit: edit[:2]):
        parts, done = [*parts, text[done:start], line], end
    edited, after = "".join([*parts, text[done:]]), dict[str, Any]()
    with suppress(yaml.YAMLError):
        after = yaml.safe_load(edited)
    others = [[pair for pair in content.items() if pair[0] not in {*ends, *changed}] for content in (before, after)]
    has_values = all(_read_value(after.get(change.key)) == change.value for change in wanted)
    if not is_safe or not has_values or repr(others[0]) != repr(others[1]):  # NaN does not equal itself
        lines = join_words([f"`{change.line}`" for change in wanted])
        raise ConfigError(
            f"{name!r} must have each of these keys at most once, with its value on a line of its own, but has one in "
            f"another form. Nothing was written. Write by hand: {lines}."
        )
    return edited, list(changed.values())


def _read_value(value: Any) -> Any:
    """Returns a value as the tools take it: `1e-4` is a text for PyYAML, and they make a number of it."""
    with suppress(TypeError, ValueError, yaml.YAMLError):
        read = yaml.safe_load(value) if isinstance(value, str) else value
        return read if isinstance(read, bool) else float(read)
    return value
