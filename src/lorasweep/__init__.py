"""lorasweep finds, for a model and data, which LoRA rank, α and learning rate to use, and whether LoRA is enough."""
