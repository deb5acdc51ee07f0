"""Which metrics are reported, areas of pixels in constant memory, and scores that keep their order."""

import torch
from anomalib.metrics import AUROC, AnomalibMetric, Evaluator, F1Score
from anomalib.post_processing import PostProcessor
from anomalib.utils.cv import connected_components_cpu, connected_components_gpu
from torchmetrics import Metric

BINS = 2**20
"""Of scores in [0, 1]; enough for five equal decimals of the exact area, even of scores within a thousandth."""
PIXELS = ["anomaly_map", "gt_mask"]
FPR_LIMIT = 0.3
"""Of AUPRO, as anomalib's and MVTec's."""


class _Binned(Metric):
    """Counts of scores in [0, 1] by bins; scores of one bin count as ties. Memory is constant, ranks' states add up."""

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
        bins = bins_of(preds)
        abnormal = target.flatten() > 0
        self.normal += torch.bincount(bins[~abnormal], minlength=BINS)
        self.abnormal += torch.bincount(bins[abnormal], minlength=BINS)


def bins_of(scores: torch.Tensor) -> torch.Tensor:
    """Return the bin of every score, flat."""
    return (scores.detach().flatten().float() * BINS).long().clamp(0, BINS - 1)


class BinnedAUROC(_Binned):
    """Area under the ROC curve."""

    def compute(self) -> torch.Tensor:
        """Return the area, 0 when only one kind was seen (as anomalib's AUROC does)."""
        normal, abnormal = self.normal.double(), self.abnormal.double()
        pairs = normal.sum() * abnormal.sum()
        if pairs == 0:
            return torch.tensor(0.0, device=normal.device)
        normal_below = normal.cumsum(0) - normal
        return ((abnormal * (normal_below + 0.5 * normal)).sum() / pairs).float()


class BinnedAUPR(_Binned):
    """Area under the precision-recall curve, by trapezoids."""

    def compute(self) -> torch.Tensor:
        """Return the area, 0 when no abnormal pixel was seen."""
        false, true = (counts.flip(0).cumsum(0).double() for counts in (self.normal, self.abnormal))
        if true[-1] == 0:
            return torch.tensor(0.0, device=true.device)
        seen = (true + false) > 0
        recall, precision = true[seen] / true[-1], true[seen] / (true + false)[seen]
        start = torch.tensor([0.0], dtype=torch.float64, device=true.device)
        return torch.trapezoid(torch.cat([start + 1, precision]), torch.cat([start, recall])).float()


class BinnedAUPRO(Metric):
    """Area under the curve of mean overlap with lesions against the false positive rate, as anomalib's AUPRO.

    A lesion is a connected part of a mask. Each adds a histogram of its pixels' scores that sums to one, whatever its
    size: that is all that the curve depends on.
    """

    full_state_update = False
    higher_is_better = True
    normal: torch.Tensor
    lesions: torch.Tensor
    count: torch.Tensor

    def __init__(self, **kwargs) -> None:  # noqa: ANN003  # passed through to torchmetrics
        super().__init__(**kwargs)
        self.add_state("normal", torch.zeros(BINS, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("lesions", torch.zeros(BINS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        """Count scores ``(B, H, W)`` or ``(B, 1, H, W)`` with masks of the same size, above 0 where abnormal."""
        masks = (target.reshape(-1, 1, *target.shape[-2:]) > 0).float()
        label = connected_components_gpu if masks.is_cuda else connected_components_cpu
        parts = label(masks).long().flatten()  # numbered from 1 in the batch
        total = int(parts.max())
        bins = bins_of(preds)
        abnormal = parts > 0
        self.normal += torch.bincount(bins[~abnormal], minlength=BINS)
        shares = 1 / torch.bincount(parts, minlength=total + 1).double()
        self.lesions += torch.bincount(bins[abnormal], shares[parts[abnormal]], minlength=BINS)
        self.count += total

    def compute(self) -> torch.Tensor:
        """Return the area up to a false positive rate of 0.3 over 0.3, 0 when no lesion was seen."""
        if self.count == 0 or self.normal.sum() == 0:
            return torch.tensor(0.0, device=self.normal.device)
        start = torch.zeros(1, dtype=torch.float64, device=self.normal.device)
        rate = torch.cat([start, self.normal.flip(0).cumsum(0).double() / self.normal.sum()])
        overlap = torch.cat([start, self.lesions.flip(0).cumsum(0) / self.count])
        inside = int((rate <= FPR_LIMIT).sum())
        if inside < len(rate):  # the part of the last step that is inside
            share = (FPR_LIMIT - rate[inside - 1]) / (rate[inside] - rate[inside - 1])
            last = overlap[inside - 1] + share * (overlap[inside] - overlap[inside - 1])
            rate = torch.cat([rate[:inside], start + FPR_LIMIT])
            overlap = torch.cat([overlap[:inside], last.view(1)])
        return (torch.trapezoid(overlap, rate) / rate[-1]).float()


class _PixelAUROC(AnomalibMetric, BinnedAUROC):  # type: ignore[misc]  # anomalib's own way to wrap a metric
    """Of anomalib batches, reported under anomalib's name, as the next two."""

    def __init__(self) -> None:
        super().__init__(fields=PIXELS, strict=False)
        self.name = "pixel_AUROC"


class _PixelAUPR(AnomalibMetric, BinnedAUPR):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(fields=PIXELS, strict=False)
        self.name = "pixel_AUPR"


class _PixelAUPRO(AnomalibMetric, BinnedAUPRO):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(fields=PIXELS, strict=False)
        self.name = "pixel_AUPRO"


def metrics() -> Evaluator:
    """Return image AUROC and F1, and pixel AUROC, AUPR, AUPRO and F1 where there are masks.

    Areas of pixels are counted in bins, whose memory does not grow with the test set.
    """
    return Evaluator(
        test_metrics=[
            AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
            F1Score(fields=["pred_label", "gt_label"], prefix="image_"),
            _PixelAUROC(),
            _PixelAUPR(),
            _PixelAUPRO(),
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
