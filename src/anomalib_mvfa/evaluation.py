"""Which metrics are reported, a pixel AUROC of constant memory, and a post-processor that keeps the order of scores."""

import torch
from anomalib.metrics import AUPRO, AUROC, AnomalibMetric, Evaluator, F1Score
from anomalib.post_processing import PostProcessor
from torchmetrics import Metric

BINS = 2**20
"""Of scores in [0, 1]; enough for five equal decimals of the exact area, even of scores within a thousandth."""


class BinnedAUROC(Metric):
    """Area under the ROC curve of scores in [0, 1], from counts per bin; scores of one bin count as ties."""

    full_state_update = False
    higher_is_better = True
    normal: torch.Tensor
    abnormal: torch.Tensor

    def __init__(self, **kwargs) -> None:  # noqa: ANN003  # passed through to torchmetrics
        super().__init__(**kwargs)
        self.add_state("normal", torch.zeros(BINS, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("abnormal", torch.zeros(BINS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        """Count scores ``(...)`` with targets ``(...)``, 1 where abnormal."""
        bins = (preds.detach().flatten().float() * BINS).long().clamp(0, BINS - 1)
        abnormal = target.flatten() > 0
        self.normal += torch.bincount(bins[~abnormal], minlength=BINS)
        self.abnormal += torch.bincount(bins[abnormal], minlength=BINS)

    def compute(self) -> torch.Tensor:
        """Return the area, 0 when only one kind was seen (as anomalib's AUROC does)."""
        normal, abnormal = self.normal.double(), self.abnormal.double()
        pairs = normal.sum() * abnormal.sum()
        if pairs == 0:
            return torch.tensor(0.0, device=normal.device)
        normal_below = normal.cumsum(0) - normal
        return ((abnormal * (normal_below + 0.5 * normal)).sum() / pairs).float()


class _PixelAUROC(AnomalibMetric, BinnedAUROC):  # type: ignore[misc]  # anomalib's own way to wrap a metric
    """Pixel AUROC of anomalib batches, reported under anomalib's name."""

    def __init__(self) -> None:
        super().__init__(fields=["anomaly_map", "gt_mask"], strict=False)
        self.name = "pixel_AUROC"


def metrics() -> Evaluator:
    """Return image AUROC and F1, and pixel AUROC, AUPRO and F1 where there are masks."""
    return Evaluator(
        test_metrics=[
            AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
            F1Score(fields=["pred_label", "gt_label"], prefix="image_"),
            _PixelAUROC(),
            AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
            F1Score(fields=["pred_mask", "gt_mask"], prefix="pixel_", strict=False),
        ],
    )


class OrderKeepingPostProcessor(PostProcessor):
    """Maps scores of any range into (0, 1) without a tie: strictly increasing, the threshold at 0.5.

    Anomalib's own post-processor scales by the validation's extremes and clamps what lies beyond them; the ties that
    this makes change AUROC, for one method more than for another. With this one, AUROC is that of the raw scores.
    """

    @staticmethod
    def _normalize(
        preds: torch.Tensor | None,
        norm_min: torch.Tensor,
        norm_max: torch.Tensor,
        threshold: torch.Tensor,
    ) -> torch.Tensor | None:
        if preds is None:
            return None
        threshold = torch.where(threshold.isnan(), (norm_max + norm_min) / 2, threshold).nan_to_num(nan=0.0)
        span = (norm_max - norm_min).nan_to_num(nan=1.0)
        span = torch.where(span > 0, span, torch.ones_like(span))
        distance = (preds - threshold.to(preds)) / span.to(preds)  # from the threshold, in ranges of the validation
        return 0.5 + 0.5 * distance / (1 + distance.abs())
