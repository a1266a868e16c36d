"""Preference tuning (DPO) side by side with TRL's DPOTrainer: the same numbers, time and memory.

    python benchmarks/bench_preferences.py --data pairs.jsonl [--parts parity run sweep] [--methods lora full]
        [--model FOLDER-OR-HUB-ID] [--precision fp32|bf16] [--steps 10] [--sweep-steps 4] [--rates 8] [--threads 2]
    python benchmarks/bench_preferences.py --quick      # the embedded model and a few pairs: only checks that it runs

`--data` has `chosen` and `rejected`, and perhaps `prompt`, as TRL and `data=preferences` read them. Both sides train
the same tokens in the same order, with AdamW, a constant rate and the same clipping, without dropout. LoRA has rank 8
on every linear layer but the head, and TRL's adapter starts with our initial values. TRL is no dependency.

    parity  the loss and the mean rewards of each step: the largest differences
    run     one run: seconds a step, seconds from loading the model to the end, peak memory of its process
    sweep   several rates: TRL one after another, ours one after another and (LoRA) in one pack

Every way is a process of its own. A step is the median without the first. Ours computes the log probabilities of the
base before the first step, once for all rates; `seconds` has them, and the evaluations and files of a run, which TRL's
runs here do not have. TRL computes them in every step, with LoRA by switching the adapter off, else by a second model.
`TRL, precomputed` is `precompute_ref_log_probs`. TRL checkpoints activations by default; the first rows of both sides
do not, because it costs time. `--processor-time` with one thread hardly depends on other work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import psutil

WORK: Mapping[str, Any] = {"rank": 8, "alpha": 16.0, "beta": 0.1, "checkpointing": False, "precomputed": False}
RATES = {"lora": 2e-4, "full": 2e-5}
"""The highest learning rate of each method; each further rate of a sweep is half of the one before."""
NUM_OTHER_PAIRS = 8
"""Pairs for validation, and for test: both must be there, but only training is compared."""
TRL_SCRIPT = Path(__file__).parent / "trl_dpo.py"
WAYS: Mapping[str, Mapping[str, Any]] = {
    "TRL": {},
    "TRL, precomputed": {"precomputed": True},
    "TRL, checkpointing (its default)": {"checkpointing": True},
    "ours": {},
    "ours, checkpointing": {"checkpointing": True},
}
PACK = "ours, one pack"
MIB = 2**20
SAMPLE_INTERVAL_S = 0.05
"""Seconds between two samples of a process's memory."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one way took."""

    step_s: float
    """Median seconds of a step of one run."""
    seconds: float
    """Seconds of all runs, without the imports."""
    peak_bytes: int
    runs: Sequence[Mapping[str, Any]]


def write_pairs(rows: Sequence[Mapping[str, Any]], folder: Path, *, num_train: int) -> dict[str, str]:
    """Writes the tables, and returns the settings that name them. Raises SystemExit if there are too few pairs."""
    needed = num_train + 2 * NUM_OTHER_PAIRS
    if len(rows) < needed:
        raise SystemExit(f"--data must have at least {needed} pairs, but has {len(rows)}.")
    ends = {"train": num_train, "validation": num_train + NUM_OTHER_PAIRS, "test": needed}
    settings, first = {}, 0
    for split, end in ends.items():
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[first:end]))
        settings[f"data.{split}"], first = str(path), end
    return settings


def make_pairs(number: int) -> list[dict[str, str]]:
    """Returns pairs for `--quick`."""
    return [
        {"prompt": f"What is {n} + 1?", "chosen": f"It is {n + 1}.", "rejected": f"I do not know {n}."}
        for n in range(number)
    ]


