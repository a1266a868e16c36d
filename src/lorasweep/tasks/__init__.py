"""Tasks: kinds of examples and what is learned from them. Each has a folder: settings, reader, rows and objectives.

This file and `settings.py` of each task import no torch. `find_task` in `task.py` loads the rest.
"""

from __future__ import annotations

from lorasweep.config.data import DataSettings, ModuleDataConfig
from lorasweep.config.objective import ObjectiveConfig
from lorasweep.tasks.chat.settings import ChatConfig
from lorasweep.tasks.embeddings.settings import EmbeddingsConfig, InBatchConfig
from lorasweep.tasks.preferences.settings import DpoConfig, OrpoConfig, PreferencesConfig
from lorasweep.tasks.table.settings import TableConfig
from lorasweep.tasks.text.settings import StdlibConfig, TextConfig

DATA: dict[str, type[DataSettings]] = {
    "stdlib_docs": StdlibConfig,
    "stdlib_code": StdlibConfig,
    "text": TextConfig,
    "embeddings": EmbeddingsConfig,
    "preferences": PreferencesConfig,
    "chat": ChatConfig,
    "table": TableConfig,
    "module": ModuleDataConfig,
}
"""The settings of each value of `data.name`. `lorasweep new` tries the tasks in this order."""
PLAIN_TEXT = "text"
"""The value of `data.name` for files that are no tables."""
OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "default": ObjectiveConfig,
    "dpo": DpoConfig,
    "orpo": OrpoConfig,
    "in_batch_negatives": InBatchConfig,
}
"""The settings of each value of `objective.name`."""
