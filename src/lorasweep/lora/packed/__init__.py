"""Many trials in one forward pass on one frozen base: each layer has one weight update per slot, one slot per trial.

coverages = inject_packed_lora(model, [LoraConfig(rank=4), LoraConfig(rank=64)])  # inputs: slot-major, 2 · B rows
"""
