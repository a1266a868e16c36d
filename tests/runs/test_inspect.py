"""A run inspected from its folder: every method is measured."""

import copy
import shutil

import pandas
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.files import edit_json
from torch import nn

from lorasweep.errors import RecordError
from lorasweep.models.load import fingerprint_weights
from lorasweep.runs.inspect import compute_singular_values, inspect_run, measure_updates
from lorasweep.training.open_run import RunFolder
from lorasweep.training.run import train_alone

ADAPTER = "best/adapter_model.safetensors"


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 4, None])
def test_singular_values_are_those_of_the_whole_matrix(rank):
    matrix = draw(40, rank or 30) @ draw(rank or 30, 30, seed=1)
    s = compute_singular_values(matrix, rank=rank)
    assert len(s) == (rank or 30)
    # float64 rounding of sums of some dozens of products of numbers of size 1
    torch.testing.assert_close(s, torch.linalg.svdvals(matrix)[: len(s)], rtol=1e-10, atol=1e-10)


def test_a_row_has_the_share_and_the_directions_of_its_change():
    base = nn.Sequential(nn.Linear(3, 3)).requires_grad_(False)
    model = copy.deepcopy(base)
    model[0].weight += torch.diag(torch.tensor([3.0, 4.0, 0.0]))
    model[0].bias += torch.tensor([0.0, 5.0, 0.0])
    matrix, vector = measure_updates(model, base, ranks={"0": 3}).itertuples(index=False)
    assert (matrix.layer, matrix.rank, matrix.directions) == ("0", 3, 2)  # the first holds 64 %
    assert matrix.norm_share == pytest.approx(0.5)
    assert (vector.layer, pandas.isna(vector.rank), pandas.isna(vector.directions)) == ("0.bias", True, True)


def test_a_run_is_inspected_and_nothing_is_written(run):
    before = set(run.rglob("*"))
    found = inspect_run(run)
    assert (len(found), {*found["rank"]}) == (28, {2})
    assert found["norm_share"].sum() == pytest.approx(1)
    assert found["directions"].between(1, 2).all()
    assert set(run.rglob("*")) == before
    assert inspect_run(run).equals(found)


@pytest.mark.parametrize(
    ("settings", "num_layers"),
    [({"method": "intrinsic", "method.dim": 40}, 38), ({"method": "full", "method.parameters": ".*norm.*"}, 9)],
)
def test_other_methods_are_measured(settings, num_layers, tmp_path, make_config, inputs):
    train_alone(make_config(settings), RunFolder(path=tmp_path), inputs=inputs)
    found = inspect_run(tmp_path)
    assert found["rank"].isna().all()
    assert len(found) == num_layers


def test_an_adapter_of_peft_is_inspected_as_what_it_changes(inputs, make_config, tmp_path):
    vera = {"peft_type": "VERA", "r": 8, "d_initial": 1.0, "target_modules": ["q_proj"]}
    train_alone(make_config({"method": "peft", "method.config": vera}), RunFolder(path=tmp_path), inputs=inputs)
    found = inspect_run(tmp_path)
    assert set(found["layer"]) == {f"model.layers.{n}.self_attn.q_proj" for n in range(4)}
    assert found["directions"].between(1, 8).all()  # the update has VeRA's rank
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
