"""Results of the confirm stage: means with intervals, paired differences, verdicts, and shares of full's gain.

scores     scores by arm and seed, and bootstrap draws over test examples
estimates  means, differences and ratios of arms with their confidence distributions
verdicts   the evidence of one sweep: its arms, and a verdict on every pair of arms

These are pure functions of numbers: nothing here knows records. docs/evidence.md explains the choices.
"""
