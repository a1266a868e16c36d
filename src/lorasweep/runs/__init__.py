"""What is done with a finished run: export its weights, reproduce it, inspect what it learned."""
