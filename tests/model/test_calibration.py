"""Bank, value ranges and thresholds of the support: a support image is scored as if it were unseen.

Axes: B images, N support views, L tokens, P patches.
"""

import logging
from types import SimpleNamespace

import pytest
import torch

import by_hand
from anomalib_mvfa.model.calibration import (
    SupportBatch,
    fill_bank,
    forget_calibration,
    is_calibrated,
    reset_thresholds,
    set_ranges,
    set_thresholds,
    thresholds_are_set,
)
from anomalib_mvfa.model.export import ThresholdScaledPostProcessor
from anomalib_mvfa.model.fusion import Weights
from anomalib_mvfa.model.torch_model import Scoring
from recipe import TINY, images

SIZE = TINY.image_size
IMAGES = images("model", 3, SIZE)
BOTH = Weights(0.5, 0.5)


@pytest.fixture
def model(build):
    """A model that scores by all it has."""
    model = build()
    model.scoring = Scoring("seg", "det_mean", BOTH)
    return model


# ---------------------------------------------------------------------- bank


def test_own_views_are_left_out(model, views, text, caplog):
    """A normal support image is compared with the other's views, an abnormal one with all normal ones."""
    with caplog.at_level(logging.WARNING, logger="anomalib.mvfa"):
        scores = fill_bank(model, views())
    assert caplog.text == ""
    assert len(scores) == 4
    (seg, det), (seg_flipped, det_flipped) = (by_hand.tokens(model, batch.image) for batch in views())
    for image, others in enumerate([[1], [0], [0, 1], [0, 1]]):
        one = slice(image, image + 1)
        rows = [torch.cat([a[others], b[others]]) for a, b in zip(seg, seg_flipped, strict=True)]
        expected = sum(by_hand.distances(a[one], b) for a, b in zip(seg, rows, strict=True)) / 4
        assert (scores[image].distance - expected).abs().max() < 1e-6
        rows = [torch.cat([a[others], b[others]]) for a, b in zip(det, det_flipped, strict=True)]
        few = by_hand.few_map([a[one] for a in det], rows, SIZE).mean()
        assert scores[image].few.item() == pytest.approx(few.item(), abs=1e-6)
        zero = sum(by_hand.det_probability(a[one], text).mean() for a in det) / 4
        assert scores[image].zero.item() == pytest.approx(zero.item(), abs=1e-5)
    assert scores[0].distance.min() > 1e-4, "an image found itself"


def test_one_normal_image_is_compared_with_its_other_views(model, views, caplog):
    with caplog.at_level(logging.WARNING, logger="anomalib.mvfa"):
        scores = fill_bank(model, views(1))
    assert "One normal support image" in caplog.text
    (seg, _), (flipped, _) = (by_hand.tokens(model, batch.image) for batch in views(1))
    own = sum(by_hand.distances(a[:1], b[:1]) for a, b in zip(seg, flipped, strict=True)) / 4
    assert (scores[0].distance - own).abs().max() < 1e-6
    rows = [torch.cat([a[:1], b[:1]]) for a, b in zip(seg, flipped, strict=True)]
    abnormal = sum(by_hand.distances(a[1:], b) for a, b in zip(seg, rows, strict=True)) / 4
    assert (scores[1].distance - abnormal).abs().max() < 1e-6


def test_batches_of_views_may_be_cut_anywhere(model, views):
    whole = fill_bank(model, views())
    bank = model.bank.seg.clone()
    cut = fill_bank(model, [SupportBatch(*(part[r : r + 1] for part in batch)) for batch in views() for r in range(4)])
    assert torch.allclose(model.bank.seg, bank, atol=1e-6)
    for one, other in zip(whole, cut, strict=True):
        assert torch.allclose(one.distance, other.distance, atol=1e-6)


@pytest.mark.parametrize(
    ("map_branch", "image_score", "stored"),
    [("seg", "map_max", {"seg"}), ("seg", "det_mean", {"seg", "det"}), ("det", "det_max", {"det"})],
)
def test_bank_holds_normal_tokens_of_branches_in_use(build, views, map_branch, image_score, stored):
    model = build(score_levels=[2, 3, 4])
    model.scoring = Scoring(map_branch, image_score, BOTH)
    fill_bank(model, views())
    assert model.bank.filled == stored
    assert getattr(model.bank, map_branch).shape == (3, 4 * 17, TINY.config["embed_dim"])  # of views of normal images
    fill_bank(model, views(1, abnormal=False, per_image=3))
    assert getattr(model.bank, map_branch).shape[1] == 3 * 17, "the old rows are still there"


def test_support_without_normal_image_is_refused(build):
    with pytest.raises(ValueError, match="holds no normal image"):
        fill_bank(build(), [SupportBatch(IMAGES, torch.ones(3), ["a", "b", "c"])])


# ---------------------------------------------------------------------- value ranges


