"""Reads a training file of another tool: its settings in our words, and the list in which each of its keys is.

The file is data: nothing in it is run, and no tag is followed. The tables in `config/other_names.yaml` say
what each key means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from lorasweep.config.compose import compose_run
from lorasweep.config.other_names import read_tables
from lorasweep.config.run import ALPHA, LR, RANK, SCALING, STEPS_KEY
from lorasweep.errors import ConfigError
from lorasweep.recipes.data_sets import read_data_sets
from lorasweep.recipes.keys import MappedKeys, find_key, sort_keys
from lorasweep.tasks import DATA, PLAIN_TEXT
from lorasweep.wording import join_words, shorten

TOOLS = ("axolotl", "llamafactory", "trl")
"""The tables, in the order in which they are tried: TRL's first key is also one of LLaMA-Factory."""
WARMUP_KEYS = ("warmup_ratio", "warmup_steps")
BETA, LR_RATIO = "objective.beta", "optim.lr_ratio_b"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training file of another tool."""

    path: Path
    tool: str
    settings: Mapping[str, Any]
    """Our settings of all arms by dotted key: model, data, optimizer without its rate, schedule, trainer, objective."""
    method: Mapping[str, Any]
    """Our settings of the method that the file trains, with its rank."""
    lr: float
    epochs: float
    warmup_steps: float
    """Steps of warm-up, if the file gives them instead of a share; else 0."""
    length: int
    """Maximum number of tokens of an example, or the number of tokens of a block of text."""
    keys: MappedKeys
    defaults: Mapping[str, Any]
    """Values that the tool takes for keys that the file lacks."""
    texts: Mapping[str, Any]
    """Settings of data whose prompts are texts instead of messages."""
    batch: str
    """How the batch size follows from their keys."""

    def describe(self) -> list[str]:
        """Returns lines that have each key of the file in its list."""
        given = [f"{key} {value}" for key, value in self.defaults.items() if value is not None]
        lines = [f"{self.path.name} is read as a file of {self.tool}.", f"Followed: {', '.join(self.keys.followed)}."]
        lines += [f"Followed as {self.tool}'s defaults: {', '.join(given)}."] if given else []
        for title, keys in (
            ("Not followed", self.keys.not_followed),
            ("Refused, so other data are named", self.keys.refused),
        ):
            reasons: dict[str, list[str]] = {}
            for key, why in keys.items():
                reasons.setdefault(why, []).append(key)
            lines += [f"{title}: {', '.join(names)} ({why})." for why, names in reasons.items()]
        return lines


def read_recipe(path: Path, *, has_data: bool = False) -> Recipe:
    """Returns the settings and the keys of another tool's training file.

    Args:
        path: The file.
        has_data: Whether the user names other data, so that data of the file that can't be read do not matter.

    Raises:
        ConfigError: It is no such file, a value is wrong, or a key is refused.
    """
    values = _load(path)
    name = next((name for name in TOOLS if not values.keys().isdisjoint(load_table(name)["recognised_by"])), None)
    if name is None:
        named = [f"`{load_table(name)['recognised_by'][0]}` ({load_table(name)['name']})" for name in TOOLS]
        raise ConfigError(
            f"{str(path)!r} must be a training file of axolotl, TRL or LLaMA-Factory, with "
            f"{join_words(named, last='or')}, but has the keys {shorten(list(values), 200)}."
        )
    table = load_table(name)
    for group in [key for key in table.get("nested", ()) if isinstance(values.get(key), dict)]:
        values |= {f"{group}.{key}": value for key, value in values.pop(group).items()}
    found = sort_keys({key: value for key, value in values.items() if key not in table["data_keys"]}, table)
    is_dpo = found.settings.get("recipe.loss") == "dpo" or BETA in found.settings  # TRL's command names the stage
    stage = found.settings.get("recipe.stage") or ("dpo" if is_dpo and "stage" not in table["defaults"] else "sft")
    has_warmup = any(values.get(key) is not None for key in WARMUP_KEYS)
    defaults = {
        key: value[stage] if isinstance(value, dict) else value
        for key, value in table["defaults"].items()
        if values.get(key) is None and not (has_warmup and key in WARMUP_KEYS)
    }
    found.add(sort_keys(defaults, table))
    facts = found.pop_facts()
    data = read_data_sets(values, table, stage=stage, folder=path.parent)
    if refused := {**found.refused, **({} if has_data else data.refused)}:
        reasons = "; ".join(f"`{key}`: {why}" for key, why in refused.items())
        raise ConfigError(f"{str(path)!r} must train LoRA or all weights on text, as lorasweep can. {reasons}.")
    if ALPHA not in found.settings and "alpha_over_rank" in table:
        found.add(sort_keys(follows := {"lora_alpha": table["alpha_over_rank"] * found.settings[RANK]}, table))
        defaults |= follows
    for ours in (LR,) if facts["adapter"] == "full" else (LR, RANK, ALPHA):
        if ours not in found.settings:
            key, tool = find_key(table, ours), table["name"]
            raise ConfigError(f"{str(path)!r} must have `{key}`, but it is missing, and {tool} has no default. Add it.")
    found.add(data)
    recipe = _combine(path, table, found, facts, stage=stage, defaults=defaults)
    known = {key: value for key, value in recipe.settings.items() if "data" in recipe.settings or "data." not in key}
    try:
        compose_run({"model": "causal_lm", **known, **recipe.method, LR: recipe.lr}, require_all=False)
    except ConfigError as error:
        theirs = [key for key, ours in found.followed.items() if f"{error.key}.".startswith(f"{ours}.")]
        raise ConfigError(f"{str(path)!r}: {error}{f' There it is `{theirs[0]}`.' if theirs else ''}") from error
    return recipe


def _load(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file. Raises ConfigError if it is none."""
    try:
        content = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"a training file must be a YAML file, but {str(path)!r} can't be read: {reason}.") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"a training file must have keys and values, but {str(path)!r} has {shorten(content)}.")
    return {str(key): value for key, value in content.items()}


