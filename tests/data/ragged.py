"""Sequences of different lengths from lists."""

import torch

from lorasweep.data.split import Ragged


def make_ragged(sequences):
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
    values = torch.tensor([value for sequence in sequences for value in sequence], dtype=torch.int64)
    return Ragged(values=values, ends=lengths.cumsum(0))
