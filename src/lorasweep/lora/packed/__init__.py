"""Many trials in one forward pass on one frozen base: a stacked change per layer, one slot per trial.

    coverages = inject_packed_lora(model, [LoraConfig(rank=4), LoraConfig(rank=64)])  # inputs: slot-major, 2 · B rows

`inject` puts `layers` in place, also for a new trial in a slot. They draw `dropout` from one stream per slot. `trained`
holds the modules that slots train in full. `slots` reads, writes and drops single slots.
"""
