"""Results of the confirm stage: the scores of subjects, and the answers to the questions of the sweep.

scores      test scores by subject and seed, for each group of test examples
estimates   means, differences and ratios with their intervals
questions   the level of each planned look, and the verdict on each subject of each question
evidence    all that the report shows of the confirm stage, from a sweep's folder

docs/evidence.md explains the choices.
"""
