"""What a process of the tests of several processes runs; not a test. Prints nothing: what is to be seen is on disk."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from torch.distributed.tensor import DTensor

import lorasweep.objectives.next_tokens as objective_file
from lorasweep.config.compose import compose_run
from lorasweep.models.load import fingerprint_weights
from lorasweep.training.inputs import InputsCache
from lorasweep.training.open_run import RunFolder, RunRequest
from lorasweep.training.processes import join_processes
from lorasweep.training.run import train_alone, train_runs
from lorasweep.training.stop_signal import StopSignal

SETTINGS = {
    "data.block_length": 32,
    "data.max_validation_blocks": 140,  # of which 128 are evaluated during a run
    "data.max_test_blocks": 4,
    "trainer.batch_size": 5,
    "trainer.eval_batch_size": 20,
    "trainer.max_steps": 4,
    "trainer.eval_every_steps": 2,
    "trainer.precision": "fp32",
    "trainer.device": "cpu",
    "trainer.progress": False,
    "optim.lr": 1e-3,
    "optim.clip_norm": 0.5,
}
VARIANTS = {
    "lora-ddp-1": {},
    "lora-fsdp-3": {"trainer.accumulate": 3},
    "full-ddp-3": {"method": "full", "trainer.accumulate": 3},
    "full-fsdp-3": {"method": "full", "trainer.accumulate": 3},
    "all-fsdp-1": {
        "method.modules_to_save": ["model.norm"],
        "trainer.activation_checkpointing": True,
    },
    "early-fsdp-1": {"trainer.early_stop_evaluations": 1, "optim.lr": 1e-12},
    "head-ddp-1": {"method": "full", "method.parameters": "lm_head.*"},
}
"""Settings that must train as in one process, by method, strategy and micro-batches. A step has 5 rows, so one process
has a row more than the other; in 3 micro-batches one has a single row."""
SLOTS = {
    "a": {"method.rank": 4, "seed": 3},
    "b": {"method.rank": 20, "optim.lr": 2e-3, "optim.clip_norm": 0.1},
    "c": {"method.rank": 8, "method.alpha": 4},
}
"""The runs of a pack, in two groups of ranks, by the names of their folders."""
SIGNALS = (("training", "1"), ("training", "01"), ("evaluation", "0"))
"""When processes get a signal, and which of them."""
TRUE_SCORE = objective_file.score_tokens


def end_b(evaluated):
    return ["poor" if run.step == 2 and run.run.run_folder.path.name == "b" else None for run in evaluated]


def config_of(**settings):
    return compose_run(SETTINGS | {key.replace("__", "."): value for key, value in settings.items()})


class Child:
    """One of the processes."""

    def __init__(self, out):
        self.out = out
        self.base = config_of(trainer__devices=2, trainer__strategy="ddp")
        self.outcomes = {}
        self.seen = None
        self.resumes = (out / "killed").exists()  # before any process trains

        def look(callback, trainer, module, *batch):
            """An ordinary callback counts the processes and the numbers that each holds."""
            held = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
            self.seen = [trainer.world_size, sum(p.numel() for p in held)]

        LearningRateMonitor.on_train_batch_start = look

    def run(self, mode):
        with join_processes(self.base.trainer) as group:
            self.rank = group.global_rank
            self.inputs_cache = InputsCache()
            getattr(self, mode)()
            (self.out / f"{mode}.{self.rank}.json").write_text(json.dumps(self.outcomes))

    def attempt(self, name, hooks=None, **settings):
        config = config_of(trainer__devices=2, **settings)
        try:
            record = train_alone(
                config, RunFolder(path=self.out / name), inputs=self.inputs_cache.load(config), **(hooks or {})
            )
            self.outcomes[name] = [record.status, record.steps_done]
        except Exception as error:
            self.outcomes[name] = [type(error).__name__, str(error)]
            if type(error).__name__ == "RanksLost":
                raise

    def all(self):
        """Everything that no process dies of."""
        self.train()
        self.end()
        self.packs()
        self.signalled()

    def train(self):
        for name, settings in VARIANTS.items():
            self.attempt(name, callbacks="lr_monitor", trainer__strategy=name.split("-")[1], **settings)
            self.outcomes[f"seen-{name}"] = self.seen
        base = self.inputs_cache.load(self.base).base
        self.outcomes["base"] = fingerprint_weights(base.model) == base.fingerprint

    def end(self):
        """Runs that a hook stops, that are interrupted and resumed, and that diverge on one process."""
        self.attempt("ended", {"on_evaluation": lambda runs: ["poor" if run.step == 2 else None for run in runs]})
        for strategy in ("ddp", "fsdp"):
            settings = {"method": "full", "trainer__strategy": strategy, "trainer__max_steps": 6}
            self.attempt(f"whole-{strategy}", **settings)
            for name in ("stopped", "moved"):
                steps = iter(range(1, 9))
                stop = {"stop_requested": lambda steps=steps: next(steps) == 4 and self.rank == 1}
                self.attempt(f"{name}-{strategy}", stop, **settings)
            self.attempt(f"stopped-{strategy}", {"resume": True}, **settings)

    def packs(self):
        """Packs of which one run ends at step 2. One process is asked to stop at step 3, and then all resume."""
        for strategy in ("ddp", "fsdp"):
            requests = [
                RunRequest(
                    config=config_of(trainer__devices=2, trainer__strategy=strategy, **VARIANTS["all-fsdp-1"], **own),
                    run_folder=RunFolder(path=self.out / f"pack-{strategy}" / name),
                )
                for name, own in SLOTS.items()
            ]
            steps, ended = iter(range(1, 9)), []
            for stop_requested in (lambda steps=steps: next(steps) == 4 and self.rank == 1, lambda: False):
                train_runs(
                    [request for request in requests if request not in ended],
                    inputs=self.inputs_cache.load(requests[0].config),
                    checkpoint_file=self.out / f"pack-{strategy}" / "pack.ckpt",
                    on_evaluation=end_b,
                    on_end=lambda request, record, ended=ended: (
                        None if record.status == "interrupted" else ended.append(request)
                    ),
                    stop_requested=stop_requested,
                )

    def killed(self):
        """The second process is killed at step 3, unless the run resumes."""
        steps = iter(range(1, 9))

        def stop():
            if next(steps) == 4 and self.rank == 1 and not self.resumes:
                os.kill(os.getpid(), signal.SIGKILL)
            return False

        self.attempt("killed", {"stop_requested": stop, "resume": True}, trainer__strategy="ddp")

    def signalled(self):
        """Processes get SIGTERM in the middle of a batch, in training or in an evaluation; the runs then go on."""
        for moment, ranks in SIGNALS:
            calls = iter(range(1, 99))

            def terminate(losses, moment=moment, ranks=ranks, calls=calls):
                now = torch.is_grad_enabled() == (moment == "training") and str(self.rank) in ranks
                if now and next(calls) == 1 + self.rank:
                    os.kill(os.getpid(), signal.SIGTERM)
                return losses

            name = f"{moment}-{ranks}"
            self.damage(terminate)
            with StopSignal() as stop:
                self.attempt(name, {"stop_requested": stop})
            self.outcomes[f"{name} stopped"] = self.outcomes[name]
            self.damage(lambda losses: losses)
            self.attempt(name, {"resume": True})

    def damage(self, action):

        def score_tokens(model, batch, **settings):
            return action(TRUE_SCORE(model, batch, **settings))

        objective_file.score_tokens = score_tokens


if __name__ == "__main__":
    Child(Path(sys.argv[2])).run(sys.argv[1])