def prepare_work(arguments: argparse.Namespace, folder: Path, *, method: str, num_steps: int) -> dict[str, Any]:
    """Writes the data, the tokens in the order of training, and LoRA's initial values, and returns the work."""
    from lorasweep.config.compose import compose_run  # noqa: PLC0415 (torch reads OMP_NUM_THREADS at its import)
    from lorasweep.data.batching import StepBatchSampler  # noqa: PLC0415
    from lorasweep.data.rows import IGNORED  # noqa: PLC0415
    from lorasweep.methods import bind  # noqa: PLC0415
    from lorasweep.training.inputs import load_inputs  # noqa: PLC0415
    from lorasweep.training.prepare import prepare_model  # noqa: PLC0415

    folder.mkdir()
    num_train = num_steps * arguments.batch_size
    settings: dict[str, Any] = {
        **write_pairs(read_pairs(arguments, num_train), folder, num_train=num_train),
        "model": "causal_lm",
        "model.path": arguments.model,
        "data": "preferences",
        "method": method,
        "trainer.max_steps": num_steps,
        "trainer.batch_size": arguments.batch_size,
        "trainer.eval_every_steps": num_steps,
        "trainer.eval_fraction": 1.0,
        "trainer.precision": arguments.precision,
        "trainer.progress": False,
        "schedule": "constant",
        "schedule.warmup_fraction": 0.0,
        "logger": "none",
        "objective.beta": WORK["beta"],
    }
    if arguments.quick:
        settings["data.template"] = "plain"
    if method == "lora":
        settings |= {"method.rank": WORK["rank"], "method.alpha": WORK["alpha"]}
    config = compose_run(settings)
    inputs = load_inputs(config)
    split = inputs.data.train
    if len(split) != num_train:
        raise SystemExit(f"The first {num_train} pairs must all be usable, but {num_train - len(split)} are not.")

    def read_row(row: int) -> tuple[list[int], list[int]]:
        """Returns the tokens before the answer, and those of the answer."""
        targets, tokens = (split.sequences[name][row].tolist() for name in ("targets", "input_ids"))
        first = sum(target == IGNORED for target in targets)
        assert IGNORED not in targets[first:]
        return tokens[: first + 1], targets[first:]

    sampler = StepBatchSampler(
        split,
        batch_size=arguments.batch_size,
        num_steps=num_steps,
        seed=config.seeds.data_order,
        group_by_length=True,
    )
    rows = []
    for pair in (pair for step in range(num_steps) for pair in sampler.get_step_indices(step)):
        (prompt, chosen), (same_prompt, rejected) = read_row(2 * pair), read_row(2 * pair + 1)
        assert prompt == same_prompt
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    (folder / "tokens.json").write_text(json.dumps(rows))
    work = {
        **WORK,
        "settings": settings,
        "model": arguments.model,
        "method": method,
        "precision": arguments.precision,
        "steps": num_steps,
        "batch_size": arguments.batch_size,
        "clock": "process_time" if arguments.processor_time else "perf_counter",
        "tokens": str(folder / "tokens.json"),
        "targets": None,
        "adapter": None,
    }
    if method == "lora":
        model = prepare_model(config, inputs.base)
        bind(config.method).save(model, folder / "adapter", base=inputs.base)
        names = [name for name, module in model.named_modules() if hasattr(module, "lora_a")]
        work |= {"adapter": str(folder / "adapter"), "targets": names}
    return work


def read_pairs(arguments: argparse.Namespace, num_train: int) -> list[dict[str, Any]]:
    if arguments.quick:
        return make_pairs(num_train + 2 * NUM_OTHER_PAIRS)
    return [json.loads(line) for line in arguments.data.read_text().splitlines()]


