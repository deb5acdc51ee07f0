"""The 11 views of a support image: itself, 4 rotations, 4 translations, 2 flips (published code, after the resize).

Axes: C channels, H height, W width.
"""

import math

import torch
from torch.nn.functional import affine_grid, grid_sample

_TURNS = (-math.pi / 8, -math.pi / 16, math.pi / 16, math.pi / 8)
_SHIFTS = ((0.1, 0.1), (-0.1, 0.1), (-0.1, -0.1), (0.1, -0.1))
"""In grid units, of which an image is 2 wide."""

_AFFINE = [
    *[[[math.cos(a), -math.sin(a), 0.0], [math.sin(a), math.cos(a), 0.0]] for a in _TURNS],
    *[[[1.0, 0.0, x], [0.0, 1.0, y]] for x, y in _SHIFTS],
]

VIEWS = 1 + len(_AFFINE) + 2
"""How many views an image has; view 0 is the image itself."""


def view(image: torch.Tensor, index: int) -> torch.Tensor:
    """Return one view, from 0 to ``VIEWS - 1``, of a float image or mask ``(C, H, W)``, of the same shape.

    A mask comes back with soft edges. IndexError if there is no such view.
    """
    if not 0 <= index < VIEWS:
        msg = f"View {index} does not exist; views are numbered 0 to {VIEWS - 1}."
        raise IndexError(msg)
    if index == 0:
        return image
    if index > len(_AFFINE):
        return image.flip(-1 if index == VIEWS - 2 else -2)
    return warp(image, torch.tensor(_AFFINE[index - 1]))


def warp(image: torch.Tensor, theta: torch.Tensor, beyond: str = "reflection") -> torch.Tensor:
    """Move an image or mask ``(C, H, W)``.

    Args:
        image: Float values; those between pixels are interpolated.
        theta: Affine map ``(2, 3)`` from places (x, y) in the result to places in the image, both from -1 to 1.
        beyond: What is beyond the image's edges: "reflection", "border" (the edge goes on) or "zeros".
    """
    grid = affine_grid(theta[None], [1, *image.shape], align_corners=False)
    return grid_sample(image[None].float(), grid, mode="bilinear", padding_mode=beyond, align_corners=False)[0]
