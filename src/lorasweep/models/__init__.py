"""The base model. `load` reads it from a folder, the hub or this package, which contains the small model `tiny`."""
