"""Brings the zero-shot and the few-shot branch to one score (paper, Eq. 6, and calibrated forms of it)."""

from typing import NamedTuple

import torch

NOISE = 1e-5
"""Values whose range is not above are equal but for rounding, and scaled by it would all saturate."""
MAX_DISTANCE = 2.0
"""The largest value of 1 - cosine."""


class Weights(NamedTuple):
    """Weights of the branches; they need not sum to one."""

    zero: float
    few: float


def value_range(values: torch.Tensor) -> torch.Tensor:
    """Return minimum and maximum of all values, ``(2,)``."""
    return torch.stack(list(values.aminmax()))


def fuse(
    zero: torch.Tensor | None,
    few: torch.Tensor | None,
    weights: Weights,
    ranges: torch.Tensor | None,
) -> torch.Tensor:
    """Fuse the branches' values, whatever their shape, into scores inside [0, 1].

    With ranges, the weighted sum u of the values scaled by their ranges is mapped by a strictly increasing function
    that never clamps: ranges come from few images, others may lie outside, and ties would spoil AUROC. Without, it is
    the weighted mean (paper, Eq. 6) over its largest possible value.

    Args:
        zero: Probabilities in [0, 1], or None when the zero-shot branch has no weight.
        few: Distances in [0, 2] of the same shape, or None when the few-shot branch has no weight.
        weights: Weights of the branches.
        ranges: Lowest and highest value of each branch ``(2, 2)``: zero-shot, few-shot.

    Returns:
        Scores of the same shape, higher is more abnormal.
    """
    branches = [(row, values) for row, values in enumerate((zero, few)) if values is not None]
    if ranges is None:
        terms = [weights[row] * values for row, values in branches]
        return sum(terms[1:], terms[0]) / (weights.zero + MAX_DISTANCE * weights.few)

    span = ranges[:, 1] - ranges[:, 0]
    span = torch.where(span > NOISE, span, torch.ones_like(span))
    terms = [weights[row] * (values - ranges[row, 0]) / span[row] for row, values in branches]
    centred = 2 * sum(terms[1:], terms[0]) / (weights.zero + weights.few) - 1
    return 0.5 + 0.5 * centred / (1 + centred.abs())
