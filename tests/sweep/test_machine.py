"""The speed of the machine is measured with all threads, and leaves torch's number of threads as it was."""

import pytest
import torch

import lorasweep.sweep.machine as machine_file
from lorasweep.sweep.machine import measure_machine


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
