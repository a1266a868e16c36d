"""Every setting, as frozen dataclasses, and the way from Hydra to them. Nothing here imports torch."""
