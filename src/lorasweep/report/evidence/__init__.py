"""What the confirm stage shows: means with intervals, paired differences, a verdict per pair, shares of full's gain.

scores     from reruns and their files to numbers by arm and seed, and to draws over test examples
confidence where a true value may lie: a t distribution over seeds, a bootstrap over examples
estimates  means, differences and ratios of arms, on the same seeds and examples
verdicts   every pair of arms, corrected for their number
weigh      all of it for one sweep

Pure functions of numbers: nothing here knows records. Comes before `tables`. The choices stand in docs/evidence.md.
"""

from lorasweep.report.evidence.compare_arms import ArmEvidence, Evidence, weigh_evidence
from lorasweep.report.evidence.scores import ConfirmScores, build_scores, read_examples
from lorasweep.report.evidence.verdicts import Pair

__all__ = [
    "ArmEvidence",
    "ConfirmScores",
    "Evidence",
    "Pair",
    "build_scores",
    "read_examples",
    "weigh_evidence",
]
