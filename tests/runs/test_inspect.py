"""A run inspected from its folder: every method is measured, and the files have what was found."""

import copy
import csv
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.files import edit_json
from torch import nn

from lorasweep.errors import RecordError
from lorasweep.models.load import fingerprint_weights
from lorasweep.runs.inspect import decompose, inspect_run, measure_updates, relative_norm
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunFolder

ADAPTER = "best/adapter_model.safetensors"


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 4, None])
def test_a_decomposition_is_that_of_the_whole_matrix(rank):
    matrix = draw(40, rank or 30) @ draw(rank or 30, 30, seed=1)
    u, s, vh = decompose(matrix, rank=rank)
    assert len(s) == (rank or 30)
    # float64 rounding of sums of some dozens of products of numbers of size 1
    torch.testing.assert_close(u * s @ vh, matrix, rtol=0, atol=1e-10)
    torch.testing.assert_close(s, torch.linalg.svdvals(matrix)[: len(s)], rtol=1e-10, atol=1e-10)


def test_a_row_has_the_norms_ranks_and_share_of_its_change():
    base = nn.Sequential(nn.Linear(3, 3)).requires_grad_(False)
    base.load_state_dict({"0.weight": 2 * torch.eye(3), "0.bias": torch.tensor([3.0, 4.0, 0.0])})
    model = copy.deepcopy(base)
    model[0].weight += torch.diag(torch.tensor([3.0, 4.0, 0.0]))
    model[0].bias += torch.tensor([0.0, 5.0, 0.0])
    (matrix, vector), spectra = measure_updates(model, base, ranks={})
    assert (matrix.layer, matrix.kind, matrix.d_out, matrix.d_in, matrix.trained_rank) == ("0", "0", 3, 3, None)
    assert (matrix.update_norm, matrix.base_norm) == pytest.approx((5, 2 * 3**0.5))
    assert spectra == {"0": pytest.approx([4, 3, 0])}
    assert matrix.energy_rank == 2  # the first holds 64 %
    assert matrix.amplification == pytest.approx(5 / 8**0.5)
    assert matrix.norm_share == vector.norm_share == pytest.approx(0.5)
    assert relative_norm([matrix, vector]) == pytest.approx((50 / 37) ** 0.5)
    assert (vector.kind, vector.update_norm, vector.base_norm, vector.d_in) == ("0.bias", 5, 5, None)
    assert (vector.energy_rank, vector.amplification) == (None, None)


def test_files_hold_what_was_found_and_repeat_to_the_byte(run):
    inspection = inspect_run(run)
    folder = run / "inspect"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.keys() == {"layers.csv", "spectra.json"}
    rows = list(csv.DictReader((folder / "layers.csv").read_text().splitlines()))
    assert [float(row["norm_share"]) for row in rows] == [row.norm_share for row in inspection.layers]
    assert sum(row.norm_share for row in inspection.layers) == pytest.approx(1)
    spectra = json.loads((folder / "spectra.json").read_text())
    for row in inspection.layers:
        assert len(spectra[row.layer]) == row.trained_rank == 2
        assert 1 <= row.energy_rank <= 2
    inspect_run(run)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("settings", "rank", "num_layers"),
    [
        ({}, 2, 28),
        ({"method": "intrinsic", "method.dim": 40}, None, 38),
        ({"method": "bitfit", "method.train": "biases_and_norms"}, None, 9),
    ],
    ids=str,
)
def test_every_method_is_measured(settings, rank, num_layers, tmp_path, make_config, inputs):
    train_run(make_config(settings), RunFolder(path=tmp_path), inputs=inputs)
    found = inspect_run(tmp_path)
    assert {row.trained_rank for row in found.layers} == {rank}
    assert len(found.layers) == num_layers
    assert all(row.update_norm < 0.5 * row.base_norm for row in found.layers)


def test_an_adapter_of_peft_is_inspected_as_what_it_changes(inputs, make_config, tmp_path):
    vera = {"peft_type": "VERA", "r": 8, "d_initial": 1.0, "target_modules": ["q_proj"]}
    train_run(make_config({"method": "peft", "method.config": vera}), RunFolder(path=tmp_path), inputs=inputs)
    found = inspect_run(tmp_path)
    assert {row.layer for row in found.layers} == {f"model.layers.{n}.self_attn.q_proj" for n in range(4)}
    spectrum = found.spectra["model.layers.0.self_attn.q_proj"]
    # the update has VeRA's rank; the rest is rounding of the merged weight in fp32
    assert spectrum[7] > 100 * spectrum[8]
    assert fingerprint_weights(inputs.base.model) == inputs.base.fingerprint


def zero_b(run):
    tensors = load_file(run / ADAPTER)
    save_file({name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}, run / ADAPTER)
    edit_json(run / "run.json", lambda raw: raw.update(files={}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "run.json").unlink(), r"run\.json"),
        (zero_b, "equal the base"),
        (lambda run: shutil.rmtree(run / "best"), "`best`"),
    ],
)
def test_a_run_that_can_not_be_inspected_is_refused(run, damage, message):
    damage(run)
    with pytest.raises(RecordError, match=message):
        inspect_run(run)
    assert not (run / "inspect").exists()
