"""The only owner of a sweep's Optuna studies: it proposes trials, decides at rungs and takes results."""
