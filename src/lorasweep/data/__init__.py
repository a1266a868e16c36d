"""From files to batches: `reading`, `source`, `tokenise`, `build_splits`, `batching`; `tasks` defines the metrics."""
