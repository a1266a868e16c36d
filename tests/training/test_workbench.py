"""What runs share is loaded once, and says how it was made."""

from dataclasses import replace

import lorasweep.training.workbench as workbench_file
from lorasweep.models.attention import AttentionChoice
from lorasweep.record import read_run
from lorasweep.training import Benches, RunPlace, train_run


def test_a_bench_is_loaded_once_for_all_runs_that_can_share_it(make_config, monkeypatch):
    loaded = []
    monkeypatch.setattr(workbench_file, "build_workbench", lambda config, telemetry: loaded.append(config) or object())
    benches = Benches()
    first = benches.of(make_config())
    assert benches.of(make_config({"method": "full", "optim.lr": 1.0, "trainer.max_steps": 9})) is first
    assert benches.of(make_config({"data.block_length": 16})) is not first
    assert len(loaded) == 2


def test_the_attention_that_was_chosen_is_said_and_recorded(make_config, bench, tmp_path):
    assert bench.notes == bench.parts.notes
    chosen = replace(bench, attention=AttentionChoice("eager", "rows of 15 tokens in the median on a CPU"))
    told = "Attention is eager: rows of 15 tokens in the median on a CPU."
    assert chosen.notes == (*bench.parts.notes, told)
    train_run(make_config({"method": "frozen"}), RunPlace(folder=tmp_path), bench=chosen)
    assert told in read_run(tmp_path).notes
    assert (
        replace(bench, attention=AttentionChoice("own", "transformers did not make this model")).notes
        == bench.parts.notes
    )
