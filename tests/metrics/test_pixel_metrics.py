"""Areas from counts, against scikit-learn's and anomalib's."""

import math

import pytest
import torch
from anomalib.metrics import aupro
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score

from anomalib_mvfa.metrics.pixel_metrics import BINS, BinnedAUPR, BinnedAUPRO, BinnedAUROC

METRICS = [BinnedAUROC, BinnedAUPR, BinnedAUPRO]


def draw(kind: str, count: int = 20000) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores in [0, 1] of a kind, and targets that they tell something of."""
    generator = torch.Generator().manual_seed(0)
    target = (torch.rand(count, generator=generator) < 0.1).long()
    score = torch.rand(count, generator=generator) + 0.3 * target
    return {
        "spread": score / 1.3,
        "narrow": 0.4 + score / 50,  # in a hundredth of the bins
        "tied": (score * 10).floor() / 13,
        "reversed": 1 - score / 1.3,
        "two values": (score > 0.9).float(),
    }[kind], target


def lesions(images: int = 6, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps in a small part of [0, 1], and masks with lesions of all sizes, of which one image has none."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(images, size, size, dtype=torch.uint8)
    for image in range(1, images):
        for _ in range(image):
            top, left = torch.randint(0, size - 12, (2,), generator=generator).tolist()
            height, width = torch.randint(1, 12, (2,), generator=generator).tolist()
            masks[image, top : top + height, left : left + width] = 1
    noise = torch.rand(images, size, size, generator=generator)
    return 0.2 + 0.01 * (noise + 0.4 * masks), masks


def area(metric, scores, target, batch=None):
    metric = metric()
    for start in range(0, len(scores), batch or len(scores)):
        metric.update(scores[start:][:batch], target[start:][:batch])
    return metric.compute().item()


@pytest.mark.parametrize("kind", ["spread", "narrow", "tied", "reversed", "two values"])
def test_areas_are_scikit_learns(kind):
    score, target = draw(kind)
    found = area(BinnedAUROC, score, target)
    assert found == pytest.approx(roc_auc_score(target, score), abs=1e-5)
    assert abs(found - 0.5) > 0.05
    precision, recall, _ = precision_recall_curve(target, score)
    assert area(BinnedAUPR, score, target) == pytest.approx(auc(recall, precision), abs=1e-5)


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_overlap_with_lesions_is_anomalibs(batch):
    maps, masks = lesions()
    theirs = aupro._AUPRO()
    theirs.update(maps, masks)
    assert area(BinnedAUPRO, maps[:, None], masks, batch) == pytest.approx(theirs.compute().item(), abs=1e-4)


@pytest.mark.parametrize("kind", METRICS)
def test_batches_and_processes_add_up_and_reset_forgets(kind):
    maps, masks = lesions()
    ranks = [kind(), kind()]
    for start in range(2):
        ranks[start].update(maps.flip(0), masks)  # to be forgotten
        ranks[start].reset()
        for image in range(start, len(maps), 2):
            ranks[start].update(maps[image, None], masks[image, None])
    ranks[0].merge_state(ranks[1])
    assert ranks[0].compute().item() == pytest.approx(area(kind, maps, masks), abs=1e-7)
    assert all(state.numel() in {1, BINS} for state in ranks[0].metric_state.values())


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("only", [0, 1])
def test_without_both_kinds_of_pixels_the_area_is_not_defined(kind, only):
    found = area(kind, torch.rand(1, 8, 8), torch.full((1, 8, 8), only))
    assert found == pytest.approx(1 if (kind, only) == (BinnedAUPR, 1) else math.nan, nan_ok=True)


def test_ends_of_the_interval_have_a_bin():
    metric = BinnedAUROC()
    metric.update(torch.tensor([0.0, 1.0]), torch.tensor([0, 1]))
    assert metric.compute() == 1
    assert metric.normal[0] == metric.abnormal[BINS - 1] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("truth", [torch.bool, torch.float32])
def test_types_of_scores_and_masks(dtype, truth):
    scores, target = torch.tensor([0.1, 0.7, 0.3, 0.9], dtype=dtype), torch.tensor([0, 1, 1, 0]).to(truth)
    assert area(BinnedAUROC, scores, target) == 0.5
