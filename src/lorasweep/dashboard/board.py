"""TensorBoard on a sweep's folder, as a process: `python -m lorasweep.dashboard.board DIR PORT`."""

from __future__ import annotations

import sys

from tensorboard import default
from tensorboard.program import TensorBoard

from lorasweep.dashboard.child import HOST, serve_until_left


def main(folder: str, port: str) -> None:
    """Serves the curves, HParams and board of a sweep; read in this process, so that no other is left behind."""
    board = TensorBoard(default.get_plugins())
    board.configure(["tensorboard", "--logdir", folder, "--host", HOST, "--port", port, "--load_fast", "false"])
    serve_until_left(board.launch())


if __name__ == "__main__":
    main(*sys.argv[1:])
