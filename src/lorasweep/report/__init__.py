"""What a sweep found: terminal table, CSV, JSON, one HTML page and TensorBoard's boards, read from records alone.

`write_report` writes them all, `render_terminal` shows one sweep or several side by side, `write_hparams` writes one
run's row in TensorBoard. Nothing here imports torch.

runs, reruns, tables    from a sweep's folder to trials, arms and reruns
evidence, advice        what the confirm stage shows, and what follows from it
fairness, time_use      whether the arms were treated alike, and where the time went
headline, summary       in sentences and numbers
figures, page, board, terminal, write    what a person sees
"""

from lorasweep.report.board import write_hparams
from lorasweep.report.terminal import render_terminal
from lorasweep.report.write import write_report

__all__ = ["render_terminal", "write_hparams", "write_report"]
