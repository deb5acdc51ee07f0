"""The binned AUROC against the exact one, and which metrics are reported."""

import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import aupro
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score
from torchmetrics.functional.classification import binary_auroc

from anomalib_mvfa.evaluation import BINS, BinnedAUPR, BinnedAUPRO, BinnedAUROC, OrderKeepingPostProcessor, metrics


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


@pytest.mark.parametrize("kind", ["spread", "narrow", "tied", "reversed", "two values"])
def test_it_is_the_exact_area(kind):
    score, target = draw(kind)
    metric = BinnedAUROC()
    metric.update(score, target)
    found = metric.compute().item()
    assert found == pytest.approx(roc_auc_score(target, score), abs=1e-5)
    assert found == pytest.approx(binary_auroc(score, target).item(), abs=1e-5)
    assert abs(found - 0.5) > 0.05


def test_batches_add_up_and_reset_forgets():
    score, target = draw("spread")
    whole, parts = BinnedAUROC(), BinnedAUROC()
    whole.update(score, target)
    parts.update(score.flip(0), target)  # to be forgotten
    parts.reset()
    for batch in range(0, len(score), 3000):
        parts.update(score[batch : batch + 3000].view(-1, 2, 1), target[batch : batch + 3000].view(-1, 2, 1))
    assert torch.equal(parts.compute(), whole.compute())


def test_processes_add_up():
    score, target = draw("spread")
    whole, *ranks = (BinnedAUROC() for _ in range(3))
    whole.update(score, target)
    for rank, metric in enumerate(ranks):
        metric.update(score[rank::2], target[rank::2])
    ranks[0].merge_state(ranks[1])
    assert torch.equal(ranks[0].compute(), whole.compute())


@pytest.mark.parametrize("only", [0, 1])
def test_one_kind_alone_scores_zero(only):
    metric = BinnedAUROC()
    metric.update(torch.rand(10), torch.full((10,), only))
    assert metric.compute() == 0


def test_ends_of_the_interval_have_a_bin():
    metric = BinnedAUROC()
    metric.update(torch.tensor([0.0, 1.0]), torch.tensor([0, 1]))
    assert metric.compute() == 1
    assert metric.normal[0] == metric.abnormal[BINS - 1] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("truth", [torch.bool, torch.float32])
def test_types_of_scores_and_masks(dtype, truth):
    metric = BinnedAUROC()
    metric.update(torch.tensor([0.1, 0.7, 0.3, 0.9], dtype=dtype), torch.tensor([0, 1, 1, 0]).to(truth))
    assert metric.compute() == 0.5


def batch(with_mask: bool) -> ImageBatch:
    generator = torch.Generator().manual_seed(0)
    heat = torch.rand(4, 20, 20, generator=generator)
    label = torch.tensor([0, 0, 1, 1])
    mask = torch.zeros(4, 20, 20, dtype=torch.bool)
    mask[2:, 5:12, 5:12] = True
    heat = (heat + mask) / 2
    return ImageBatch(
        image=torch.zeros(4, 3, 20, 20),
        gt_label=label,
        gt_mask=mask if with_mask else None,
        pred_score=heat.amax(dim=(1, 2)),
        pred_label=heat.amax(dim=(1, 2)) > 0.5,
        anomaly_map=heat,
        pred_mask=heat > 0.5,
    )


