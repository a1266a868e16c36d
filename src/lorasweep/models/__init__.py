"""The base model: `load` gets one from this package, a folder or the hub; `tiny` is the one inside this package."""
