"""The base model, loaded by `load`. This package contains the small model `tiny`."""
