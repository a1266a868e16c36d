"""A file's LoRA has here the layers, ranks and factors that PEFT makes of what the tool gives to it.

What axolotl and LLaMA-Factory give to `peft.LoraConfig` is in `_build_peft_lora_config` (axolotl's loaders/adapter.py)
and in `_setup_lora_tuning` (LLaMA-Factory's model/adapter.py); both name layers by the last parts of their names.
"""

import peft
import pytest
import torch
from torch import nn

from lorasweep.config.compose import compose_run
from lorasweep.lora.inject import inject_lora
from lorasweep.models.load import load_base
from lorasweep.recipes.read import read_recipe

AXOLOTL = "base_model: embedded:tiny\nadapter: lora\nlora_r: 4\nlora_alpha: 10\nlearning_rate: 1e-3\n"
FACTORY = "model_name_or_path: embedded:tiny\nstage: sft\nlora_rank: 6\nlearning_rate: 1e-3\n"
FILES = {
    "axolotl, linear": (AXOLOTL + "lora_target_linear: true", {"r": 4, "lora_alpha": 10}),
    "axolotl, rsLoRA of some layers": (
        AXOLOTL + "lora_target_modules: [q_proj, down_proj]\npeft_use_rslora: true",
        {"r": 4, "lora_alpha": 10, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    ),
    "axolotl, ranks by layer": (
        AXOLOTL + "lora_target_linear: true\nlora_rank_pattern: {q_proj: 2}\nlora_alpha_pattern: {k_proj: 3}",
        {"r": 4, "lora_alpha": 10, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    ),
    "LLaMA-Factory, its defaults": (FACTORY, {"r": 6, "lora_alpha": 12}),
    "LLaMA-Factory, some layers": (
        FACTORY + "lora_target: q_proj,v_proj\nuse_rslora: true\nlora_alpha: 5\n",
        {"r": 6, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    ),
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks by the former name
@pytest.mark.parametrize("case", FILES)
def test_layers_factors_and_trained_parameters_are_those_of_peft(case, tmp_path):
    text, given = FILES[case]
    (tmp_path / "theirs.yaml").write_text(text)
    config = compose_run({"model": "tiny", **read_recipe(tmp_path / "theirs.yaml", has_data=True).method})
    ours, theirs = (load_base(config.model, dtype=torch.float32).model for _ in range(2))
    linear = {name.rpartition(".")[2] for name, layer in theirs.named_modules() if isinstance(layer, nn.Linear)}
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(**{"target_modules": sorted(linear - {"lm_head"}), **given}))
    expected = {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in adapted.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    inject_lora(ours, config.method)
    found = {name: (layer.rank, layer.scaling) for name, layer in ours.named_modules() if hasattr(layer, "lora_a")}
    assert found == expected
    sizes = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, adapted)]
    assert sizes[0] == sizes[1]
