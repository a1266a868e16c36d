"""Trains several runs together on one frozen base model. Each run has a slot of the pack."""
