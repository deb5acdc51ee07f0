"""The training loss (paper, Eq. 3, as published): focal + dice on the maps, binary cross-entropy on the image score.

Axes: B images, H = W image size. All in float32.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits

FOCAL_SMOOTHING = 1e-5
DICE_SMOOTHING = 1.0


def focal_loss(probabilities: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Focal loss with gamma 2 of normal and abnormal probabilities ``(B, 2, H, W)``, mean over all pixels.

    The mask ``(B, H, W)`` is 1 where abnormal.
    """
    target = torch.stack([1 - mask, mask], dim=1).clamp(FOCAL_SMOOTHING, 1 - FOCAL_SMOOTHING)
    # The published code adds the smoothing once more to the probability, in both factors.
    p_true = (target * probabilities).sum(dim=1) + FOCAL_SMOOTHING
    return -((1 - p_true) ** 2 * p_true.log()).mean()


def dice_loss(abnormal: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Dice loss of the abnormal channel ``(B, H, W)`` with the mask ``(B, H, W)``, mean over images, unsquared."""
    overlap = (abnormal * mask).sum(dim=(1, 2))
    total = abnormal.sum(dim=(1, 2)) + mask.sum(dim=(1, 2))
    return (1 - (2 * overlap + DICE_SMOOTHING) / (total + DICE_SMOOTHING)).mean()


def image_loss(score: torch.Tensor, label: torch.Tensor, bce: str = "logits") -> torch.Tensor:
    """Binary cross-entropy of image scores.

    Args:
        score: Pooled abnormal probability ``(B,)``.
        label: 1 where abnormal ``(B,)``.
        bce: "logits" (published: a second sigmoid on the probability) or "plain" (paper).

    Returns:
        Mean over images, a scalar.
    """
    label = label.to(score.dtype)
    if bce == "plain":
        return binary_cross_entropy(score, label)
    return binary_cross_entropy_with_logits(score, label)


class MvfaLoss(nn.Module):
    """Sum over levels of the three losses, all weights 1.

    Args:
        bce: See :func:`image_loss`.
    """

    def __init__(self, bce: str = "logits") -> None:
        super().__init__()
        self.bce = bce

    def forward(
        self,
        seg_maps: Sequence[torch.Tensor],
        det_scores: Sequence[torch.Tensor],
        mask: torch.Tensor | None,
        label: torch.Tensor,
    ) -> torch.Tensor:
        """Total loss of a batch.

        Args:
            seg_maps: Per level, probabilities ``(B, 2, H, W)``; empty when the data set has no masks.
            det_scores: Per level, pooled abnormal probability ``(B,)``.
            mask: 1 where abnormal ``(B, H, W)``; not read without ``seg_maps``.
            label: 1 where abnormal ``(B,)``.

        Returns:
            A scalar, float32.
        """
        with torch.autocast(label.device.type, enabled=False):
            loss = torch.stack([image_loss(score, label, self.bce) for score in det_scores]).sum()
            if seg_maps and mask is not None:
                mask = mask.to(seg_maps[0].dtype)
                for probabilities in seg_maps:
                    loss = loss + focal_loss(probabilities, mask) + dice_loss(probabilities[:, 1], mask)
        return loss
