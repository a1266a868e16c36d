"""Writes the settings that a sweep decided into a training file of another tool, and nothing else.

Comments, quotes and order stay; spacing may become more even. The result is read again and compared before a file is
written.
"""

from __future__ import annotations

import io
import itertools
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.representer import RoundTripRepresenter

from lorasweep.config.build import as_settings, dotted_items
from lorasweep.config.compose import compose_run
from lorasweep.config.method import LoraConfig, int_if_whole
from lorasweep.config.run import ALPHA, LR, RANK, SCALING, SEED_KEYS, STEPS_KEY
from lorasweep.disk import write_atomically
from lorasweep.errors import ConfigError, RecordError, first_line
from lorasweep.recipes.keys import find_key
from lorasweep.recipes.read import load_table, read_recipe
from lorasweep.record import RunRecord, restore_config
from lorasweep.wording import join_words

OWN_COMMENT = re.compile(r"\s*# lorasweep: .*")
"""The comment of an earlier export, which a new one replaces. It is the last comment of its line."""
FIRST_LIST = re.compile(r"^( *)[^\s#-].*:[ ]*(?:#.*)?\r?\n( *)- ", re.MULTILINE)
"""The first list below a key, whose indent is that of all lists of most files."""
PEFT_ALPHA, LENGTH_KEY = "method.config.lora_alpha", "data.max_length"
MAX_RATIO = 2.0
"""Largest ratio of the steps, or of the tokens of an example, of a file and a run, up to which a rate is written."""
ALWAYS_DECIDED = {RANK, ALPHA, SCALING, LR, PEFT_ALPHA, "method.config.r", "method.config.use_rslora", "objective.beta"}
"""The keys that are written even if the sweep did not search them, because rank and rate hold with these alone."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A key of another tool's file with its new value."""

    key: str
    value: Any
    of: str = ""
    """The dotted key here."""
    why: str = ""
    """The evidence for the value, for a comment."""
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


def write_recipe(path: Path, *, tool: str, run: RunRecord, evidence: Mapping[str, str], otherwise: str) -> list[Change]:
    """Writes the decided settings of a run into a training file, whole or not at all.

    `evidence` has each searched key with the evidence for its value, and `otherwise` is that of all other keys.

    Raises:
        ConfigError: The file is of another tool, can't be read or written, or trains in another way than the run,
            or its steps or their tokens differ by more than a factor of `MAX_RATIO`.
        RecordError: The run is not complete.
    """
    if run.status != "complete":
        raise RecordError(f"a run must be complete to be written into a file, but is {run.status}. Name another one.")
    config, table = restore_config(run), load_table(tool)
    settings, num_steps = dict(dotted_items(as_settings(config))), config.trainer.max_steps
    wanted, recipe = list_changes(tool, settings, evidence), read_recipe(path, has_data=True)
    wanted = [replace(change, why=evidence.get(change.of, otherwise)) for change in wanted]
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
    length = settings.get(LENGTH_KEY)
    if length and theirs[LENGTH_KEY] > length and not run.data.get("train", {}).get("truncated"):
        theirs[LENGTH_KEY] = length  # nothing was cut off, so a step has the same tokens
    known = {*evidence, *(ALWAYS_DECIDED & settings.keys())}
    ratios = {key: theirs[key] / settings[key] for key in (STEPS_KEY, LENGTH_KEY) if settings.get(key)}
    far = [key for key, ratio in ratios.items() if not 1 / MAX_RATIO <= ratio <= MAX_RATIO]
    if wrong := _list_differences(table, table["must_agree"], theirs, settings, known=known):
        raise ConfigError(
            f"{str(path)!r} must train as the run did, because rank and rate hold for that alone, but "
            f"{join_words(wrong)}. Nothing was written. Change the file, or sweep as it trains: "
            f"`lorasweep new mine.yaml --like {path}`."
        )
    if far:
        differs = join_words(_list_differences(table, far, theirs, settings, known=()))
        raise ConfigError(
            f"{str(path)!r} must train about as long as the run, because the best rate depends on it, but {differs}. "
            f"Nothing was written. Sweep as it trains (`lorasweep new mine.yaml --like {path}`)."
        )
    if all(theirs.get(key) == settings[key] for key in known & settings.keys()):  # perhaps by the tool's defaults
        wanted = []
    if "lora_target_modules" in recipe.keys.not_followed:  # it is missing, and PEFT would choose some of the layers
        wanted += [Change(key=key, value=value, why=otherwise) for key, value in table["all_linear"].items()]
    try:
        text, mode = path.read_bytes().decode(), path.stat().st_mode
        edited, changes = edit_text(text, wanted, name=str(path))
        if changes:
            write_atomically(path.resolve(), edited.encode())  # of a link, the file that it names
            path.chmod(mode)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"`--into` must be a file in UTF-8 that can be written, but {str(path)!r} is not: {error}."
        ) from error
    return changes


