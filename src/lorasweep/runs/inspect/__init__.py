"""What a finished run's weights say: spectra and ranks of its change, what a smaller rank scores, shared subspaces.

`restore_weights` brings a run's model back, `changes` reads ΔW from it, `spectrum`, `subspaces` and `truncation`
measure it, `inspect_run` and `inspect_sweep` put the numbers together.
"""
