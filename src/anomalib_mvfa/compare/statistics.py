"""How sure a mean over seeds is, and the difference of two: intervals and tests over seeds and test images.

Seeds and test images are crossed, like readers and cases in radiology, and both vary. The variance of a mean over seeds
is that of Obuchowski and Rockette (1995), with the covariances taken from a bootstrap of images or patients.

Axes: N images, G groups of images, R resamples, S seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from scipy.optimize import brentq
from scipy.special import stdtrit

from ..metrics.pixel_metrics import aupr, auroc

COVERAGE = 0.95
NOTHING = 1e-18
"""A variance below is rounding."""


def draw(groups: int, resamples: int, seed: int | Sequence[int] | np.random.Generator = 0) -> np.ndarray:
    """Return how often each group is in each resample ``(R, G)``, where G groups are drawn with replacement."""
    drawn = np.random.default_rng(seed).integers(max(1, groups), size=(resamples, groups))
    drawn += groups * np.arange(resamples)[:, None]
    return np.bincount(drawn.flatten(), minlength=resamples * groups).reshape(resamples, groups).astype(float)


def image_auroc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Image AUROC of resamples; ties count half.

    Args:
        scores: Scores of images ``(N)``, higher is more abnormal.
        labels: 1 where abnormal ``(N)``.
        weights: How often each image is in each resample ``(R, N)``.

    Returns:
        Areas ``(R)``, NaN where a resample has no normal or no abnormal image.
    """
    drawn, order = labels == 1, np.argsort(scores[labels == 0])
    normal, abnormal = weights[:, labels == 0][:, order], weights[:, drawn]
    ranked = scores[labels == 0][order]
    below = np.pad(normal.cumsum(axis=1), ((0, 0), (1, 0)))  # how many normal images are below the i-th
    pairs = sum(below[:, np.searchsorted(ranked, scores[drawn], side)] for side in ("left", "right")) / 2
    with np.errstate(invalid="ignore"):
        return (abnormal * pairs).sum(axis=1) / (normal.sum(axis=1) * abnormal.sum(axis=1))


def pixel_auroc(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pixel AUROC of resamples; pixels in one bin are ties.

    Args:
        counts: Counts of normal and abnormal pixels in bins of rising scores ``(N, 2, bins)``.
        weights: How often each image is in each resample ``(R, N)``.

    Returns:
        Areas ``(R)``, NaN where a resample has no normal or no abnormal pixel.
    """
    return auroc(*_pixels(counts, weights)).numpy()


def pixel_aupr(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the pixels' precision-recall curve of resamples, by trapezoids between bins.

    Args:
        counts: Counts of normal and abnormal pixels in bins of rising scores ``(N, 2, bins)``.
        weights: How often each image is in each resample ``(R, N)``.

    Returns:
        Areas ``(R)``, NaN where a resample has no abnormal pixel.
    """
    return aupr(*_pixels(counts, weights)).numpy()


def _pixels(counts: np.ndarray, weights: np.ndarray) -> list[torch.Tensor]:
    """Return counts of normal and of abnormal pixels in resamples ``(R, bins)``."""
    return [torch.from_numpy(weights @ counts[:, row]) for row in (0, 1)]


def f1(predicted: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """F1 score of resamples.

    Args:
        predicted: 1 where an image is called abnormal ``(N)``.
        labels: 1 where it is ``(N)``.
        weights: How often each image is in each resample ``(R, N)``.

    Returns:
        Scores ``(R)``, NaN where a resample has no image that is abnormal or called so.
    """
    with np.errstate(invalid="ignore"):
        return 2 * (weights @ (predicted * labels)) / (weights @ (predicted + labels))


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, of a metric or of the difference of two methods.

    Args:
        value: The mean.
        low: Lower end of the 95 % interval, NaN where there is none.
        high: Its upper end.
        p: Two-sided p-value of there being no difference; NaN for a metric.
    """

    value: float
    low: float = np.nan
    high: float = np.nan
    p: float = np.nan


def estimate(points: np.ndarray, resampled: np.ndarray, groups: int, rare: int, difference: bool = False) -> Estimate:
    """Return a mean over seeds with its interval over seeds and images; of one seed, over images alone.

    The variance of the mean is that of Obuchowski and Rockette (1995): of the seeds' values, over S, and the covariance
    of two seeds, which share the images. Each part has its own degrees of freedom, S - 1 and G - 1, and the critical
    value is the mean of theirs, weighted by the parts (Cochran, 1964). Where seeds differ by less than the median of
    what images alone would give, the variance is that over images. A metric's interval is Wilson's (1927).

    Args:
        points: The metric, or the difference of two methods, of each seed ``(S)``.
        resampled: The same of resampled images, the same draws for each seed ``(S, R)``.
        groups: G, how many groups (patients, or images) were drawn from.
        rare: How many groups have an image of the rarer kind, normal or abnormal.
        difference: Whether these are differences, in [-1, 1]; a metric is in [0, 1].
    """
    value, seeds = float(points.mean()), len(points)
    drawn = resampled[:, np.isfinite(resampled).all(axis=0)]
    if drawn.shape[1] < 2 or groups < 2:
        return Estimate(value)
    covariance = np.atleast_2d(np.cov(drawn)) * groups / (groups - 1)  # a bootstrap's is too small by this much
    of_images = covariance.mean()  # variance of the mean over the same seeds
    parts = [(of_images, groups - 1)]
    if seeds > 1:
        of_seeds = points.var(ddof=1) / seeds
        explained = (np.trace(covariance) / seeds - of_images) / (seeds - 1)  # what images alone add to `of_seeds`
        if of_seeds > explained * stats.chi2.median(seeds - 1) / (seeds - 1):
            parts = [(max(of_seeds, explained), seeds - 1), (max(0.0, of_images - explained), groups - 1)]
    variance = sum(part for part, _ in parts)
    lowest = -1.0 if difference else 0.0
    if variance < NOTHING:
        return _without_spread(value, rare, lowest)

    def critical(tails: float) -> float:
        return -sum(part * stdtrit(freedom, tails / 2) for part, freedom in parts) / variance

    half2 = critical(1 - COVERAGE) ** 2 * variance
    if difference or value * (1 - value) == 0:
        far, least = abs(value) / np.sqrt(variance), 1e-12
        p = brentq(lambda tails: critical(tails) - far, least, 1 + least) if far < critical(least) else least
        half = np.sqrt(half2)
        return Estimate(value, max(lowest, value - half), min(1.0, value + half), min(1.0, p) if difference else np.nan)
    ratio = half2 / (value * (1 - value))
    centre, half = (value + ratio / 2) / (1 + ratio), np.sqrt(half2 + ratio**2 / 4) / (1 + ratio)
    return Estimate(value, float(centre - half), float(centre + half))


def _without_spread(value: float, rare: int, lowest: float) -> Estimate:
    """Return the estimate where nothing varies, as with perfect separation: the bootstrap would be sure of it.

    Wilson's interval of a share of 1 in ``rare`` trials, [n / (n + z^2), 1], is as wide on either side of the value.
    """
    z2 = stats.norm.ppf((1 + COVERAGE) / 2) ** 2
    half = z2 / (rare + z2)
    p = 2 * stats.norm.sf(np.sqrt(rare * abs(value) / max(1 - abs(value), NOTHING))) if lowest < 0 else np.nan
    return Estimate(value, max(lowest, value - half), min(1.0, value + half), float(p))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Return p-values adjusted for that there are several (Holm, 1979); NaN stay and do not count."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)[: np.isfinite(p).sum()]
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return adjusted
