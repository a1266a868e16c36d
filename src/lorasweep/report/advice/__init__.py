"""What to do with what a sweep found: the smallest rank, α/r, the learning rate, what a gain costs, what to try next.

noise    how far two scores may lie apart by chance
ranks    the smallest rank that is not distinguishably worse than the best
rates    the best learning rate: how flat, how it moves with rank, against full fine-tuning; the best α/r
costs    what share of full fine-tuning's gain is kept at what share of its cost
edges    best values that lie at the end of their range

Comes after `tables`, before `summary`. Each part is numbers first (`summary.json`), then sentences.
"""

from lorasweep.report.advice.advise import Advice, advise

__all__ = ["Advice", "advise"]
