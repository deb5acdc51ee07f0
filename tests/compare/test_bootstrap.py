"""Areas of resamples, intervals, and what is recorded of a test."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from anomalib_mvfa.compare.bootstrap import ScoreRecorder, Scores, bootstrap, image_aurocs, pixel_aurocs, read_arrays


def test_areas_equal_scikit_learns_with_weights_and_ties():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    scores = (rng.random(60) + 0.3 * labels).round(1)
    weights = rng.multinomial(60, np.full(60, 1 / 60), 5)
    expected = [roc_auc_score(labels, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(image_aurocs(scores, labels, weights.astype(float)), expected, atol=1e-12)


def test_pixel_areas_equal_scikit_learns():
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 5, (4, 2, 8)).astype(float)
    scores = np.tile(np.arange(8), 2 * 4)
    labels = np.tile(np.repeat([0, 1], 8), 4)
    expected = roc_auc_score(labels, scores, sample_weight=counts.flatten())
    np.testing.assert_allclose(pixel_aurocs(counts, np.ones((1, 4))), [expected], atol=1e-12)


def recorded(scores, labels, paths):
    return Scores(list(paths), list(labels), list(scores))


def test_the_interval_covers_the_mean_and_is_wider_over_patients():
    rng = np.random.default_rng(2)
    labels = np.arange(120) // 10 % 2
    patients = np.arange(120) // 10
    shift = rng.normal(0, 1, 12)[patients]  # images of one patient are alike
    scores = labels + shift + rng.normal(0, 0.5, 120)
    run = recorded(scores, labels, [f"patient{p}_{i}.png" for i, p in enumerate(patients)])
    low, high = bootstrap([run], None, 400)["image_AUROC"]
    assert low < roc_auc_score(labels, scores) < high
    wide_low, wide_high = bootstrap([run], r"patient\d+", 400)["image_AUROC"]
    assert wide_high - wide_low > high - low


def test_pixel_counts_resolve_scores_in_a_small_part_of_the_range():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(6, 20, 20, generator=generator) > 0.8
    maps = 0.004 + 0.001 * torch.randn(6, 20, 20, generator=generator) + 0.001 * masks
    recorder = ScoreRecorder()
    for part in (slice(0, 3), slice(3, 6)):
        batch = SimpleNamespace(
            image_path=["a.png"] * 3,
            gt_label=torch.ones(3),
            pred_score=torch.rand(3),
            gt_mask=masks[part],
            anomaly_map=maps[part, None],
        )
        recorder.on_test_batch_end(None, None, None, batch, 0)
    expected = roc_auc_score(masks.flatten(), maps.flatten())
    np.testing.assert_allclose(pixel_aurocs(np.stack(recorder.scores.pixels), np.ones((1, 6))), [expected], atol=5e-4)


def test_resamples_without_normal_or_abnormal_images_do_not_count():
    run = recorded([0.1, 0.9], [0, 1], ["a.png", "b.png"])
    assert bootstrap([run], None, 50)["image_AUROC"] == [1.0, 1.0]


def test_scores_survive_saving(tmp_path):
    run = Scores(["b.png", "ä b.png"], [0, 1], [0.25, 7.5], [np.arange(6).reshape(2, 3)] * 2)
    run.save(tmp_path / "scores.npz")
    loaded = Scores.load(tmp_path / "scores.npz")
    assert (loaded.paths, loaded.labels, loaded.values) == (run.paths, run.labels, run.values)
    np.testing.assert_array_equal(loaded.pixels, run.pixels)
    Scores(["a.png"], [0], [0.5]).save(tmp_path / "scores.npz")
    assert Scores.load(tmp_path / "scores.npz").pixels == []


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"no archive"])
def test_corrupt_arrays_are_named(tmp_path, content):
    np.savez(tmp_path / "complete.npz", a=[1, 2])
    assert read_arrays(tmp_path / "complete.npz")["a"].tolist() == [1, 2]
    (tmp_path / "scores.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"/scores\.npz cannot be read; it may be cut short\. Remove its folder"):
        read_arrays(tmp_path / "scores.npz")
