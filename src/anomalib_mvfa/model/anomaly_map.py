"""From patches to maps of the image's size, and from a map to a score.

Axes: B images, P = G*G patches, H = W image size.
"""

import math

import torch
from torch.nn.functional import interpolate

TOP_SHARE = 0.05
"""Share of a map's pixels that "map_top" scores."""


def to_grid(patches: torch.Tensor) -> torch.Tensor:
    """Lay patches ``(B, P, C)`` out as a map ``(B, C, G, G)``, row by row."""
    side = math.isqrt(patches.shape[1])
    return patches.transpose(1, 2).unflatten(2, (side, side))


def upsample(grid: torch.Tensor, size: int) -> torch.Tensor:
    """Resize maps ``(B, C, G, G)`` to ``(B, C, size, size)``: bilinear, corners aligned."""
    return interpolate(grid, size=(size, size), mode="bilinear", align_corners=True)


def state_probabilities(logits: torch.Tensor, size: int, upsampled: str = "logits") -> torch.Tensor:
    """Probabilities of normal and abnormal at every pixel.

    Args:
        logits: Patch logits ``(B, P, 2)``.
        size: Height and width of the map.
        upsampled: What is upsampled: "logits" (published code) or "probabilities" (paper).

    Returns:
        Probabilities ``(B, 2, size, size)``; channel 1 is abnormal.
    """
    grid = to_grid(logits)
    if upsampled == "probabilities":
        return upsample(grid.softmax(dim=1), size)
    return upsample(grid, size).softmax(dim=1)


def map_score(anomaly_map: torch.Tensor, image_score: str) -> torch.Tensor:
    """Return scores ``(B,)`` of maps ``(B, H, W)``: "map_max", their maximum; "map_top", the mean of the top 5 %."""
    values = anomaly_map.flatten(1)
    if image_score == "map_max":
        return values.amax(dim=1)
    return values.topk(max(1, round(TOP_SHARE * values.shape[1])), dim=1).values.mean(dim=1)
