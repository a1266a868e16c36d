"""A pack of a model beside the solo runs that its slots must equal."""

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lorasweep.lora import inject_lora, inject_packed_lora, lora_state, set_dropout_streams, slot_model
from lorasweep.lora.inject import replace_dropout
from lorasweep.lora.packed.inject import find_slots


def stream(seed):
    return torch.Generator().manual_seed(seed)


def get_trained(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def randomise(model, seed):
    """Gives all that trains random values, so that the change is not zero."""
    generator = stream(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)


@dataclass
class PackAndSolos:
    """A packed model and, for each slot, the solo model with the same values."""

    pack: nn.Module
    solos: list[nn.Module]

    def run(self, inputs):
        """Outputs of the pack and of the solo models, dropout seeded alike, on slot-major inputs."""
        set_dropout_streams(self.pack, [stream(70 + slot) for slot in range(len(self.solos))])
        packed, separate = self.pack(inputs), []
        for slot, (solo, rows) in enumerate(zip(self.solos, inputs.chunk(len(self.solos)), strict=True)):
            with torch.random.fork_rng():
                torch.manual_seed(70 + slot)
                separate.append(solo(rows))
        return packed, torch.cat(separate)

    def assert_equal(self, inputs):
        """Outputs and what a step of gradient descent makes of every slot are those of the solo models.

        Two steps: one as it comes, and one with stacks that are made once.
        """
        for context in (nullcontext(), find_slots(self.pack).stacks.share(is_training=self.pack.training)):
            with context:
                packed, separate = self.run(inputs)
                torch.testing.assert_close(packed, separate)  # float64 defaults: the same sums in another order
                weights = torch.linspace(-1, 1, packed.numel(), dtype=packed.dtype).view(packed.shape)
                for outputs in (packed, separate):
                    (outputs * weights).sum().backward()
            for model in (self.pack, *self.solos):
                descend(model)
            for slot, solo in enumerate(self.solos):
                torch.testing.assert_close(lora_state(slot_model(self.pack, slot)), lora_state(solo))


def descend(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None


@pytest.fixture
def make_pack():
    """Makes a pack in float64 whose slots have random values, and the solo models with the same values."""

    def make(make_base, configs):
        pack = make_base().double()
        inject_packed_lora(pack, configs, generators=[stream(k) for k in range(len(configs))])
        pack.double()
        solos = []
        for slot, config in enumerate(configs):
            solo = make_base().double()
            inject_lora(solo, config, generator=stream(slot))
            replace_dropout(solo)
            randomise(solo.double(), slot)
            slot_model(pack, slot).load_state_dict(get_trained(solo), strict=False)
            solos.append(solo)
        assert find_slots(pack).num_slots == len(configs)
        return PackAndSolos(pack.train(), [solo.train() for solo in solos])

    return make
