"""Areas, intervals and tests against scikit-learn, SciPy, DeLong's variance and figures worked out by hand."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap, norm
from sklearn.metrics import f1_score, roc_auc_score

from anomalib_mvfa.compare.statistics import draw, estimate, f1, holm, image_auroc, pixel_aupr, pixel_auroc
from anomalib_mvfa.metrics.pixel_metrics import aupr

COVERAGE = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "coverage.py"))


def binormal(rng, images=200, apart=1.2, seeds=1):
    """Return labels (N) and scores (S, N), half of whose variance is the image's."""
    labels = (np.arange(images) % 3 == 0).astype(int)
    own = rng.normal(size=images)
    return labels, apart * labels + np.sqrt(0.5) * (own + rng.normal(size=(seeds, images)))


def estimated(labels, scores, resamples=2000):
    weights = np.vstack([np.ones(len(labels)), draw(len(labels), resamples)])
    areas = np.stack([image_auroc(row, labels, weights) for row in scores])
    return estimate(areas[:, 0], areas[:, 1:], len(labels), labels.sum()), areas


def delong(labels, scores):
    """Variance of an AUROC by DeLong et al. (1988): of each image's share of pairs in the right order."""
    right = np.heaviside(scores[labels == 1][:, None] - scores[labels == 0], 0.5)
    return right.mean(axis=1).var(ddof=1) / sum(labels == 1) + right.mean(axis=0).var(ddof=1) / sum(labels == 0)


