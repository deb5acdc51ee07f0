"""Which metrics are reported, and where they are not defined."""

import pickle
import warnings

import pytest
import torch
from anomalib.data import ImageBatch
from sklearn.metrics import roc_auc_score

from anomalib_mvfa.metrics.evaluator import default_evaluator

IMAGE, PIXEL = ["image_AUROC", "image_F1Score"], ["pixel_AUROC", "pixel_AUPR", "pixel_AUPRO", "pixel_F1Score"]


@pytest.mark.parametrize(
    ("labels", "with_mask", "defined"),
    [
        ([0, 0, 1, 1], True, IMAGE + PIXEL),
        ([0, 0, 1, 1], False, IMAGE),
        ([1, 1], True, PIXEL),
        ([1, 1], False, []),
        ([0, 0], True, []),
    ],
)
def test_metrics_are_nan_where_a_kind_is_missing(labels, with_mask, defined):
    label = torch.tensor(labels)
    heat = torch.rand(len(label), 20, 20, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(heat, dtype=torch.bool)
    mask[label == 1, 5:12, 5:12] = True
    heat = (heat + mask) / 2
    batch = ImageBatch(
        image=torch.zeros(len(label), 3, 20, 20),
        gt_label=label,
        gt_mask=mask if with_mask else None,
        pred_score=heat.amax(dim=(1, 2)),
        pred_label=heat.amax(dim=(1, 2)) > 0.5,
        anomaly_map=heat,
        pred_mask=heat > 0.5,
    )
    evaluator = pickle.loads(pickle.dumps(default_evaluator()))  # noqa: S301  # as spawned processes get it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for metric in evaluator.test_metrics:
            metric.update(batch)
        found = {metric.name: metric.compute() for metric in evaluator.test_metrics}
    assert list(found) == IMAGE + PIXEL
    assert [name for name, value in found.items() if value.isfinite()] == defined
    if "image_AUROC" in defined:
        assert found["image_AUROC"] == pytest.approx(roc_auc_score(label, batch.pred_score))
    if "pixel_AUROC" in defined:
        assert found["pixel_AUROC"] == pytest.approx(roc_auc_score(mask.flatten(), heat.flatten()), abs=1e-5)
