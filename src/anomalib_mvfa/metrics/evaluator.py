"""Which metrics are reported."""

from anomalib import metrics
from anomalib.metrics import AnomalibMetric, Evaluator

from .pixel_metrics import BinnedAUPR, BinnedAUPRO, BinnedAUROC


def default_evaluator() -> Evaluator:
    """Return image AUROC and F1, and pixel AUROC, AUPR, AUPRO and F1 where there are masks.

    The areas of pixels are counted in bins, whose memory does not grow with the test set.
    """
    return Evaluator(
        test_metrics=[
            metrics.AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
            metrics.F1Score(fields=["pred_label", "gt_label"], prefix="image_"),
            AUROC(prefix="pixel_", strict=False),
            AUPR(prefix="pixel_", strict=False),
            AUPRO(prefix="pixel_", strict=False),
            metrics.F1Score(fields=["pred_mask", "gt_mask"], prefix="pixel_", strict=False),
        ],
    )


# Of anomalib's batches, and named as its own metrics: the name is what a metric is reported under.


class AUROC(AnomalibMetric, BinnedAUROC):  # type: ignore[misc]  # anomalib's own way to wrap a metric
    """Binned AUROC of maps and masks."""

    default_fields = ("anomaly_map", "gt_mask")


class AUPR(AnomalibMetric, BinnedAUPR):  # type: ignore[misc]
    """Binned AUPR of maps and masks."""

    default_fields = AUROC.default_fields


class AUPRO(AnomalibMetric, BinnedAUPRO):  # type: ignore[misc]
    """Binned AUPRO of maps and masks."""

    default_fields = AUROC.default_fields
