"""A sweep or a run does not go on with other data, another base or other code than it began with."""

import itertools
import shutil

import pytest
from tests.files import edit_json, read_files
from tests.small_runs import MINI, SMALL_RUN
from tests.training.runs import stop_after

import lorasweep
from lorasweep.config.compose import compose_run
from lorasweep.config.run import ModelConfig
from lorasweep.errors import ConfigError
from lorasweep.models.load import find_model_folder
from lorasweep.training.inputs import load_inputs
from lorasweep.training.open_run import RunFolder
from lorasweep.training.run import train_alone

CALLBACK = "from lightning import Callback\nclass Mine(Callback):\n    pass\n"
OWN = {
    "model": "causal_lm",
    "model.path": "base",
    "data": "text",
    "data.train": "train.txt",
    "data.test": "test.txt",
}
NUMBERS = itertools.count()


def change(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.fixture
def own(here, make_config):
    """Settings with the user's model, data and code in the current folder, and the name of the file of code."""
    tiny: ModelConfig = make_config().model
    shutil.copytree(find_model_folder(tiny), here / "base")
    for name in ("train", "test"):
        texts = [f"the {name} text number {number} " * 20 for number in range(40)]
        (here / f"{name}.txt").write_text("\n\n".join(texts))
    name = f"own_callback_{next(NUMBERS)}"  # Python would not import a module of the same name again
    (here / f"{name}.py").write_text(CALLBACK)
    return OWN | {"callbacks.mine._target_": f"{name}.Mine"}, f"{name}.py"


def test_a_sweep_goes_on_only_with_what_it_began_with(own, here):
    settings, code = own
    settings = MINI["settings"] | settings | {"confirm.seeds": 1}
    lorasweep.run_sweep(MINI | {"settings": settings}, output="sweep", progress=None)
    changed = ["train.txt", "base/model.safetensors", "base/config.json", code, "test.txt"]
    changes = {"arms.lora.trials": 3, "confirm.seeds": 2}
    before = read_files(here / "sweep")
    for name in changed:
        content = (here / name).read_bytes()
        if name.endswith("config.json"):
            edit_json(here / name, lambda raw: raw.update(rms_norm_eps=1e-3))
        else:
            change(here / name)
        named = {"train.txt": "data.(train|validation)", "test.txt": "data.test"}.get(name, name.rpartition("/")[2])
        source = f", read from '[^']*{name}'," if name.endswith(".txt") else ""
        with pytest.raises(
            ConfigError, match=rf"`[^`]*{named}[^`]*`{source} must be as when the sweep began \(.*'\w{{16}}'"
        ):
            lorasweep.resume_sweep("sweep", overrides=changes, progress=None)
        (here / name).write_bytes(content)
        assert read_files(here / "sweep") == before
    assert lorasweep.resume_sweep("sweep", overrides=changes, progress=None).status == "complete"


def test_a_run_goes_on_only_with_the_data_and_the_code_it_began_with(own, here):
    settings, code = own
    config = compose_run(SMALL_RUN | settings)
    train_alone(config, RunFolder(path=here / "run"), inputs=load_inputs(config), stop_requested=stop_after(1))
    for name, key in (("train.txt", "data.*`, read from 'train.txt',"), (code, r"callbacks\.mine\._target_ .*\.py.`")):
        content = (here / name).read_bytes()
        change(here / name)
        with pytest.raises(ConfigError, match=f"`{key} must be as when the run began .*start a new run"):
            train_alone(config, RunFolder(path=here / "run"), inputs=load_inputs(config), resume=True)
        (here / name).write_bytes(content)
    record = train_alone(config, RunFolder(path=here / "run"), inputs=load_inputs(config), resume=True)
    assert record.status == "complete"
