"""Imports large libraries without garbage collections in between."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Stops garbage collection during the imports of a `with` block. Does nothing if torch is imported already.

    torch, Lightning and transformers make 0.9 million objects, and nearly all of them stay. Python would look at all of
    them again and again: 1.5 s of the 5 s that the imports took. After the block no collection looks at them any more.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
