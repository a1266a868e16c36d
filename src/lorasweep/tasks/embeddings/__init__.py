"""Pairs of an anchor, such as a question, and a passage that belongs to it, for models that embed texts."""
