"""Several seeds in one run: areas, intervals, and the command itself."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from anomalib_mvfa.repeat import PIXEL_BINS, ScoreRecorder, bootstrap, image_aurocs, main, pixel_aurocs


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
    recorder = ScoreRecorder()
    recorder.scores, recorder.labels, recorder.paths = list(scores), list(labels), list(paths)
    return recorder


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
    np.testing.assert_allclose(pixel_aurocs(np.stack(recorder.pixels), np.ones((1, 6))), [expected], atol=5e-4)


def test_resamples_without_one_kind_do_not_count():
    run = recorded([0.1, 0.9], [0, 1], ["a.png", "b.png"])
    assert bootstrap([run], None, 50)["image_AUROC"] == [1.0, 1.0]


def test_the_command_saves_means_and_intervals(mini_clip, phantom_root, tmp_path, capsys):
    options = {
        "--model": "Mvfa",
        "--model.backbone": mini_clip.config,
        "--model.pretrained": mini_clip.weights,
        "--model.image_size": 56,
        "--model.max_epochs": 2,
        "--model.visualizer": "false",
        "--data": "BMADFewShot",
        "--data.root": phantom_root,
        "--data.k_shot": 1,
        "--data.num_workers": 0,
        "--trainer.enable_progress_bar": "false",
        "--default_root_dir": tmp_path / "results",
    }
    output = tmp_path / "out" / "repeat.json"
    own = ["--seeds", "0,1", "--resamples", "50", "--output", str(output), "--select_epoch_on_test"]
    main([*own, *(str(part) for option in options.items() for part in option)])
    report = json.loads(output.read_text())
    assert [run["seed"] for run in report["runs"]] == [0, 1]
    assert report["calibration"] == "support"
    summary = report["last_epoch"]["image_AUROC"]
    values = [run["last_epoch"]["image_AUROC"] for run in report["runs"]]
    assert summary["mean"] == pytest.approx(np.mean(values))
    assert summary["interval_95"][0] <= summary["mean"] <= summary["interval_95"][1]
    assert "optimistic" in report["selected_on_test"]["note"]
    for run in report["runs"]:
        chosen, last = (run[key]["image_AUROC"] + run[key]["pixel_AUROC"] for key in ("selected_on_test", "last_epoch"))
        assert chosen >= last - 1e-6
    assert "95 % interval over images" in capsys.readouterr().out
    assert not list(output.parent.glob("*.partial"))


@pytest.mark.parametrize("seeds", ["0;1", "a", ""])
def test_seeds_must_be_whole_numbers(seeds, capsys):
    with pytest.raises(SystemExit):
        main(["--seeds", seeds])
    assert "--seeds" in capsys.readouterr().err
    assert PIXEL_BINS > 2
