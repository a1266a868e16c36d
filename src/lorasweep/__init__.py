"""lorasweep finds, for a model and data, which LoRA rank, α and learning rate to use, and whether LoRA is enough."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasweep.training.data_module import DataModule
    from lorasweep.training.module import TrainingModule

__all__ = ["DataModule", "TrainingModule"]

_HOMES = {"DataModule": "lorasweep.training.data_module", "TrainingModule": "lorasweep.training.module"}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: torch and Lightning are slow to import."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
