"""Results of the confirm stage: means with intervals, paired differences, a verdict per pair, shares of full's gain.

scores        scores by arm and seed, and bootstrap draws over test examples
confidence    the confidence distribution of a true value: t over seeds, bootstrap over examples
estimates     means, differences and ratios of arms on the same seeds and examples
verdicts      a verdict on every pair of arms, corrected for the number of pairs
compare_arms  the evidence of one sweep

These are pure functions of numbers: nothing here knows records. docs/evidence.md explains the choices.
"""

from lorasweep.report.evidence.compare_arms import ArmEvidence, Evidence, compare_arms
from lorasweep.report.evidence.verdicts import PairComparison

__all__ = ["ArmEvidence", "Evidence", "PairComparison", "compare_arms"]
