"""Anomalib's pre- and post-processor in our forms."""

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from anomalib_mvfa.model.export import (
    AntialiasedPreProcessor,
    OrderKeepingPostProcessor,
    ThresholdScaledPostProcessor,
    ask_for_threshold,
)
from recipe import images

SCORES = torch.linspace(0, 1, 401)


# ---------------------------------------------------------------------- resizing


def noise(height: int, width: int) -> torch.Tensor:
    """An image of 8-bit noise, ``(1, 3, H, W)``: what shows aliasing best."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("shape", [(512, 512), (300, 200), (57, 240), (40, 56), (56, 56), (1, 1)])
def test_resize_is_that_of_pil(shape):
    """Up to the rounding of 8-bit images, whether an image shrinks or grows; overshoots are left to the model."""
    image, processor = noise(*shape), AntialiasedPreProcessor(56)
    pixels = (255 * image[0]).round().byte().permute(1, 2, 0).numpy()
    expected = np.asarray(Image.fromarray(pixels).resize((56, 56), Image.Resampling.BICUBIC)) / 255
    found = processor.transform(image)
    difference = np.abs(found[0].permute(1, 2, 0).clamp(0, 1).numpy() - expected).max()
    assert difference < 1.5 / 255  # PIL rounds after the rows, and after the columns
    for exported in (processor, processor.export_transform):
        assert torch.allclose(exported(image), found, atol=2e-5)


def test_checkpoints_bring_the_size_and_keep_antialiasing():
    processor = AntialiasedPreProcessor(56)
    processor.load_checkpoint_config(AntialiasedPreProcessor(70).checkpoint_config())
    image = noise(300, 300)
    assert processor.transform.antialias
    assert processor.transform(image).shape == (1, 3, 70, 70)
    assert torch.allclose(processor(image), processor.transform(image), atol=2e-5)


@pytest.mark.parametrize("transform", [Compose([Resize((64, 64)), CenterCrop(56)]), None], ids=["compose", "none"])
def test_checkpoints_bring_other_transforms(transform):
    """A model that was trained with another pre-processor loads."""
    processor = AntialiasedPreProcessor(56)
    processor.load_checkpoint_config(PreProcessor(transform).checkpoint_config())
    image = images("other", 1, 64)
    expected = image if transform is None else transform(image)
    assert torch.equal(image if transform is None else processor.transform(image), expected)
    assert processor(image).shape == expected.shape


# ---------------------------------------------------------------------- thresholds


def with_thresholds(image: float, pixel: float) -> ThresholdScaledPostProcessor:
    processor = ThresholdScaledPostProcessor()
    processor._image_threshold.fill_(image)
    processor._pixel_threshold.fill_(pixel)
    for extreme in (processor.image_min, processor.pixel_min):
        extreme.fill_(0.4)  # of validation; anomalib would clamp what lies beyond them
    for extreme in (processor.image_max, processor.pixel_max):
        extreme.fill_(0.6)
    return processor


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.83])
def test_threshold_goes_to_one_half_and_the_ends_stay(threshold):
    found = with_thresholds(threshold, 0.5)(InferenceBatch(pred_score=SCORES, anomaly_map=torch.zeros(401, 2, 2)))
    for score, scaled in zip(SCORES.tolist(), found.pred_score.tolist(), strict=True):
        expected = 0.5 * score / threshold if score < threshold else 0.5 + 0.5 * (score - threshold) / (1 - threshold)
        assert scaled == pytest.approx(expected, abs=1e-6)
    assert (found.pred_score[0], found.pred_score[-1]) == (0.0, 1.0)
    assert (found.pred_score.diff() > 0).all(), "scores are tied"
    assert torch.equal(found.pred_label, threshold < SCORES)


def test_maps_have_a_threshold_of_their_own():
    maps = SCORES[:400].view(1, 20, 20)
    found = with_thresholds(0.9, 0.2)(InferenceBatch(pred_score=torch.tensor([0.9]), anomaly_map=maps))
    assert found.anomaly_map[0, 4, 0].item() == pytest.approx(0.5)  # the 80th of 400
    assert torch.equal(found.pred_mask, maps > 0.2)
    assert found.pred_score.item() == pytest.approx(0.5)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_threshold_at_an_end_leaves_scores_finite_and_in_order(threshold):
    found = with_thresholds(threshold, threshold)(InferenceBatch(pred_score=SCORES, anomaly_map=SCORES.view(401, 1, 1)))
    assert found.pred_score.isfinite().all()
    assert (found.pred_score.diff() > 0).all()
    assert 0 <= found.pred_score.min() < found.pred_score.max() <= 1


def test_without_thresholds_scores_stay_as_they_are_and_a_missing_map_stays_missing():
    found = ThresholdScaledPostProcessor()(InferenceBatch(pred_score=SCORES, anomaly_map=SCORES.view(401, 1, 1)))
    assert torch.allclose(found.pred_score, SCORES)
    assert torch.allclose(found.anomaly_map.flatten(), SCORES)
    found = with_thresholds(0.2, 0.2)(InferenceBatch(pred_score=torch.tensor([0.2]), anomaly_map=None))
    assert (found.anomaly_map, found.pred_mask) == (None, None)
    assert found.pred_score.item() == pytest.approx(0.5)


def test_order_keeping_keeps_the_order_of_any_scores():
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


@pytest.mark.parametrize("kind", [ThresholdScaledPostProcessor, OrderKeepingPostProcessor])
def test_a_choice_of_threshold_is_kept_and_can_be_changed_without_images(kind):
    """What is decided is what the model's own scores say, in batches and in exports alike."""
    scores, labels = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), torch.tensor([0, 0, 1, 0, 1, 1])

    def decided(processor):
        batch = ImageBatch(torch.zeros(6, 3, 2, 2), pred_score=scores.clone(), anomaly_map=scores.view(6, 1, 1))
        processor.post_process_batch(batch)
        exported = processor(InferenceBatch(pred_score=scores, anomaly_map=scores.view(6, 1, 1)))
        assert torch.equal(batch.raw_score, scores)
        assert torch.equal(batch.pred_label, exported.pred_label)
        assert torch.equal(batch.pred_label, scores > processor.image_threshold)
        assert torch.equal(batch.pred_mask, exported.pred_mask)
        return batch.pred_label.tolist(), batch.pred_mask.flatten().tolist()

    def loaded(first, threshold=None):
        other = kind(threshold)
        other.load_checkpoint_config(first.checkpoint_config())
        other.load_state_dict(first.state_dict())
        return other

    fitted = kind("sensitivity=1")
    images = torch.zeros(6, 3, 2, 2)
    batch = ImageBatch(images, gt_label=labels, pred_score=scores, anomaly_map=scores.view(6, 1, 1))
    fitted.on_validation_batch_end(None, None, batch)
    fitted.on_validation_epoch_end(None, None)
    best = loaded(fitted, "best_f1")
    assert best.image_threshold == pytest.approx(0.25)  # what it was found on is decided as it was counted
    assert decided(best)[0] == [False, False, True, True, True, True]
    found, masks = decided(fitted)
    assert found == [False, False, True, True, True, True]
    assert decided(loaded(fitted)) == (found, masks)
    assert decided(loaded(fitted, "specificity=1")) == ([False] * 4 + [True] * 2, masks)
    assert decided(loaded(loaded(fitted, 0.55))) == ([False] * 5 + [True], masks)
    fitted.forget()
    assert fitted.image_threshold == pytest.approx(0.25)
    assert kind(0.55).image_threshold == pytest.approx(0.55)


def test_a_threshold_needs_a_post_processor_that_takes_it():
    ask_for_threshold(PostProcessor(), None)
    for processor in (PostProcessor(), None):
        with pytest.raises(ValueError, match=r"threshold=0\.3 needs the default post-processor"):
            ask_for_threshold(processor, 0.3)


def test_order_keeping_without_a_threshold_has_the_middle_of_the_range_at_one_half():
    low, high, threshold = torch.tensor(2.0), torch.tensor(4.0), torch.tensor(torch.nan)
    scores = OrderKeepingPostProcessor._normalize(torch.tensor([2.0, 3.0, 4.0]), low, high, threshold)
    torch.testing.assert_close(scores, torch.tensor([1 / 3, 1 / 2, 2 / 3]))
