"""Losses against formulas written out pixel by pixel; axes as in the module."""

import math

import pytest
import torch

from anomalib_mvfa.model.losses import MvfaLoss, dice_loss, focal_loss, image_loss

GENERATOR = torch.Generator().manual_seed(0)
MAPS = [torch.randn(2, 2, 6, 6, generator=GENERATOR).softmax(dim=1) for _ in range(3)]
SCORES = [torch.rand(2, generator=GENERATOR) for _ in range(3)]
MASK = (torch.rand(2, 6, 6, generator=GENERATOR) > 0.7).float()
LABEL = torch.tensor([0, 1])


def focal_by_hand(probabilities, mask) -> float:
    total = 0.0
    for (normal, abnormal), is_abnormal in zip(
        probabilities.permute(0, 2, 3, 1).reshape(-1, 2).double().tolist(),
        mask.flatten().tolist(),
        strict=True,
    ):
        target = [min(max(t, 1e-5), 1 - 1e-5) for t in (1 - is_abnormal, is_abnormal)]
        p = target[0] * normal + target[1] * abnormal + 1e-5
        total -= (1 - p) ** 2 * math.log(p)
    return total / mask.numel()


def dice_by_hand(abnormal, mask) -> float:
    total = 0.0
    for one, truth in zip(abnormal.double(), mask.double(), strict=True):
        overlap = sum(p * m for p, m in zip(one.flatten().tolist(), truth.flatten().tolist(), strict=True))
        total += 1 - (2 * overlap + 1) / (one.sum().item() + truth.sum().item() + 1)
    return total / len(mask)


def bce_by_hand(score, label, bce: str) -> float:
    total = 0.0
    for probability, is_abnormal in zip(score.double().tolist(), label.tolist(), strict=True):
        p = 1 / (1 + math.exp(-probability)) if bce == "logits" else probability
        total -= math.log(p if is_abnormal else 1 - p)
    return total / len(label)


@pytest.mark.parametrize("mask", [MASK, torch.zeros_like(MASK), torch.ones_like(MASK)], ids=["some", "none", "all"])
def test_focal_and_dice(mask):
    for maps in MAPS:
        assert focal_loss(maps, mask).item() == pytest.approx(focal_by_hand(maps, mask), rel=1e-5)
        assert dice_loss(maps[:, 1], mask).item() == pytest.approx(dice_by_hand(maps[:, 1], mask), rel=1e-5)


def test_certain_pixels_have_a_finite_gradient():
    """A probability of exactly 0 for what is true costs the smoothing's logarithm, not infinity."""
    certain = torch.zeros(1, 2, 2, 2)
    certain[:, 1] = 1.0
    certain.requires_grad_()
    loss = focal_loss(certain, torch.zeros(1, 2, 2))
    loss.backward()
    assert loss.item() == pytest.approx(-((1 - 2e-5) ** 2) * math.log(2e-5), rel=1e-4)
    assert certain.grad.isfinite().all()


def test_dice_is_a_mean_over_images():
    """A small lesion weighs as much as a large one."""
    abnormal, mask = MAPS[0][:, 1], MASK.clone()
    mask[0, 1:] = 0.0
    each = [dice_loss(abnormal[i : i + 1], mask[i : i + 1]).item() for i in range(2)]
    assert dice_loss(abnormal, mask).item() == pytest.approx(sum(each) / 2)
    assert each[0] != pytest.approx(each[1], rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_labels_and_masks_of_any_type(dtype):
    expected = MvfaLoss()(MAPS, SCORES, MASK, LABEL)
    assert torch.equal(MvfaLoss()(MAPS, SCORES, MASK.to(dtype), LABEL.to(dtype)), expected)


@pytest.mark.parametrize("bce", ["logits", "plain"])
def test_total_is_the_sum_over_levels_of_those_losses_that_there_are(bce):
    for score in SCORES:
        assert image_loss(score, LABEL, bce).item() == pytest.approx(bce_by_hand(score, LABEL, bce), rel=1e-5)
    of_images = sum(bce_by_hand(score, LABEL, bce) for score in SCORES)
    of_pixels = sum(focal_by_hand(maps, MASK) + dice_by_hand(maps[:, 1], MASK) for maps in MAPS)
    assert MvfaLoss(bce)(MAPS, SCORES, MASK, LABEL).item() == pytest.approx(of_images + of_pixels, rel=1e-5)
    assert MvfaLoss(bce)([], SCORES, None, LABEL).item() == pytest.approx(of_images, rel=1e-5)


def test_half_precision_around_it_changes_nothing():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = MvfaLoss("plain")(MAPS, SCORES, MASK, LABEL)  # plain cross-entropy refuses autocast
    assert found.dtype == torch.float32
    assert torch.equal(found, MvfaLoss("plain")(MAPS, SCORES, MASK, LABEL))