def _list_differences(
    table: Mapping[str, Any],
    keys: Sequence[str],
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    *,
    known: Collection[str],
) -> list[str]:
    """Returns a clause for each key of a list with another value in the file than in the run.

    Only an objective's key has a value if it is missing; other methods and kinds of data have other keys.
    """

    def read(settings: Mapping[str, Any], key: str) -> Any:
        value = settings.get(key)
        if key == "model.path":  # the folder of a base does not matter
            return str(value).rstrip("/").rpartition("/")[2]
        return sorted(value) if isinstance(value, list | tuple) else value or None

    common = theirs.keys() & ours.keys() | {key for key in keys if key.startswith("objective.")}
    different = [key for key in keys if key in common - {*known} and read(theirs, key) != read(ours, key)]
    return [
        f"`{find_key(table, key) or key}` is {theirs.get(key)} there and {ours.get(key)} in the run"
        for key in different
    ]


def list_changes(tool: str, settings: Mapping[str, Any], swept: Collection[str]) -> list[Change]:
    """Returns the lines of a tool's file with the swept keys, and with rank, α, its rule and the rate.

    Raises ConfigError if the run has no LoRA, or a value that the tool's keys can't have.
    """
    table, found = load_table(tool), dict(settings)
    decided = {key: theirs for key in table["decided"] if (theirs := find_key(table, key))}
    if "lora" not in (found["method.name"], str(found.get("method.config.peft_type")).lower()):
        got = f"`method={found['method.name']}`"
        raise ConfigError(f"`--into` must get a run with LoRA, but got {got}. Name a LoRA arm: `SWEEP/ARM`.")
    if found.get(SCALING) == "alpha":  # no tool has this rule
        found |= {ALPHA: found[ALPHA] * found[RANK], SCALING: LoraConfig.scaling}
    lost = [key for key in swept if key not in decided and key not in SEED_KEYS]
    alpha = found.get(ALPHA, found.get(PEFT_ALPHA, 0))
    if lost := [*lost, *([ALPHA] if alpha != int(alpha) else [])]:  # the tools declare α as a whole number
        named = join_words([f"`{key}={found.get(key)}`" for key in lost])
        raise ConfigError(
            f"each decided value must have a key in {tool}'s file, but {named} has none. Write it by hand."
        )
    changes = []
    for key in [key for key in decided if key in found and key in {*ALWAYS_DECIDED, *swept}]:
        rule = table["followed"][decided[key]]
        values = rule.get("values", {}) if isinstance(rule, dict) else {}
        value = next((one for one, ours in values.items() if ours == found[key]), found[key])
        changes.append(Change(key=decided[key], value=value, of=key))
    return changes


def edit_text(text: str, wanted: Sequence[Change], *, name: str) -> tuple[str, list[Change]]:
    """Returns a file's text with the wanted values, and the changes of keys that had another value or none.

    Order, comments and quotes stay, and missing keys stand at the end. Raises ConfigError with the lines to write by
    hand if another value would change.
    """
    before, changed = yaml.safe_load(text), list[Change]()
    tool = YAML()
    tool.preserve_quotes, tool.width, tool.explicit_start = True, sys.maxsize, text.startswith("---")
    tool.Representer = NullRepresenter if re.search(r": +null\b", text) else RoundTripRepresenter
    offset = len(found[2]) - len(found[1]) if (found := FIRST_LIST.search(text)) else 0
    tool.indent(sequence=offset + 2, offset=offset)
    try:
        content = tool.load(text.replace("\r\n", "\n"))
        for change in wanted:
            key, comment, old = change.key, "", None
            if key in before and _read_value(before[key]) == change.value:
                continue
            if key in before:
                old = "empty" if before[key] is None else str(before[key])
                if key in content.ca.items:  # also has the empty lines and comments that follow the line
                    comment = content.ca.items.pop(key)[2].value
            elif change.value is False:  # what is switched off is off if it is missing
                continue
            content[key] = tool.load(change.text)
            own, newline, after = comment.partition("\n")
            mark = f"# lorasweep: {'new' if old is None else f'was {old}'}; {change.why}"
            comment = f"{OWN_COMMENT.sub('', own)}  {mark}".strip() + newline + after
            content.yaml_add_eol_comment(comment, key, column=0)
            changed.append(replace(change, old=old))
        tool.dump(content, stream := io.StringIO())
        edited = stream.getvalue().replace("\n", "\r\n" if "\r\n" in text else "\n")
        now = yaml.safe_load(edited)
    except YAMLError as error:
        raise ConfigError(f"{name!r} must be YAML that has each key once, but is not: {first_line(error)}.") from error
    keys = {change.key for change in changed}
    if any(repr(before.get(key)) != repr(now.get(key)) for key in {*before, *now} - keys):  # NaN does not equal itself
        lines = join_words([f"`{change.line}`" for change in wanted])
        raise ConfigError(f"{name!r} can't be written without another change. Write by hand: {lines}.")
    return edited, changed


class NullRepresenter(RoundTripRepresenter):
    """Writes empty values as `null`, for files that write them so."""


NullRepresenter.add_representer(type(None), lambda one, _: one.represent_scalar("tag:yaml.org,2002:null", "null"))


def _read_value(value: Any) -> Any:
    """Returns a value as the tools take it: `1e-4` is a text for PyYAML, and they make a number of it."""
    with suppress(TypeError, ValueError, yaml.YAMLError):
        read = yaml.safe_load(value) if isinstance(value, str) else value
        return read if isinstance(read, bool) else float(read)
    return value
