"""What all tasks share, from files to batches: `reading`, `source`, `tokenise`, `rows`, `batching`."""
