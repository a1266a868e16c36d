"""From text to batches: `sources` (documents), `parts` (token blocks), `batching`, `loaders`; `tasks` says how well."""
