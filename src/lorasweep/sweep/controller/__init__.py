"""The one owner of a sweep's studies: it proposes trials, takes results and tests the questions at looks."""

import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)  # the live table says what matters
