"""Conclusions from a sweep: the smallest sufficient rank, the best learning rate, costs, and where to search next.

tolerance  how much worse than the best a trial may score and still be as good
ranks      the smallest rank that is not distinguishably worse than the best
rates      the best learning rate of each arm, its range and its change over rank
costs      the share of full fine-tuning's gain that an arm keeps, and its share of the cost
edges      best values at an end of their range
advise     all of it for one sweep
"""
