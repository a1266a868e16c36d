"""The files of the embedded base model."""
