"""Ten steps of our training path under Lightning's Trainer, in float64, against PEFT and full fine-tuning by hand."""

import copy
from dataclasses import replace

import lightning
import peft
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from lorasweep.lora import lora_state
from lorasweep.training.data_module import DataModule
from lorasweep.training.module import TrainingModule

STEPS, WARMUP, LR, DECAY, CLIP_NORM = 10, 2, 3e-3, 0.1, 0.5
SETTINGS = {
    "trainer.max_steps": STEPS,
    "trainer.batch_size": 3,
    "optim.lr": LR,
    "optim.weight_decay": DECAY,
    "optim.clip_norm": CLIP_NORM,
    "schedule": "linear",
    "schedule.warmup_fraction": WARMUP / STEPS,
}
LORA = {"method.rank": 4, "method.alpha": 8.0, "method.targets": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base(inputs):
    """A random Llama of two blocks with the vocabulary of the data, in place of the embedded model."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(inputs.base.tokenizer), use_cache=False))
    return replace(inputs.base, model=model.eval().requires_grad_(False))


class Recorder(lightning.Callback):
    """Keeps the adapter's initial values, and the batch and the loss of each step."""

    def __init__(self):
        self.start, self.batches, self.losses = {}, [], []

    def on_train_start(self, trainer, module):
        self.start = {name: tensor.clone() for name, tensor in lora_state(module.whole_models()[0]).items()}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches.append({name: batch[name] for name in ("input_ids", "targets")})
        self.losses.append(module.step_losses.sum().item())


def train_here(config, inputs, base, folder):
    recorder = Recorder()
    trainer = lightning.Trainer(
        max_steps=STEPS,
        precision="64-true",
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[recorder],
        default_root_dir=folder,
    )
    module = TrainingModule(config, inputs=replace(inputs, base=replace(base, model=copy.deepcopy(base.model))))
    trainer.fit(module, datamodule=DataModule(config, splits=inputs.splits))
    return recorder


def train_by_hand(model, batches):
    """AdamW with decay of matrices only, a linear schedule and clipping; returns the loss of each step."""
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=LR)
    losses = []
    for step, batch in enumerate(batches):
        rising, falling = (step + 1) / (WARMUP + 1), (STEPS - step) / (STEPS - WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = LR * min(rising, falling, 1.0)
        logits = model(input_ids=batch["input_ids"]).logits
        loss = cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, CLIP_NORM)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # what PEFT calls
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning with a newer torch
@pytest.mark.parametrize("method", ["lora", "full"])
def test_ten_steps_equal_peft_and_a_plain_loop(method, make_config, inputs, base, tmp_path):
    config = make_config({"method": method, **SETTINGS, **(LORA if method == "lora" else {})})
    ours = train_here(config, inputs, base, tmp_path)
    reference = copy.deepcopy(base.model).double().requires_grad_(method == "full")
    if method == "lora":
        settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LORA["method.targets"])
        reference = peft.get_peft_model(reference, settings).double()
        peft.set_peft_model_state_dict(reference, ours.start)
    expected = train_by_hand(reference.train(), ours.batches)
    assert len(expected) == STEPS
    assert expected[-1] < expected[0]
    # sums of some thousands of float64 products per loss, which AdamW's division by small moments enlarges
    assert ours.losses == pytest.approx(expected, rel=1e-6)
