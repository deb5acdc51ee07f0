"""Areas under curves of pixels in constant memory: scores are counted in bins, and those of one bin are ties.

The functions compute areas from counts in bins of increasing scores; the metrics count, batch by batch.
"""

import torch
from anomalib.utils.cv import connected_components_cpu, connected_components_gpu
from torchmetrics import Metric

BINS = 2**20
"""Number of bins of scores in [0, 1]: five decimals of an area are exact, even if scores lie within a thousandth."""
FPR_LIMIT = 0.3
"""False positive rate up to which AUPRO is taken, as in anomalib and MVTec."""


def auroc(normal: torch.Tensor, abnormal: torch.Tensor) -> torch.Tensor:
    """Area under the ROC curve; ties count half.

    Args:
        normal: Counts of normal items ``(..., bins)``, float64.
        abnormal: Counts of abnormal items ``(..., bins)``, float64.

    Returns:
        Areas ``(...)``, NaN where there are no normal or no abnormal items.
    """
    below = normal.cumsum(-1) - 0.5 * normal
    return (abnormal * below).sum(-1) / (abnormal.sum(-1) * normal.sum(-1))


def aupr(normal: torch.Tensor, abnormal: torch.Tensor) -> torch.Tensor:
    """Area under the precision-recall curve, by trapezoids.

    Args:
        normal: Counts of normal items ``(..., bins)``, float64.
        abnormal: Counts of abnormal items ``(..., bins)``, float64.

    Returns:
        Areas ``(...)``, NaN where there are no abnormal items.
    """
    false, true = (counts.flip(-1).cumsum(-1) for counts in (normal, abnormal))
    recall = true / true[..., -1:]
    precision = torch.where(true + false > 0, true / (true + false), 1.0)  # before the first item, too
    start = torch.zeros_like(recall[..., :1])
    return torch.trapezoid(torch.cat([start + 1, precision], -1), torch.cat([start, recall], -1))


def aupro(normal: torch.Tensor, lesions: torch.Tensor) -> torch.Tensor:
    """Area under the curve of mean overlap with lesions against the false positive rate, over the rate's limit.

    Args:
        normal: Counts of normal pixels ``(bins)``, float64.
        lesions: Mean over lesions of each one's histogram, which sums to one whatever the size ``(bins)``, float64.

    Returns:
        The area ``()`` in [0, 1], NaN where there are no normal pixels or no lesions.
    """
    zero = normal.new_zeros(1)
    rate = torch.cat([zero, normal.flip(0).cumsum(0) / normal.sum()])
    overlap = torch.cat([zero, lesions.flip(0).cumsum(0)])
    inside = int((rate <= FPR_LIMIT).sum())
    share = (FPR_LIMIT - rate[inside - 1]) / (rate[inside] - rate[inside - 1])  # of the step that crosses the limit
    last = overlap[inside - 1] + share * (overlap[inside] - overlap[inside - 1])
    area = torch.trapezoid(torch.cat([overlap[:inside], last.view(1)]), torch.cat([rate[:inside], zero + FPR_LIMIT]))
    return area / FPR_LIMIT


def bins_of(scores: torch.Tensor) -> torch.Tensor:
    """Return the bins of scores in [0, 1], flat."""
    return (scores.detach().flatten().float() * BINS).long().clamp(0, BINS - 1)


def count(bins: torch.Tensor, is_abnormal: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return counts ``(size)`` of normal and of abnormal items, given each one's bin ``(N)``."""
    return torch.bincount(bins[~is_abnormal], minlength=size), torch.bincount(bins[is_abnormal], minlength=size)


class _Binned(Metric):
    """Counts by bin, whose memory does not grow with the test set and which add up over processes."""

    full_state_update = False
    higher_is_better = True
    normal: torch.Tensor
    abnormal: torch.Tensor

    def __init__(self, **kwargs) -> None:  # noqa: ANN003  # passed through to torchmetrics
        super().__init__(**kwargs)
        self.add_state("normal", torch.zeros(BINS, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("abnormal", torch.zeros(BINS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        """Count scores ``(...)`` in [0, 1] with targets ``(...)``, above 0 where abnormal."""
        normal, abnormal = count(bins_of(preds), target.flatten() > 0, BINS)
        self.normal += normal
        self.abnormal += abnormal


class BinnedAUROC(_Binned):
    """Area under the ROC curve of pixels."""

    def compute(self) -> torch.Tensor:
        """Return the area, NaN unless both normal and abnormal pixels were seen."""
        return auroc(self.normal.double(), self.abnormal).float()


class BinnedAUPR(_Binned):
    """Area under the precision-recall curve of pixels."""

    def compute(self) -> torch.Tensor:
        """Return the area, NaN when no abnormal pixel was seen."""
        return aupr(self.normal.double(), self.abnormal).float()


class BinnedAUPRO(_Binned):
    """Area under the curve of mean overlap with lesions against the false positive rate, as anomalib's AUPRO.

    A lesion is a connected component of a mask, and all lesions weigh the same.
    """

    lesions: torch.Tensor

    def __init__(self, **kwargs) -> None:  # noqa: ANN003  # passed through to torchmetrics
        super().__init__(**kwargs)
        self.add_state("lesions", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        """Count scores ``(B, H, W)`` or ``(B, 1, H, W)`` with masks of the same size, above 0 where abnormal."""
        masks = (target.reshape(-1, 1, *target.shape[-2:]) > 0).float()
        components = (connected_components_gpu if masks.is_cuda else connected_components_cpu)(masks)
        lesion = components.long().flatten()  # numbered from 1 in the batch
        bins, is_abnormal = bins_of(preds), lesion > 0
        self.normal += torch.bincount(bins[~is_abnormal], minlength=BINS)
        weights = 1 / torch.bincount(lesion).double()  # one over a lesion's pixels
        # Not by bincount, which with weights is not deterministic on CUDA, and raises where that is asked for.
        self.abnormal.index_add_(0, bins[is_abnormal], weights[lesion[is_abnormal]])
        self.lesions += lesion.max()

    def compute(self) -> torch.Tensor:
        """Return the area up to a false positive rate of 0.3 over 0.3, NaN when no lesion was seen."""
        return aupro(self.normal.double(), self.abnormal / self.lesions).float()
