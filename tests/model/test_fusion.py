"""Fusion against the formula, and what it promises: order kept, no ties, nothing outside (0, 1)."""

import itertools

import pytest
import torch

import by_hand
from anomalib_mvfa.model.fusion import Weights, fuse, value_range

RANGES = torch.tensor([[0.2, 0.6], [0.004, 0.012]])
EQUAL = Weights(0.5, 0.5)
FAR = torch.linspace(-1, 2, 301)  # of zero: from 3 spans below its range to 3.5 above


@pytest.mark.parametrize("weights", [EQUAL, Weights(0.2, 0.8), Weights(1.0, 3.0), Weights(0.0, 1.0), Weights(1.0, 0.0)])
@pytest.mark.parametrize("ranges", [RANGES, None], ids=["ranges", "none"])
def test_formula(weights, ranges):
    for zero, few in itertools.product((0.0, 0.2, 0.31, 0.6, 1.0), (0.0, 0.004, 0.01, 0.05, 2.0)):
        expected = by_hand.fused(zero, few, weights, None if ranges is None else ranges.double().tolist())
        assert fuse(torch.tensor(zero), torch.tensor(few), weights, ranges).item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("ranges", [RANGES, None], ids=["ranges", "none"])
def test_a_branch_that_is_not_there_is_one_without_weight(ranges):
    few = torch.linspace(0, 0.06, 301)
    assert torch.equal(fuse(None, few, Weights(0.0, 2.0), ranges), fuse(FAR, few, Weights(0.0, 2.0), ranges))
    assert torch.equal(fuse(FAR, None, Weights(2.0, 0.0), ranges), fuse(FAR, few, Weights(2.0, 0.0), ranges))
    assert torch.allclose(fuse(FAR, None, Weights(0.7, 0.0), None), FAR)


def test_support_spans_the_middle_half():
    """The lowest support values score 1/4, the highest 3/4, so that there is room on either side."""
    zero, few = RANGES[0], RANGES[1]
    assert fuse(zero, few, EQUAL, RANGES).tolist() == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize("ranges", [RANGES, None], ids=["ranges", "none"])
def test_strictly_increasing_in_both_branches(ranges):
    few = torch.linspace(0, 0.06, 301)  # up to 6 spans above its range
    assert (fuse(FAR, torch.tensor(0.01), EQUAL, ranges).diff() > 0).all()
    assert (fuse(torch.tensor(0.5), few, EQUAL, ranges).diff() > 0).all()


def test_far_outside_the_ranges_there_is_no_clamp():
    """A hundred times the support's span still is below 1, above 0, and without ties."""
    far = torch.linspace(-40, 40, 2001)
    score = fuse(far, torch.full_like(far, 0.01), EQUAL, RANGES)
    assert 0 < score.min() < 0.01
    assert 0.99 < score.max() < 1
    assert (score.diff() > 0).all()


@pytest.mark.parametrize("weights", [EQUAL, Weights(0.0, 1.0), Weights(1.0, 0.0)])
def test_without_ranges_scores_are_within_bounds(weights):
    worst = fuse(torch.tensor(1.0), torch.tensor(2.0), weights, None)
    best = fuse(torch.tensor(0.0), torch.tensor(0.0), weights, None)
    assert (best.item(), worst.item()) == (0.0, 1.0)


def test_only_the_ratio_of_weights_counts():
    zero, few = FAR, FAR / 50
    for ranges in (RANGES, None):
        assert torch.allclose(fuse(zero, few, Weights(2, 6), ranges), fuse(zero, few, Weights(0.25, 0.75), ranges))


def test_range_without_width_does_not_divide_by_zero():
    flat = torch.tensor([[0.3, 0.3], [0.01, 0.01]])
    score = fuse(torch.tensor([0.2, 0.3, 0.4]), torch.tensor(0.01), EQUAL, flat)
    assert score.isfinite().all()
    assert (score.diff() > 0).all()


def test_value_range():
    assert value_range(torch.tensor([[0.3, 0.1], [0.9, 0.2]])).tolist() == pytest.approx([0.1, 0.9])
