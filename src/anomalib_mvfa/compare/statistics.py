"""How sure a mean over seeds is, and the difference of two: intervals and tests over seeds and test images.

Seeds and test images are crossed, like readers and cases in radiology, and both vary. The variance of a mean over seeds
is that of Obuchowski and Rockette (1995), with the covariances taken from a bootstrap of images or patients.

Axes: N images, G groups of images, R resamples, S seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

COVERAGE = 0.95


def draw(groups: int, resamples: int, seed: int | Sequence[int] = 0) -> np.ndarray:
    """Return how often each group is in each resample ``(R, G)``: as many as there are, drawn with replacement."""
    return np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), resamples).astype(float)


def image_auroc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Image AUROC of resamples; ties count half.

    Args:
        scores: Scores of images ``(N)``, higher is more abnormal.
        labels: 1 where abnormal ``(N)``.
        weights: How often each image is in each resample ``(R, N)``.

    Returns:
        Areas ``(R)``, NaN where a resample has no normal or no abnormal image.
    """
    order = np.argsort(scores)
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # of runs of ties
    drawn = weights[:, order]
    abnormal, normal = (np.add.reduceat(drawn * (labels[order] == label), starts, axis=1) for label in (1, 0))
    return _area(normal, abnormal)


def pixel_auroc(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pixel AUROC of resamples; pixels in one bin are ties.

    Args:
        counts: Counts of normal and abnormal pixels in bins of rising scores ``(N, 2, bins)``.
        weights: How often each image is in each resample ``(R, N)``.

    Returns:
        Areas ``(R)``, NaN where a resample has no normal or no abnormal pixel.
    """
    return _area(weights @ counts[:, 0], weights @ counts[:, 1])


def _area(normal: np.ndarray, abnormal: np.ndarray) -> np.ndarray:
    below = normal.cumsum(axis=1) - normal / 2
    pairs = normal.sum(axis=1) * abnormal.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return (abnormal * below).sum(axis=1) / pairs


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
    """A mean over seeds, or a mean difference.

    Args:
        value: The mean.
        low: Lower end of the 95 % interval, NaN where there is none.
        high: Its upper end.
        p: Two-sided p-value of the hypothesis that the true value is 0.
    """

    value: float
    low: float
    high: float
    p: float


def estimate(points: np.ndarray, resampled: np.ndarray, groups: int, rare: int, difference: bool = False) -> Estimate:
    """Return a mean over seeds with its interval over seeds and images; of one seed, over images alone.

    Args:
        points: The metric, or the difference of two methods, of each seed ``(S)``.
        resampled: The same of resampled images, the same draws for each seed ``(S, R)``.
        groups: How many groups (patients, or images) were drawn from.
        rare: How many groups have an image of the rarer kind, normal or abnormal.
        difference: Whether these are differences, which lie in [-1, 1], and not metrics, which lie in [0, 1].
    """
    value, seeds = float(points.mean()), len(points)
    drawn = resampled[:, np.isfinite(resampled).all(axis=0)]
    if drawn.shape[1] < 2 or groups < 2:
        return Estimate(value, np.nan, np.nan, np.nan)
    covariance = np.atleast_2d(np.cov(drawn)) * groups / (groups - 1)
    over_images = covariance.mean()  # variance of the mean if the seeds are kept
    over_seeds, variance, freedom = 0.0, over_images, groups - 1.0
    if seeds > 1:
        own = (np.trace(covariance) / seeds - over_images) / (seeds - 1)  # what images add to the spread between seeds
        over_seeds = points.var(ddof=1) / seeds
        variance = over_images + max(0.0, over_seeds - own)
    if variance > 0:
        freedom = variance**2 / (over_seeds**2 / max(1, seeds - 1) + over_images**2 / (groups - 1))
    t = stats.t.ppf((1 + COVERAGE) / 2, freedom)
    if variance < 1e-12:
        z2 = stats.norm.ppf((1 + COVERAGE) / 2) ** 2
        half = z2 / (rare + z2)
        p = 2 * stats.norm.sf(np.sqrt(rare * abs(value) / max(1 - abs(value), 1e-12)))
        return Estimate(value, max(value - half, -1.0 if difference else 0.0), min(1.0, value + half), float(p))
    error = np.sqrt(variance)
    p = float(2 * stats.t.sf(abs(value) / error, freedom))
    if difference:
        return Estimate(value, max(-1.0, value - t * error), min(1.0, value + t * error), p)
    ratio = t**2 * variance / (value * (1 - value))
    centre, half = (value + ratio / 2) / (1 + ratio), np.sqrt(t**2 * variance + ratio**2 / 4) / (1 + ratio)
    return Estimate(value, float(centre - half), float(centre + half), p)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Return p-values adjusted for that there are several (Holm, 1979); NaN stay and do not count."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)[: np.isfinite(p).sum()]
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return adjusted
