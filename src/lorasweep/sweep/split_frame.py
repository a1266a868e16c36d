"""The examples of a sweep's split as a data frame, for a user's own checks on the same rows."""

from __future__ import annotations

from pathlib import Path

import pandas

from lorasweep.data.source import FIRST_BUCKETS
from lorasweep.errors import ConfigError, RecordError
from lorasweep.record import read_sweep
from lorasweep.sweep.controller.lifecycle import read_saved_definition
from lorasweep.tasks.task import read_source
from lorasweep.wording import suggest_nearest

SPLITS = ("train", *FIRST_BUCKETS)


def build_split_frame(folder: Path, name: str) -> pandas.DataFrame:
    """Returns a row for each example of a split, with the fields that have values; labels have their names.

    Raises ConfigError if there is no such split, and RecordError if the examples are not those of the sweep.
    """
    if name not in SPLITS:
        raise ConfigError(
            f"`name` must be one of {', '.join(SPLITS)}, but got {name!r}.{suggest_nearest(name, SPLITS)}"
        )
    arm = read_saved_definition(folder).arms[0]
    if (data := arm.base.data).task_path is None:
        raise ConfigError("`split` reads data of lorasweep, but this sweep has its own data module. Call that.")
    source = read_source(data)
    examples = source.test() if name == "test" else getattr(source, name)
    recorded = read_sweep(folder).fingerprints.get(arm.name, {}).get(f"data.{name}", examples.fingerprint)
    if examples.fingerprint != recorded:
        raise RecordError(f"the data must be as they were when {str(folder)!r} began, but {name} has other examples.")
    frame = pandas.DataFrame([item._asdict() for item in examples.items]).dropna(axis="columns", how="all")
    if source.label_names and "label" in frame:
        frame["label"] = [source.label_names[int(label)] for label in frame["label"]]
    return frame