def test_areas_and_f1_equal_scikit_learns_with_weights_and_ties():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    scores = (rng.random(60) + 0.3 * labels).round(1)
    predicted = (scores > 0.7).astype(int)
    weights = draw(60, 5)
    assert (weights.sum(axis=1) == 60).all()
    areas = [roc_auc_score(labels, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(image_auroc(scores, labels, weights), areas, atol=1e-12)
    f1s = [f1_score(labels, predicted, sample_weight=row) for row in weights]
    np.testing.assert_allclose(f1(predicted, labels, weights), f1s, atol=1e-12)


def test_pixel_areas_equal_scikit_learns():
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 5, (4, 2, 8)).astype(float)
    weights = draw(4, 3)
    scores, labels = np.tile(np.arange(8), 2 * 4), np.tile(np.repeat([0, 1], 8), 4)
    expected = [roc_auc_score(labels, scores, sample_weight=(row[:, None, None] * counts).flatten()) for row in weights]
    np.testing.assert_allclose(pixel_auroc(counts, weights), expected, atol=1e-12)


def test_the_precision_recall_area_of_resamples_equals_that_of_the_metric():
    counts = np.random.default_rng(2).integers(5, size=(4, 2, 8)).astype(float)
    counts[:, :, -2:] = 0  # scores that no pixel has
    weights = draw(4, 3)
    pooled = torch.as_tensor(np.einsum("rn,nkb->rkb", weights, counts))
    np.testing.assert_allclose(pixel_aupr(counts, weights), [aupr(*one).item() for one in pooled], atol=1e-12)
    assert np.isnan(pixel_aupr(np.ones((1, 2, 3)) * [[[1], [0]]], np.ones((1, 1)))).all()
    assert pixel_aupr(np.array([[[5.0, 1, 0], [0, 1, 8]]]), np.ones((1, 1))) > 0.9


def test_a_resample_of_one_kind_has_no_area():
    assert np.isnan(image_auroc(np.array([0.1, 0.9]), np.array([0, 1]), np.array([[2.0, 0.0]]))).all()
    assert np.isnan(pixel_auroc(np.ones((1, 2, 3)) * [[[0], [1]]], np.ones((1, 1)))).all()


def test_the_interval_of_one_seed_agrees_with_delong_and_scipys_bootstrap():
    labels, scores = binormal(np.random.default_rng(2))
    found, areas = estimated(labels, scores)
    assert areas[0, 1:].std() == pytest.approx(np.sqrt(delong(labels, scores[0])), rel=0.06)
    scipys = bootstrap(
        (labels, scores[0]), roc_auc_score, paired=True, vectorized=False, n_resamples=400, rng=np.random.default_rng(0)
    )
    assert areas[0, 1:].std() == pytest.approx(scipys.standard_error, rel=0.1)
    assert (found.low, found.high) == pytest.approx(scipys.confidence_interval, abs=0.015)


def test_the_variance_over_seeds_and_images_is_that_of_obuchowski_and_rockette():
    """By the variance between seeds and DeLong's covariance of two seeds."""
    labels, scores = binormal(np.random.default_rng(3), images=400, seeds=6)
    scores += np.linspace(-0.6, 0.6, 6)[:, None] * labels
    found, areas = estimated(labels, scores)
    right = np.heaviside(scores[:, labels == 1, None] - scores[:, None, labels == 0], 0.5)
    covariance = np.cov(right.mean(axis=2)) / sum(labels == 1) + np.cov(right.mean(axis=1)) / sum(labels == 0)
    shared = covariance[~np.eye(6, dtype=bool)].mean()
    between = areas[:, 0].var(ddof=1) / 6
    critical = (2.5706 * between + 1.9659 * shared) / (
        between + shared
    )  # Student's t with 5 and 399 degrees of freedom
    assert (found.high - found.low) / 2 == pytest.approx(critical * np.sqrt(between + shared), rel=0.05)


def test_the_interval_holds_both_seeds_of_the_row_that_it_once_excluded():
    points = np.array([0.588, 0.856])
    resampled = points[:, None] + np.random.default_rng(0).normal(0, 0.04, (2, 500))
    found = estimate(points, resampled, 100, 50)
    assert found.low < 0.588
    assert found.high > 0.856
    assert 0 < found.low < found.high < 1


def test_perfect_separation_is_not_certain():
    found = estimate(np.ones(3), np.ones((3, 50)), 50, 20)
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(20 / (20 + norm.ppf(0.975) ** 2))  # Wilson's interval of 20 of 20
    same = estimate(np.zeros(3), np.zeros((3, 50)), 50, 20, difference=True)
    assert (same.low, same.high, same.p) == pytest.approx((found.low - 1, 1 - found.low, 1))
    apart = estimate(np.full(3, 0.5), np.full((3, 50), 0.5), 50, 20, difference=True)
    assert apart.low > 0
    assert apart.p < 0.05


@pytest.mark.parametrize(("resampled", "groups"), [(np.full((2, 50), np.nan), 9), (np.full((2, 50), 0.7), 1)])
def test_without_resamples_or_with_one_group_there_is_no_interval(resampled, groups):
    found = estimate(np.array([0.7, 0.8]), resampled, groups, 1)
    assert found.value == pytest.approx(0.75)
    assert np.isnan([found.low, found.high, found.p]).all()


@pytest.mark.parametrize("shift", [0.0, 0.01, 0.05, 0.2])
def test_the_p_value_is_below_5_percent_where_the_interval_leaves_out_0(shift):
    rng = np.random.default_rng(5)
    points = np.array([0.01, 0.02, 0.03]) + shift
    found = estimate(points, points[:, None] + rng.normal(0, 0.02, (3, 400)), 80, 40, difference=True)
    assert (found.p < 0.05) == (not found.low <= 0 <= found.high)
    assert found.low <= found.value <= found.high


def test_holm_as_worked_out_by_hand():
    assert holm([0.01, 0.04, 0.03, np.nan]) == pytest.approx([0.03, 0.06, 0.06, np.nan], nan_ok=True)
    assert holm([0.5, 0.9]) == pytest.approx([1, 1])
    assert len(holm([])) == 0
    adjusted = holm(np.linspace(0.0001, 0.9, 55))
    assert adjusted[0] == pytest.approx(0.0055)
    assert (np.diff(adjusted) >= 0).all()


@pytest.mark.parametrize(
    "setting",
    [
        {"images": 100, "seeds": 1, "auroc": 0.7},
        {"images": 60, "seeds": 3, "auroc": 0.8, "spread": 0.03, "per_patient": 2},
        pytest.param({"images": 50, "seeds": 5, "auroc": 0.8, "spread": 0.03, "other": 0.9}, marks=pytest.mark.slow),
    ],
)
def test_intervals_hold_the_truth_as_often_as_they_say(setting):
    held = COVERAGE["coverage"](COVERAGE["Setting"](**setting), resamples=100)[0]
    assert 0.93 <= held <= 0.97