def test_metrics_of_data_with_masks():
    data, evaluator = batch(with_mask=True), metrics()
    found = {}
    for metric in evaluator.test_metrics:
        metric.update(data)
        found[metric.name] = metric.compute().item()
    assert set(found) == {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_AUPR", "pixel_AUPRO", "pixel_F1Score"}
    exact = roc_auc_score(data.gt_mask.flatten(), data.anomaly_map.flatten())
    assert found["pixel_AUROC"] == pytest.approx(exact, abs=1e-5)
    assert found["image_AUROC"] == pytest.approx(roc_auc_score(data.gt_label, data.pred_score))


def test_metrics_of_data_without_masks():
    data, evaluator = batch(with_mask=False), metrics()
    for metric in evaluator.test_metrics:
        metric.update(data)
    called = {metric.name for metric in evaluator.test_metrics if metric.update_called}
    assert called == {"image_AUROC", "image_F1Score"}


def test_the_post_processor_keeps_the_order_of_any_scores():
    generator = torch.Generator().manual_seed(0)
    raw = torch.cat([torch.randn(1000, generator=generator) * 7 + 30, torch.tensor([-400.0, 900.0])])
    for low, high, threshold in ((20.0, 40.0, 31.0), (torch.nan, torch.nan, torch.nan), (5.0, 5.0, 5.0)):
        low, high, threshold = map(torch.tensor, (low, high, threshold))
        scores = OrderKeepingPostProcessor._normalize(raw.double(), low, high, threshold)
        assert torch.equal(scores.argsort(), raw.argsort())
        assert scores.unique().numel() == raw.unique().numel()
        assert 0 < scores.min() < scores.max() < 1
        if not threshold.isnan():
            assert torch.equal(scores > 0.5, raw > threshold)
    assert OrderKeepingPostProcessor._normalize(None, low, high, threshold) is None


def test_without_a_threshold_the_middle_of_the_range_is_one_half():
    low, high, threshold = torch.tensor(2.0), torch.tensor(4.0), torch.tensor(torch.nan)
    scores = OrderKeepingPostProcessor._normalize(torch.tensor([2.0, 3.0, 4.0]), low, high, threshold)
    torch.testing.assert_close(scores, torch.tensor([1 / 3, 1 / 2, 2 / 3]))


def lesions(seed: int = 0, images: int = 6, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps in a small part of [0, 1], and masks with lesions of all sizes, of which one image has none."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(images, size, size, dtype=torch.uint8)
    for image in range(1, images):
        for _ in range(image):
            top, left = torch.randint(0, size - 12, (2,), generator=generator).tolist()
            height, width = torch.randint(1, 12, (2,), generator=generator).tolist()
            masks[image, top : top + height, left : left + width] = 1
    noise = torch.rand(images, size, size, generator=generator)
    return 0.2 + 0.01 * (noise + 0.4 * masks), masks


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_overlap_with_lesions_is_anomalibs(batch):
    maps, masks = lesions()
    ours, theirs = BinnedAUPRO(), aupro._AUPRO()
    for start in range(0, len(maps), batch):
        ours.update(maps[start : start + batch, None], masks[start : start + batch])
    theirs.update(maps, masks)
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), abs=1e-4)
    assert ours.normal.numel() == BINS


@pytest.mark.parametrize("kind", ["spread", "narrow", "tied", "reversed"])
def test_precision_and_recall_are_scikit_learns(kind):
    score, target = draw(kind)
    metric = BinnedAUPR()
    metric.update(score, target)
    precision, recall, _ = precision_recall_curve(target, score)
    assert metric.compute().item() == pytest.approx(auc(recall, precision), abs=1e-5)


def test_states_of_processes_add_up():
    maps, masks = lesions()
    whole, part, other = BinnedAUPRO(), BinnedAUPRO(), BinnedAUPRO()
    whole.update(maps, masks)
    part.update(maps[:2], masks[:2])
    other.update(maps[2:], masks[2:])
    for name in ("normal", "lesions", "count"):
        setattr(part, name, getattr(part, name) + getattr(other, name))
    assert part.compute().item() == pytest.approx(whole.compute().item(), abs=1e-7)


@pytest.mark.parametrize("metric", [BinnedAUPR, BinnedAUPRO])
def test_without_a_lesion_there_is_no_area(metric):
    empty = metric()
    empty.update(torch.rand(1, 8, 8), torch.zeros(1, 8, 8))
    assert empty.compute() == 0
