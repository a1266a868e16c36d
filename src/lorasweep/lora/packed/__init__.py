"""Trains several trials in one forward pass on one frozen base. Each trial has a slot, with its own weight updates.

inject_packed_lora(model, [LoraConfig(rank=4), LoraConfig(rank=64)])
model(torch.cat([batch_of_slot_0, batch_of_slot_1]))
"""
