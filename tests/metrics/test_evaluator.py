"""Which metrics are reported."""

import pickle

import pytest
import torch
from anomalib.data import ImageBatch
from sklearn.metrics import roc_auc_score

from anomalib_mvfa.metrics.evaluator import default_evaluator

IMAGE, PIXEL = ["image_AUROC", "image_F1Score"], ["pixel_AUROC", "pixel_AUPR", "pixel_AUPRO", "pixel_F1Score"]


@pytest.mark.parametrize(("with_mask", "reported"), [(True, IMAGE + PIXEL), (False, IMAGE)])
def test_pixels_are_measured_where_there_are_masks(with_mask, reported):
    heat = torch.rand(4, 20, 20, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([0, 0, 1, 1])
    mask = torch.zeros(4, 20, 20, dtype=torch.bool)
    mask[2:, 5:12, 5:12] = True
    heat = (heat + mask) / 2
    batch = ImageBatch(
        image=torch.zeros(4, 3, 20, 20),
        gt_label=label,
        gt_mask=mask if with_mask else None,
        pred_score=heat.amax(dim=(1, 2)),
        pred_label=heat.amax(dim=(1, 2)) > 0.5,
        anomaly_map=heat,
        pred_mask=heat > 0.5,
    )
    evaluator = pickle.loads(pickle.dumps(default_evaluator()))  # noqa: S301  # as spawned processes get it
    for metric in evaluator.test_metrics:
        metric.update(batch)
    found = {metric.name: metric.compute().item() for metric in evaluator.test_metrics if metric.update_called}
    assert list(found) == reported
    assert found["image_AUROC"] == pytest.approx(roc_auc_score(label, batch.pred_score))
    if with_mask:
        assert found["pixel_AUROC"] == pytest.approx(roc_auc_score(mask.flatten(), heat.flatten()), abs=1e-5)
