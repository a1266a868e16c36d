"""Uses of a finished run: export its weights, reproduce it."""
