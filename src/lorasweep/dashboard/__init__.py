"""A sweep in TensorBoard and optuna-dashboard, each served by a process of its own to this machine alone.

pages               starts them, says where they are, ends them
board, studies      what these processes run: TensorBoard on the folder, optuna-dashboard on the storage
"""

from lorasweep.dashboard.pages import serve_pages

__all__ = ["serve_pages"]
