"""What a sweep will cost: `measure` runs its parts in small, `estimate` adds them up, `render` shows the result."""
