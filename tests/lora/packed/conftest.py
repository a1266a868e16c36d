"""A pack beside the packs of one slot and the solo models that its slots must equal."""

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lorasweep.lora import Slots, inject_lora, inject_packed_lora, lora_state
from lorasweep.lora.dropout import FunctionalDropout


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
class Pack:
    """A packed model and its slots, or a solo model without slots."""

    model: nn.Module
    slots: Slots | None = None

    def solos(self):
        return self.slots.models if self.slots else [self.model]

    def step(self, inputs, *, place):
        """Returns the outputs, and makes a step of gradient descent on the sum of their squares."""
        if self.slots:
            self.slots.masks.begin(place)
        with FunctionalDropout(self.slots.masks.drop) if self.slots else nullcontext():
            output = self.model(inputs)
        output.square().sum().backward()
        with torch.no_grad():
            for parameter in (self.slots.weights if self.slots else self.model).parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None
        return output.detach()


@dataclass
class Packs:
    """A pack, and for each slot the pack of this slot alone and the solo model, with the same values."""

    pack: Pack
    ones: list[Pack]
    solos: list[Pack]

    def assert_equal(self, inputs):
        """A step in training equals the packs of one slot, and a step in evaluation mode the solo models too."""
        self._assert_step_equal(inputs, [self.ones], place=0)
        for one, solo in zip(self.ones, self.solos, strict=True):
            solo.model.load_state_dict(get_trained(one.slots.models[0]), strict=False)
        for each in (self.pack, *self.ones, *self.solos):
            each.model.eval()
        self._assert_step_equal(inputs, [self.ones, self.solos], place=1)

    def _assert_step_equal(self, inputs, separate, *, place):
        found = self.pack.step(inputs, place=place)
        for each in separate:
            rows = zip(each, inputs.chunk(len(each)), strict=True)
            # float64 defaults: the same sums in another order
            torch.testing.assert_close(found, torch.cat([one.step(part, place=place) for one, part in rows]))
            for solo, one in zip(self.pack.solos(), each, strict=True):
                torch.testing.assert_close(lora_state(solo), lora_state(one.solos()[0]))


@pytest.fixture
def make_packs():
    """Makes a pack in float64 whose slots have random values, the packs of one slot, and the solo models."""

    def pack_double(base, configs, first):
        base.double()
        numbers = range(first, first + len(configs))
        slots = inject_packed_lora(base, configs, generators=[stream(n) for n in numbers], dropout_seeds=list(numbers))
        slots.weights.double()
        for number, solo in zip(numbers, slots.models, strict=True):
            randomise(solo, number)
        return Pack(base.train(), slots)

    def make(make_base, configs):
        pack = pack_double(make_base(), configs, 0)
        ones = [pack_double(make_base(), [config], slot) for slot, config in enumerate(configs)]
        solos = [Pack(make_base().double()) for _ in configs]
        for solo, config in zip(solos, configs, strict=True):
            inject_lora(solo.model, config)
            solo.model.double()
        return Packs(pack, ones, solos)

    return make