def train(work: Mapping[str, Any], output: Path) -> None:
    """Trains all rates as a sweep does, and writes what was measured. It runs in a process of its own."""
    from lorasweep.config.compose import compose_run  # noqa: PLC0415 (torch reads OMP_NUM_THREADS at its import)
    from lorasweep.record import read_steps  # noqa: PLC0415
    from lorasweep.training.inputs import load_inputs  # noqa: PLC0415
    from lorasweep.training.open_run import RunFolder, RunRequest  # noqa: PLC0415
    from lorasweep.training.run import train_alone, train_runs  # noqa: PLC0415

    clock = getattr(time, work["clock"])
    started = clock()
    settings = {**work["settings"], "trainer.activation_checkpointing": work["checkpointing"]}
    configs = [compose_run({**settings, "optim.lr": lr}) for lr in work["rates"]]
    inputs = load_inputs(configs[0])
    times: list[list[float]] = [[]]
    rewards: list[list[float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = inputs.prepare(configs[0], folder=folder)
        if work.get("keeps_rewards"):
            inputs = replace(
                inputs, splits=replace(inputs.data, objective=keep_rewards(inputs.data.objective, rewards))
            )

        def note_time() -> bool:
            times[-1].append(clock())
            return False

        requests = [
            RunRequest(config=config, run_folder=RunFolder(path=folder / str(n))) for n, config in enumerate(configs)
        ]
        if work.get("packed"):
            train_runs(
                requests,
                inputs=inputs,
                on_evaluation=lambda evaluations: [None] * len(evaluations),
                on_end=lambda request, record: None,
                checkpoint_file=folder / "pack.ckpt",
                stop_requested=note_time,
            )
        else:
            for request in requests:
                train_alone(request.config, request.run_folder, inputs=inputs, stop_requested=note_time)
                times.append([])
        seconds = clock() - started
        runs = []
        for n, run_times in enumerate(times[: len(requests)]):
            losses = [row["loss"] for row in read_steps(folder / str(n), having='"loss"') if "validation" not in row]
            runs.append({"loss": losses, "times": run_times})
    if rewards:
        runs[0] |= {name: [row[n] for row in rewards] for n, name in enumerate(("rewards/chosen", "rewards/rejected"))}
    output.write_text(json.dumps({"runs": runs, "seconds": seconds}))


def keep_rewards(objective: Any, kept: list[list[float]]) -> Any:
    """Returns the objective, which also keeps the mean rewards of the chosen and rejected answers of each step."""
    own = type(objective)

    class KeepsRewards(own):  # type: ignore[misc, valid-type]
        def sum_log_probabilities(self, model: Any, batch: Any) -> Any:
            log_probabilities = super().sum_log_probabilities(model, batch)
            if log_probabilities.requires_grad:
                values = batch["beta"] * (log_probabilities.detach() - batch["reference"])
                kept.append(values.view(-1, 2).mean(0).tolist())
            return log_probabilities

    return KeepsRewards(**{field.name: getattr(objective, field.name) for field in fields(objective)})


def run_way(way: str, work: Mapping[str, Any], folder: Path) -> Outcome:
    """Runs a way in its own process."""
    folder.mkdir()
    file, output = folder / "work.json", folder / "result.json"
    file.write_text(json.dumps({**work, **WAYS.get(way, {"packed": True})}))
    script = TRL_SCRIPT if way.startswith("TRL") else Path(__file__)
    command = [str(script), *(() if script == TRL_SCRIPT else ("--work",)), str(file), "--output", str(output)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    peak_bytes = run_process(command, log=folder / "log.txt", environment=environment)
    result = json.loads(output.read_text())
    steps = [
        later - earlier
        for run in result["runs"]
        for earlier, later in zip(run["times"][1:-1], run["times"][2:], strict=True)
    ]
    trials = len(work["rates"]) if way == PACK else 1
    outcome = Outcome(
        step_s=statistics.median(steps) / trials,
        seconds=result["seconds"],
        peak_bytes=peak_bytes,
        runs=result["runs"],
    )
    print(f"{work['method']}, {way}: {outcome.seconds:.1f} s", file=sys.stderr, flush=True)
    return outcome


def run_process(command: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> int:
    """Runs Python with a command and returns its largest resident memory in bytes, from samples.

    The kernel's own maximum starts with the memory of the process that forks, and lorasweep resets it before a run.
    Raises SystemExit with the end of its output if it fails.
    """
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *command], stdout=file, stderr=file, env=environment)
        observed, peak_bytes = psutil.Process(process.pid), 0
        while process.poll() is None:
            peak_bytes = max(peak_bytes, observed.memory_info().rss)
            time.sleep(SAMPLE_INTERVAL_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}:\n{log.read_text()[-3000:]}")
    return peak_bytes


def print_parity(works: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Prints the largest differences of the losses and rewards of all steps."""
    from side_by_side import print_head, print_row  # noqa: PLC0415 (imports torch)

    print("\nThe same steps\n")
    print_head("method", "steps", "first loss", "last loss", "loss, relative", "rewards, absolute")
    for method, work in works.items():
        both = {
            way: run_way(way, {**work, "rates": [RATES[method]], "keeps_rewards": True}, folder / f"{method}-{way}")
            for way in ("TRL", "ours")
        }
        (theirs,), (own,) = both["TRL"].runs, both["ours"].runs
        pairs = list(zip(own["loss"], theirs["loss"], strict=True))
        reward_error = max(
            abs(one - other)
            for name in ("rewards/chosen", "rewards/rejected")
            for one, other in zip(own[name], theirs[name], strict=True)
        )
        loss_error = max(abs(one - other) / other for one, other in pairs)
        print_row(method, len(pairs), own["loss"][0], own["loss"][-1], loss_error, reward_error)


def print_costs(
    works: Mapping[str, Mapping[str, Any]], folder: Path, *, num_rates: int, ways: Sequence[str] | None
) -> None:
    """Prints time and memory of each way, of one run or of several rates."""
    from side_by_side import print_head, print_row  # noqa: PLC0415 (imports torch)

    print(f"\n{'One run' if num_rates == 1 else f'{num_rates} learning rates'}\n")
    print_head("method", "way", "s a trial-step", "× TRL", "seconds", "× TRL", "peak MiB", "× TRL")
    for method, work in works.items():
        rates = [RATES[method] / 2**n for n in range(num_rates)]
        in_sweep = ["TRL", "ours", PACK] if method == "lora" else ["TRL", "ours"]
        chosen = list(WAYS) if num_rates == 1 else in_sweep
        outcomes: dict[str, Outcome] = {}
        for way in (way for way in chosen if ways is None or way in ways):
            outcomes[way] = one = run_way(way, {**work, "rates": rates}, folder / f"{num_rates}-{method}-{way}")
            base = outcomes.get("TRL", one)
            print_row(
                method,
                way,
                one.step_s,
                one.step_s / base.step_s,
                one.seconds,
                one.seconds / base.seconds,
                round(one.peak_bytes / MIB),
                one.peak_bytes / base.peak_bytes,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="jsonl file with chosen and rejected")
    parser.add_argument("--model", help="folder or hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--parts", nargs="+", default=["parity", "run", "sweep"], choices=["parity", "run", "sweep"])
    parser.add_argument("--methods", nargs="+", default=list(RATES), choices=RATES)
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, PACK], help="default: all that fit the part")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=10, help="of parity and of one run")
    parser.add_argument("--sweep-steps", type=int, default=4, help="of each run of a sweep; 3 or more")
    parser.add_argument("--rates", type=int, default=8, help="learning rates of a sweep")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs in a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor-time", action="store_true", help="instead of elapsed time; add --threads 1")
    parser.add_argument("--quick", action="store_true", help="the embedded model, few steps: only checks that it runs")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # this process is one of those that are measured
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        train(json.loads(arguments.work.read_text()), arguments.output)
        return
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    if arguments.quick:
        vars(arguments).update(steps=3, sweep_steps=3, rates=2, batch_size=2)
    elif arguments.data is None:
        parser.error("--data must name a file of pairs, unless --quick is given.")
    if arguments.ways is None or any(way.startswith("TRL") for way in arguments.ways):
        from trl_dpo import import_trl  # noqa: PLC0415 (imports torch)

        import_trl()
    from machine import measure_machine  # noqa: PLC0415
    from real_weights import smollm_folder  # noqa: PLC0415 (imports torch)

    import lorasweep.models.tiny  # noqa: PLC0415

    if arguments.model is None:
        arguments.model = str(Path(lorasweep.models.tiny.__file__).parent if arguments.quick else smollm_folder())
    print(f"\n{measure_machine()}")
    print(f"{arguments.precision}, {arguments.batch_size} pairs a step, {arguments.threads} threads", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in arguments.parts:
            num_steps = arguments.sweep_steps if part == "sweep" else arguments.steps
            works = {
                method: prepare_work(arguments, folder / f"{part}-{method}", method=method, num_steps=num_steps)
                for method in arguments.methods
            }
            (folder / part).mkdir()
            if part == "parity":
                print_parity(works, folder / part)
            else:
                num_rates = arguments.rates if part == "sweep" else 1
                print_costs(works, folder / part, num_rates=num_rates, ways=arguments.ways)


if __name__ == "__main__":
    main()
