"""Uses of a finished run: export its weights, reproduce it, inspect its weights."""
