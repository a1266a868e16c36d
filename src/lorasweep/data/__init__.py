"""From text to batches: `sources` (documents), `parts` (token blocks), `batching`, `module`; `tasks` says how well."""
