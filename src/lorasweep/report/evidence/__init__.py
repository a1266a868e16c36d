"""Results of the confirm stage: means with intervals, paired differences, verdicts, and shares of full's gain.

scores       scores by arm and seed, and bootstrap draws over groups of test examples
estimates    means, differences and ratios of arms with their confidence distributions
equivalence  the margin, tests against it, and the number of seeds that would settle a verdict
verdicts     the evidence of one sweep: its arms, and a verdict on every pair of arms
ranks        the smallest rank that is shown to be sufficient

These are pure functions of numbers: nothing here knows records. docs/evidence.md explains the choices.
"""
