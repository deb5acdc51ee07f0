"""Compares patch features with the "normal" and "abnormal" text features (paper, section 3.3).

Axes: B images, L tokens (class token first), P patches, E joint width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.functional import normalize

TEMPERATURE = 100.0
"""CLIP's logit scale, which MVFA fixes."""


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch autocast and TF32 off: differences in cosine are far below half precision's resolution."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda" or torch.compiler.is_compiling():
            yield
            return
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


def patch_logits(tokens: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
    """Scaled cosine of every patch with both states.

    Args:
        tokens: Adapter features ``(B, L, E)``; the class token is dropped.
        text_features: Unit columns ``(E, 2)``: normal, abnormal.

    Returns:
        Logits ``(B, P, 2)``, float32; column 1 is abnormal.
    """
    with full_precision(tokens.device):
        return TEMPERATURE * normalize(tokens[:, 1:].float(), dim=-1) @ text_features.float()


def pool_patches(probability: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pool abnormal probabilities of patches ``(..., P)`` to those of images ``(...)``, by "mean" or (paper) "max"."""
    return probability.amax(dim=-1) if pooling == "max" else probability.mean(dim=-1)
