"""Estimates the cost of a sweep: `measure` runs its parts in small, `estimate` adds up, `render` shows the result."""
