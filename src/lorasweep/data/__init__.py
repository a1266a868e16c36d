"""From text to batches: `sources` (texts), `splits` (token blocks), `batching`, `loaders`; `tasks` says how well."""
