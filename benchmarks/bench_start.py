"""How long a sweep takes from the command to its first optimizer step, and for what.

    python benchmarks/bench_start.py [SWEEP] [key=value ...] [--rounds 3]

Each round starts `lorasweep sweep` as a new process, which ends before the first optimizer step of a worker. Processor
time is that of all its processes, so it stays comparable while other work runs. The last part is everything after
loading: the folder, the workers, trials that train nothing, and forward and backward pass of the first step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from statistics import median

CHILD = """
import json, os, sys, time
import psutil
from lorasweep import cli
from lorasweep.training.torch_variables import quick_imports

marks, first = [], psutil.Process()
def mark():
    times = [one.cpu_times() for one in (first, *first.children(recursive=True))]
    marks.append((sum(one.user + one.system for one in times), time.time() - first.create_time()))

with quick_imports():
    from lorasweep import api
mark()
import lorasweep.training.inputs as inputs
from torch.optim.optimizer import register_optimizer_step_pre_hook
def end(*_):
    mark()
    print("marks " + json.dumps(marks), flush=True)
    first.kill()  # its workers end with it
    os._exit(0)

load = inputs.load_inputs
def load_between_marks(*arguments, **settings):
    mark()
    loaded = load(*arguments, **settings)
    mark()
    return loaded

inputs.load_inputs = load_between_marks
register_optimizer_step_pre_hook(end)
cli.main(["sweep", *sys.argv[1:]])
"""
PARTS = ("import", "configuration", "loading", "first trial and step")


def measure(words: list[str]) -> list[tuple[float, float]]:
    """Returns processor and wall-clock seconds of each part in one new process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CHILD, *words, f"sweep.output={folder}/sweep"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("marks ")]
    if not found:
        raise SystemExit(f"the sweep ended without a step:\n{done.stdout}{done.stderr}")
    marks = json.loads(found[0].removeprefix("marks "))
    ends = [(0.0, 0.0), *marks[:2], *marks[-2:]]  # without the loads in between, if arms differ in model or data
    return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", default=["quickstart"], metavar="SWEEP key=value")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rounds = [measure(arguments.words) for _ in range(arguments.rounds)]
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, median of {len(rounds)}\n")
    print(f"| | {' | '.join(PARTS)} | total |\n|---|{'--:|' * (len(PARTS) + 1)}")
    for number, name in enumerate(("processor s", "wall-clock s")):
        seconds = [median(parts[part][number] for parts in rounds) for part in range(len(PARTS))]
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in (*seconds, sum(seconds)))} |")


if __name__ == "__main__":
    main()
