"""Results of the confirm stage: test scores, and the answers to the questions of the sweep (docs/evidence.md)."""
