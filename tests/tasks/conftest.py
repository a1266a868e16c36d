"""Fixtures that write and read data sets."""

from tests.data.conftest import folder, read, write

__all__ = ["folder", "read", "write"]
