"""The base model. `load` reads it from this package, a folder or the hub; `tiny` is inside this package."""
