"""Bounds of rounding errors, from the arithmetic and not from what one processor happens to give."""

import torch


def bound(*, terms, size, dtype=torch.float32):
    """Returns the largest difference of two sums of the same terms in different orders.

    Each of `terms` additions or products rounds a value of at most `size` by half of the dtype's eps (Higham 2002,
    Accuracy and Stability of Numerical Algorithms, section 4.2), in both sums. `size` is that of the largest partial
    sum; a tensor stands for its largest element.
    """
    size = float(size.detach().abs().max()) if isinstance(size, torch.Tensor) else size
    return terms * torch.finfo(dtype).eps * size


def assert_equal_up_to_rounding(found, expected, *, terms, dtype=None):
    """Compares two tensors with `bound`. `dtype` is the one that computes, if it is not that of `expected`."""
    limit = bound(terms=terms, size=expected, dtype=dtype or expected.dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)
