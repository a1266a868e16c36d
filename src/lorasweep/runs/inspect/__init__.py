"""Measurements of a finished run's weights: spectrum and rank of ΔW, scores of smaller ranks, shared subspaces.

`restore_weights` puts a run's weights on its base, `changes` reads ΔW, `spectrum`, `layers`, `subspaces` and
`truncation` measure it, `inspect_run` and `inspect_sweep` put the measurements together.
"""