def test_ranges_are_the_extremes(model, views):
    scores = fill_bank(model, views())
    assert model.ranges.isnan().all()
    set_ranges(model, scores)
    maps = [torch.cat(each) for each in zip(*(model.maps(one) for one in scores), strict=True)]
    zero, few = torch.cat([one.zero for one in scores]), torch.cat([one.few for one in scores])
    for of, pair in enumerate([maps, (zero, few)]):
        assert model.ranges[of].tolist() == [[values.min(), values.max()] for values in pair]
    assert (model.ranges[..., 1] > model.ranges[..., 0]).all()


def test_a_range_of_rounding_saturates_no_score(model, views, caplog):
    """Support images that are all alike, as all-black ones are."""
    (batch, *_) = views(1, abnormal=False)
    alike = SupportBatch(batch.image.repeat(3, 1, 1, 1), torch.zeros(3), ["a", "b", "c"])
    with caplog.at_level(logging.WARNING, logger="anomalib.mvfa"):
        set_ranges(model, fill_bank(model, [alike]))
    assert "have the same few-shot map and zero-shot image score and few-shot image score, but for" in caplog.text
    found = model(IMAGES)
    assert found.pred_score.max() < 0.9
    assert found.anomaly_map.amax() < 0.95


def test_scores_that_are_not_finite_set_no_range(model, views):
    scores = fill_bank(model, views())
    scores[2].distance[0, 3] = torch.nan
    with pytest.raises(ValueError, match="Scores that set the value ranges are not finite: training has diverged"):
        set_ranges(model, scores)
    assert model.ranges.isnan().all()


@pytest.mark.parametrize("image_score", ["map_max", "det_mean", "det_max"])
def test_calibrated_fusion(build, views, image_score):
    """Map and image score are fused by their own ranges; map_max needs no det branch."""
    model = build()
    model.scoring = Scoring("seg", image_score, Weights(1.0, 3.0))
    set_ranges(model, fill_bank(model, views()))
    with torch.no_grad():
        scores = model.branch_scores(model.tokens(IMAGES), model.text_features)
        found = model(IMAGES)
    zero, few = model.maps(scores)
    of_map, of_score = model.ranges.double().tolist()
    for row, y, x in ((0, 0, 0), (1, 17, 40), (2, 55, 3)):
        pair = float(zero[row, y, x]), float(few[row, y, x])
        assert found.anomaly_map[row, y, x].item() == pytest.approx(by_hand.fused(*pair, (1, 3), of_map), abs=1e-5)
    assert 0 < found.anomaly_map.min() < found.anomaly_map.max() < 1
    if image_score == "map_max":
        assert model.bank.det.numel() == 0
        assert torch.equal(found.pred_score, found.anomaly_map.amax(dim=(1, 2)))
        return
    for row in range(3):
        pair = float(scores.zero[row]), float(scores.few[row])
        assert found.pred_score[row].item() == pytest.approx(by_hand.fused(*pair, (1, 3), of_score), abs=1e-4)


def test_a_model_is_calibrated_once_bank_and_ranges_are_there(model, views):
    """A forgotten calibration shows: scores are NaN, not wrong."""
    assert not is_calibrated(model)
    scores = fill_bank(model, views())
    assert not is_calibrated(model)
    assert model(IMAGES).pred_score.isnan().all()
    set_ranges(model, scores)
    assert is_calibrated(model)
    model.scoring = Scoring("det", "det_mean", BOTH)
    assert is_calibrated(model)  # its bank is there too
    forget_calibration(model)
    assert not model.bank.filled
    assert model.ranges.isnan().all()


@pytest.mark.parametrize(("few", "normalised", "ready"), [(0.0, True, True), (0.5, False, False), (0.5, True, False)])
def test_without_few_shot_weight_nothing_is_needed(build, views, few, normalised, ready):
    model = build()
    model.scoring = Scoring("seg", "map_max", Weights(0.5, few), normalised)
    assert is_calibrated(model) == ready
    fill_bank(model, views())
    assert is_calibrated(model) == (ready or not normalised)


# ---------------------------------------------------------------------- thresholds


def test_thresholds_are_those_of_the_support(model, views):
    scores = fill_bank(model, views())
    set_ranges(model, scores)
    processor = ThresholdScaledPostProcessor()
    assert not thresholds_are_set(processor)
    image, label = torch.cat([batch.image for batch in views()])[:4], (0, 0, 1, 1)
    items = [SimpleNamespace(image=one, gt_label=of, gt_mask=None) for one, of in zip(image, label, strict=True)]
    set_thresholds(processor, list(zip(map(model.fuse, scores), items, strict=True)), "support")
    assert thresholds_are_set(processor)
    found = torch.cat([model.fuse(one).pred_score for one in scores])
    assert processor.evidence.scores == pytest.approx(found.tolist())
    assert 0.99 * found.min() < processor.image_threshold < found.max()

    reset_thresholds(processor)
    assert not thresholds_are_set(processor)
    assert thresholds_are_set(None)
