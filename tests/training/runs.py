"""Trains runs of a few steps, and reads what they logged."""

import itertools
from pathlib import Path

import torch

import lorasweep.objectives.next_tokens as objective_file
from lorasweep.errors import Diverged
from lorasweep.record import read_run, read_steps
from lorasweep.training.open_run import RunFolder, RunRequest
from lorasweep.training.run import train_alone, train_runs

ADAPTER = "adapter_model.safetensors"


VERA = {"peft_type": "VERA", "r": 8, "d_initial": 0.1, "target_modules": ["q_proj", "down_proj"]}


def train(folder, config, *, inputs, on_evaluation=None, **hooks):
    """Trains a run alone. `on_evaluation(step, metrics)` returns why it must stop."""
    if on_evaluation is not None:
        hooks["on_evaluation"] = lambda evaluated: [on_evaluation(one.step, one.metrics) for one in evaluated]
    return train_alone(config, RunFolder(path=Path(folder)), inputs=inputs, **hooks)


def make_request(folder, config):
    return RunRequest(config=config, run_folder=RunFolder(path=folder))


def all_go_on(evaluated):
    return [None] * len(evaluated)


def train_together(configs, *, inputs, checkpoint_file, on_evaluation=all_go_on, **hooks):
    """Trains runs in one pack; `configs` have them by their folders. Returns how each ended, by its folder's name."""
    ended = {}

    def note_end(request, outcome):
        ended[request.run_folder.path.name] = "failed" if isinstance(outcome, Diverged) else outcome.status

    requests = [make_request(folder, config) for folder, config in configs.items()]
    hooks |= {"on_evaluation": on_evaluation, "on_end": note_end, "checkpoint_file": checkpoint_file}
    train_runs(requests, inputs=inputs, **hooks)
    return ended


def logged_rows(folder):
    """Returns what a run logged, but for its speed."""
    return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in read_steps(folder)]


def losses(folder):
    return [(row["step"], row["loss"], row["lr"]) for row in read_steps(folder) if "loss" in row]


def evaluations(folder):
    return [(row["step"], row["validation"]) for row in read_steps(folder) if "validation" in row]


def assert_same_run(folder, other):
    """Two runs have the same log, the same bytes of weights, and the same record where no time is in it."""
    assert logged_rows(folder) == logged_rows(other)
    one, two = read_run(folder), read_run(other)
    for name in ("status", "reason", "best", "last", "steps_done", "tokens_trained", "files", "adapter_bytes", "pack"):
        assert getattr(one, name) == getattr(two, name), name
    for name in one.files:
        assert (folder / name).read_bytes() == (other / name).read_bytes()


def stop_after(steps):
    """A `stop_requested` that says yes after so many steps; it is asked before the first and after each step."""
    asked = itertools.count(0)
    return lambda: next(asked) >= steps


def settings_of(method):
    """Returns the settings that choose a method, by its name or `head`."""
    more = {"head": {"method": "full", "method.parameters": "lm_head.*"}, "peft": {"method.config": VERA}}
    return {"method": method} | more.get(method, {})


def damage(monkeypatch, action, *, training):
    """Does `action` to the losses of training or of validation batches."""
    true_score = objective_file.score_tokens

    def score_tokens(model, batch, **settings):
        losses = true_score(model, batch, **settings)
        return action(losses) if torch.is_grad_enabled() == training else losses

    monkeypatch.setattr(objective_file, "score_tokens", score_tokens)


def out_of_memory_above(rows):
    """Lets micro-batches of more rows run out of memory, at the third step as well as at the first."""

    def action(values):
        if values.shape[0] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return values

    return action
