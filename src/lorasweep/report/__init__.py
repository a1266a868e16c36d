"""The report of a sweep, made from records alone: terminal table, CSV, JSON, one HTML page and TensorBoard's files.

`write_report` writes the files, and `render_terminal` shows one sweep or several side by side. Nothing here imports
torch.

sweep_data          reads a sweep's folder: trials, arms and confirm runs with their runs' records
evidence, advice    the results of the confirm stage, and what to do next
learning            whether the trials are better than an answer that needs no training
fairness, findings  whether arms were treated alike, and the sentences at the top of the report
summary             the content of the whole report
figures, page, board, terminal, write
                    the report as a person sees it
"""

from lorasweep.report.terminal import render_terminal
from lorasweep.report.write import write_report

__all__ = ["render_terminal", "write_report"]
