"""Which metrics are reported."""

from collections.abc import Sequence

import torch
from anomalib import metrics
from anomalib.data import Batch
from anomalib.metrics import AnomalibMetric, Evaluator

from .pixel_metrics import BinnedAUPR, BinnedAUPRO, BinnedAUROC


def default_evaluator() -> Evaluator:
    """Return image AUROC and F1, and pixel AUROC, AUPR, AUPRO and F1, each NaN where it is not defined.

    The areas of pixels are counted in bins, whose memory does not grow with the test set.
    """
    return Evaluator(
        test_metrics=[
            ImageAUROC(),
            F1Score(fields=["pred_label", "gt_label"], prefix="image_"),
            AUROC(prefix="pixel_"),
            AUPR(prefix="pixel_"),
            AUPRO(prefix="pixel_"),
            F1Score(fields=["pred_mask", "gt_mask"], prefix="pixel_"),
        ],
    )


class OfBothKinds:
    """Makes a metric NaN, without a warning, unless it has seen normal and abnormal items; to be named first.

    Anomalib's own metrics are 0, 1 or missing there, which a mean or a ranking takes for a result.

    Attributes:
        seen: How many normal and abnormal items ``(2)``.
    """

    fields: Sequence[str]
    seen: torch.Tensor

    def __init__(self, **kwargs) -> None:  # noqa: ANN003  # anomalib's
        super().__init__(**kwargs)
        self.add_state("seen", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")  # type: ignore[attr-defined]

    def update(self, batch: Batch) -> None:
        """Count a batch; one without masks or maps holds nothing to count."""
        if any(getattr(batch, name, None) is None for name in self.fields):
            return
        super().update(batch)  # type: ignore[misc]
        is_abnormal = getattr(batch, self.fields[1]) > 0
        self.seen += torch.stack([(~is_abnormal).sum(), is_abnormal.sum()])

    def compute(self) -> torch.Tensor:
        """Return the metric, NaN where it is not defined."""
        return super().compute() if self.seen.all() else torch.full((), torch.nan, device=self.seen.device)  # type: ignore[misc]


# Named as anomalib's own metrics: the name is what a metric is reported under.


class ImageAUROC(OfBothKinds, metrics.AUROC):  # type: ignore[misc]
    """AUROC of image scores and labels."""

    def __init__(self, **kwargs) -> None:  # noqa: ANN003
        super().__init__(fields=["pred_score", "gt_label"], **kwargs)
        self.name = "image_AUROC"


class F1Score(OfBothKinds, metrics.F1Score):  # type: ignore[misc]
    """F1 of predicted labels or masks."""


class AUROC(OfBothKinds, AnomalibMetric, BinnedAUROC):  # type: ignore[misc]  # anomalib's own way to wrap a metric
    """Binned AUROC of maps and masks."""

    default_fields = ("anomaly_map", "gt_mask")


class AUPR(OfBothKinds, AnomalibMetric, BinnedAUPR):  # type: ignore[misc]
    """Binned AUPR of maps and masks."""

    default_fields = AUROC.default_fields


class AUPRO(OfBothKinds, AnomalibMetric, BinnedAUPRO):  # type: ignore[misc]
    """Binned AUPRO of maps and masks."""

    default_fields = AUROC.default_fields