def _combine(
    path: Path,
    table: Mapping[str, Any],
    found: MappedKeys,
    facts: Mapping[str, Any],
    *,
    stage: str,
    defaults: Mapping[str, Any],
) -> Recipe:
    """Returns the settings that follow from several keys together."""
    settings, method = dict(found.settings), {}
    is_full = facts["adapter"] == "full"
    for key in [key for key in settings if key.startswith(("method.", LR_RATIO))]:
        method[key] = settings.pop(key)
    useless = {
        "objective.": stage != "dpo",
        "method.": is_full,
        LR_RATIO: is_full or facts.get("dora"),
        "optim.beta": settings.get("optim") != "adamw",
    }
    if settings.get("data") == PLAIN_TEXT:
        known = {"data", *(f"data.{field.name}" for field in fields(DATA[PLAIN_TEXT]))}
        of_data = {key: ours for key, ours in found.followed.items() if ours.partition(".")[0] == "data"}
        for key in [key for key, ours in of_data.items() if ours not in known]:
            settings.pop(found.followed.pop(key))
            found.not_followed[key] = "plain text is read as a whole"
    for key, ours in [*found.followed.items()]:
        if any(ours.startswith(start) and is_useless for start, is_useless in useless.items()):
            found.not_followed.update({} if key in defaults else {key: "what it sets is not trained here"})
            del found.followed[key]
            settings.pop(ours, None)
            method.pop(ours, None)
    if stage in table["stage_data"]:
        settings.setdefault("data", table["stage_data"][stage])
    micro_batch, accumulate = facts["micro_batch"], facts["accumulate"]
    if "batch" in facts:
        accumulate = max(1, facts["batch"] // micro_batch)
    settings["trainer.batch_size"], settings["trainer.accumulate"] = micro_batch * accumulate, accumulate
    if facts.get("max_steps", 0) > 0:
        settings[STEPS_KEY] = facts["max_steps"]
    if "clip_norm" in facts:
        settings["optim.clip_norm"] = facts["clip_norm"] or None
    if "min_lr_rate" in facts:
        settings |= {"schedule": "cosine", "schedule.min_lr_rate": facts["min_lr_rate"]}
    steps, ratio = facts.get("warmup_steps") or 0, facts.get("warmup_ratio", 0.0)
    if 0 < steps < 1:  # transformers reads it as a share
        steps, ratio = 0, steps
    if "schedule.warmup_fraction" in settings:  # the tools' `constant` has no warm-up
        steps, ratio = 0, 0.0
    settings["schedule.warmup_fraction"] = ratio
    if str(facts.get("template", "")).endswith(".jinja"):
        settings["data.template"] = facts["template"]
    return Recipe(
        path=path,
        tool=table["name"],
        settings=settings,
        method={"method": "full"} if is_full else _combine_lora(method, facts, found),
        lr=settings.pop(LR),
        epochs=facts["epochs"],
        length=facts["length"],
        warmup_steps=steps,
        keys=found,
        defaults={key: value for key, value in defaults.items() if found.followed.pop(key, None)},
        texts={} if "data.template" in settings else table.get("texts", {}),
        batch=f"{micro_batch} × {accumulate} accumulated on one GPU; multiply by your GPUs",
    )


def _combine_lora(method: dict[str, Any], facts: Mapping[str, Any], found: MappedKeys) -> dict[str, Any]:
    targets = "all-linear" if facts.get("all_linear") else facts.get("targets")
    if not targets:
        found.not_followed["lora_target_modules"] = (
            "it is missing, so PEFT chooses layers by the model's name, often q_proj and v_proj; here all linear layers"
        )
    method["method.targets"] = list(targets) if isinstance(targets, tuple) else targets or "all-linear"
    if not facts.get("dora"):
        return {"method": "lora", **method}
    # PEFT trains DoRA, by its own names
    config = {theirs: method[ours] for theirs, ours in read_tables()["common"]["peft"].items() if ours in method}
    is_rs = method.get(SCALING) == "alpha_over_sqrt_rank"
    return {"method": "peft", "method.config": {"peft_type": "LORA", "use_dora": True, "use_rslora": is_rs, **config}}


def load_table(name: str) -> Mapping[str, Any]:
    """Returns the table of a tool, which says what each of its keys means here, and the lists that all tools share."""
    return {**read_tables()["common"], **read_tables()[name]}
