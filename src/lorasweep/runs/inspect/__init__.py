"""Measures the weight updates ΔW of finished runs: spectra, scores at smaller ranks, and subspaces that runs share.

`weight_updates` reads ΔW from a model, `measures` and `truncation` measure it, `inspect_run` and `inspect_sweep` write
the results.
"""
