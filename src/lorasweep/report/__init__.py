"""The report of a sweep, made from records alone: terminal table, CSV, JSON, one HTML page and TensorBoard's files.

`write_report` writes the files, and `render_terminal` shows them in a terminal. Nothing here imports torch.

sweep_data          a sweep's folder: subjects with their trials and confirm runs, and one table of all runs
evidence            the test scores of subjects, and the answers to the sweep's questions
caveats             whether the trials beat an answer that needs no training, and whether arms were treated alike
recommend           the settings to use
answers             the three lines at the top of every output, and verdicts in words
summary             the content of the whole report, with all other sentences
panel, figures, page, terminal, write
                    the report as a person sees it
"""

from lorasweep.report.terminal import render_terminal
from lorasweep.report.write import write_report

__all__ = ["render_terminal", "write_report"]
