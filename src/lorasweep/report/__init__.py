"""The report of a sweep, made from records alone: terminal table, CSV, JSON, one HTML page and TensorBoard's board.

`write_report` writes the files, and `render_terminal` shows one sweep or several side by side. Nothing here imports
torch.

sweep_data                       reads a sweep's folder: trials, arms and reruns with their runs' records
evidence, advice                 the results of the confirm stage, and the conclusions from them
fairness, time_breakdown, intrinsic_dimension, inspections
                                 whether arms were treated alike, the worker's time, d90, weights of the winners
findings, summary                the sentences at the top, and the content of the whole report
figures, page, board, terminal, write
                                 the report as a person sees it
"""

from lorasweep.report.terminal import render_terminal
from lorasweep.report.write import write_report

__all__ = ["render_terminal", "write_report"]
