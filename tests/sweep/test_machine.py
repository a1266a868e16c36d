"""The speed of the machine is measured with all threads, and leaves torch's number of threads as it was."""

import pytest
import torch

import lorasweep.sweep.machine as machine_file
from lorasweep.sweep.machine import Machine, measure_machine


def test_the_speeds_are_those_of_the_products_and_the_copy(monkeypatch):
    monkeypatch.setattr(machine_file, "_measure_seconds", lambda call, *, threads: 0.25)
    machine = measure_machine()
    product, copied = 2 * 2048 * 512 * 2048, 2 * 2**28
    assert machine.tflops == {precision: pytest.approx(4e-12 * product) for precision in ("bf16", "fp32")}
    assert machine.copy_gb_per_s == pytest.approx(4e-9 * copied)


def test_measuring_keeps_the_number_of_threads():
    before = torch.get_num_threads()
    machine = measure_machine()
    assert torch.get_num_threads() == before
    assert min(machine.speedup, machine.copy_gb_per_s, *machine.tflops.values()) > 0
    assert "TFLOP/s" in str(machine)


@pytest.mark.parametrize(("load", "is_said"), [(0.1, False), (1.7, True)])
def test_other_work_is_said_where_it_matters(monkeypatch, load, is_said):
    monkeypatch.setattr(machine_file.os, "cpu_count", lambda: 2)
    machine = Machine(tflops={"fp32": 1.0}, speedup=1.0, copy_gb_per_s=1.0, load=load)
    assert ("its 2 cores had 1.7 busy processes" in str(machine)) is is_said
