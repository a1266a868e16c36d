"""The embedded base model: its files, and `pretrain`, the script that made them."""
