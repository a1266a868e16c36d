"""Measures the weight updates ΔW of finished runs: spectra, norms, and subspaces that runs share.

`weight_updates` reads ΔW from a model, `measures` measures it, `inspect_run` and `inspect_sweep` write the results.
"""
