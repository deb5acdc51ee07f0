"""Anomalib's pre- and post-processor, in the forms that MVFA needs."""

import copy
from typing import Any

import torch
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import InterpolationMode, Resize


class AntialiasedPreProcessor(PreProcessor):
    """Squashes images to a square: bicubic, antialiased, in exported models too.

    Anomalib drops the antialiasing on export; on a 512 px film that moved the anomaly map by 0.2.

    Args:
        image_size: Height and width in pixels.
    """

    def __init__(self, image_size: int) -> None:
        super().__init__(Resize((image_size, image_size), interpolation=InterpolationMode.BICUBIC, antialias=True))
        self.export_transform = copy.deepcopy(self.transform)

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore the transform of a checkpoint, antialiased on export as well."""
        super().load_checkpoint_config(config)
        self.export_transform = copy.deepcopy(self.transform)


class ThresholdScaledPostProcessor(PostProcessor):
    """Maps scores linearly so that the threshold becomes 0.5: [0, t] to [0, 0.5] and [t, 1] to [0.5, 1].

    Scores of MVFA lie inside [0, 1] already. Anomalib's own scaling by the validation's extremes would clamp scores
    beyond them, and ties spoil AUROC.
    """

    @staticmethod
    def _normalize(
        preds: torch.Tensor | None,
        norm_min: torch.Tensor,
        norm_max: torch.Tensor,
        threshold: torch.Tensor,
    ) -> torch.Tensor | None:
        del norm_min, norm_max
        if preds is None:
            return None
        # Inside (0, 1), so that neither side is empty; without a threshold scores stay as they are.
        threshold = threshold.nan_to_num(nan=0.5).clamp(1e-6, 1 - 1e-6).to(preds)
        below, above = 0.5 * preds / threshold, 0.5 + 0.5 * (preds - threshold) / (1 - threshold)
        return torch.where(preds < threshold, below, above)
