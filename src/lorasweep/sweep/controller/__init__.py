"""The one owner of a sweep's studies: it proposes trials, decides at rungs and takes results."""

import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)  # the live table says what matters
