"""A measurement counts each second of a training for one phase."""

from types import SimpleNamespace

import lorasweep.sweep.measure as measure_file
from lorasweep.sweep.measure import PhaseClock, train_briefly


def test_each_second_belongs_to_one_phase(monkeypatch):
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(measure_file, "time", SimpleNamespace(perf_counter=lambda: now.s))
    clock = PhaseClock()
    for seconds, phase in ((1, "training"), (2, "evaluating"), (4, "training"), (8, "saving"), (16, "training")):
        now.s += seconds
        clock.switch(phase)
    now.s += 32
    assert clock.read() == {"loading": 1, "training": 2 + 8 + 32, "evaluating": 4, "saving": 16}
    assert clock.read() == clock.read()


def test_a_pack_and_a_run_alone_have_every_phase_but_the_base_has_no_steps(make_config, inputs):
    for slots in (1, 2):
        found = train_briefly(make_config(), inputs, slots=slots)
        assert min(found.loading_s, found.training_s, found.evaluating_s, found.saving_s) > 0
    base = train_briefly(make_config({"method": "frozen"}), inputs, slots=1)
    assert base.training_s == 0 < base.evaluating_s
