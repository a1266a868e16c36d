"""Who starts the processes of a run is found, and what one process raises reaches the others."""

import pytest
import torch

from lorasweep.config.compose import compose_run
from lorasweep.errors import ConfigError, RanksLost, RunError
from lorasweep.training.fsdp import check_shardable
from lorasweep.training.processes import build_strategy, convert_lost_process, find_launch, join_processes, run_on_first


def trainer_of(**settings):
    return compose_run({"trainer.device": "cpu"} | {k.replace("__", "."): v for k, v in settings.items()}).trainer


def test_processes_that_were_launched_must_be_those_asked_for(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    launch = find_launch(trainer_of(trainer__devices="auto", trainer__num_nodes=2))
    assert (launch.devices, launch.num_nodes, launch.num_processes) == (2, 2, 4)
    with pytest.raises(ConfigError, match=r"must be 4, .* but got 1 and 1"):
        find_launch(trainer_of())


def test_a_strategy_of_lightnings_is_made_from_its_class():
    part = {"_target_": "lightning.pytorch.strategies.DDPStrategy", "find_unused_parameters": True}
    config = trainer_of(trainer__devices=2, trainer__strategy=part)
    strategy = build_strategy(config, find_launch(config))
    assert strategy._ddp_kwargs == {"find_unused_parameters": True}
    wrong = trainer_of(trainer__strategy={"_target_": "lightning.pytorch.callbacks.Timer"})
    with pytest.raises(ConfigError, match=r"`trainer.strategy._target_` must be a subclass of"):
        build_strategy(wrong, find_launch(wrong))


def test_a_quantised_base_is_not_sharded():
    layer = torch.nn.Linear(2, 2)
    layer.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"`trainer.strategy` must be ddp .* 'weight' is torch.uint8"):
        check_shardable(layer)


class Second:
    """The second of two processes, as Fabric shows it."""

    is_global_zero, global_rank, world_size = False, 1, 2

    def __init__(self, sent=None):
        self.sent = sent

    def broadcast(self, obj):
        return self.sent


def test_what_the_first_process_raises_is_raised_by_all():
    with join_processes(trainer_of()) as group:
        assert run_on_first(group, lambda: 3) == 3
        with pytest.raises(KeyError):
            run_on_first(group, lambda: {}["missing"])
    assert run_on_first(Second((5, None)), lambda: 3) == 5
    with pytest.raises(RunError, match="the first process failed: KeyError"):
        run_on_first(Second((None, RunError("the first process failed: KeyError: 'missing'"))), lambda: 3)


def test_a_process_that_is_gone_is_named_in_a_sentence():
    gone = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    told = convert_lost_process(gone, num_processes=2)
    assert isinstance(told, RanksLost)
    assert "one is gone" in str(told)
    own = ValueError("a row is broken")
    assert convert_lost_process(own, num_processes=2) is own
