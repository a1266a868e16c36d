"""Checks the keys, files, columns and model that a user typed, before torch is imported, which takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lorasweep.config.compose import SWEEP_GROUPS, compose_run, compose_sweep
from lorasweep.config.data import RowSettings, SplitSettings
from lorasweep.config.other_names import suggest_setting
from lorasweep.config.run import DECLARED_TYPES, RunConfig
from lorasweep.data.reading.files import find_files
from lorasweep.errors import ConfigError
from lorasweep.models.paths import find_local_path
from lorasweep.sweep.definition.overrides import Overrides
from lorasweep.tasks import DATA

PAIR_COLUMNS = ("chosen", "rejected", "anchor", "positive")
COLUMNS = ("text", "text_pair", "label", "prompt", "input", "completion", "messages", *PAIR_COLUMNS, "group")
"""Settings of data that name columns of a table."""
UNDECIDED = ("model", "data", "objective", "module", "datamodule", "metric")
"""Groups whose settings depend on the data, which a draft reads later."""
DATA_KEYS = frozenset(("data", "data.train", "data.path"))
"""Settings that name the data; one of them is enough."""
ROW_DATA = next(name for name, kind in DATA.items() if issubclass(kind, RowSettings))
"""A value of `data` for tables, with whose settings the first one is read."""
ROW_KEYS = frozenset(f"data.{field.name}" for field in fields(RowSettings)) - {"data.name", "data.metric"}
"""Settings that say how rows are read, whatever they hold."""


def check_typed(settings: Mapping[str, Any], *, needs_data: bool = True) -> None:
    """Raises ConfigError if a setting of a sweep that will be drafted is wrong, missing, or names what does not exist.

    `needs_data` is False if something else names the data.
    """
    typed = Overrides.parse(settings).values
    check_files(typed)  # first, because it takes no time
    for key in typed:
        near = (one for one in DECLARED_TYPES if f"{key}.".startswith(f"{one}.") or one.startswith(f"{key}."))
        if key.startswith(("model.", "data.")) and not any(near):
            raise ConfigError(f"`{key}` is not a setting.{suggest_setting(key, DECLARED_TYPES)}", key=key)
    if needs_data and DATA_KEYS.isdisjoint(typed):
        given = f"`{'`, `'.join(typed)}`" if typed else "nothing"
        raise ConfigError(
            "a sweep must have a name (`lorasweep sweep quickstart`) or data (`data.train=FILE`, or `data.path=HUB-ID "
            f"data.train=SPLIT`), but got {given}."
        )
    decided = {key: value for key, value in typed.items() if key.partition(".")[0] not in UNDECIDED}
    compose_run(
        {"model": "tiny", **{key: x for key, x in decided.items() if key.partition(".")[0] not in SWEEP_GROUPS}}
    )
    compose_sweep(decided)
    path = typed.get("model.path")
    model = {"model": "tiny"} if path is None else {"model": "causal_lm", "model.path": path}
    of_rows = {key: value for key, value in typed.items() if key in ROW_KEYS}
    if "data.train" in typed:
        check_sources(compose_run({"data": ROW_DATA, **model, **of_rows}, require_all=False), typed)


def check_files(settings: Mapping[str, Any]) -> None:
    """Raises ConfigError if a file of data does not exist. A name without a dot may be a split of a hub's data set."""
    for key in ("data.train", "data.validation", "data.test") if "data.path" not in settings else ():
        if isinstance(value := settings.get(key), str) and "." in value:
            find_files(value, key=key)


def check_sources(config: RunConfig, given: Mapping[str, Any]) -> None:
    """Raises ConfigError if the folder of the model, a file, or a column that was `given` does not exist."""
    data = config.data
    if config.module is None:
        find_local_path(config.model)
    if not isinstance(data, SplitSettings) or data.path is not None:  # the hub has the data
        return
    for split, source in data.sources.items():
        find_files(source, key=f"data.{split}")
    wanted = [(key, name) for key in COLUMNS if isinstance(name := given.get(f"data.{key}"), str)]
    if isinstance(data, RowSettings) and wanted:
        from lorasweep.data.reading.tables import choose_columns, load_tables  # noqa: PLC0415 (needs pandas)

        load_tables(data, "train", lambda names, source: choose_columns(wanted, names, source)[:1])
