"""The published test flow on real images, through anomalib's command line: files in, figures out."""

import json
import math
from pathlib import Path

import pytest
import torch
from anomalib.cli.cli import AnomalibCLI

from anomalib_mvfa.compare.recorders import ScoreRecorder
from anomalib_mvfa.model.torch_model import MvfaModel
from recipe import write_support_list

FIGURES = json.loads((Path(__file__).parents[1] / "figures" / "e2e_mini.json").read_text())


CATEGORIES = [
    pytest.param(category, marks=[pytest.mark.slow] * (category not in {"Brain", "Chest"})) for category in FIGURES
]
"""The quick ones are one with masks and one without."""


@pytest.fixture
def run(bmad_mini, mini_clip, tmp_path):
    """Run `anomalib test` with the reference's adapters and support lists."""

    def test(category, **model):
        figures = FIGURES[category]
        write_support_list(tmp_path, category, figures["support_normal"], figures["support_abnormal"])
        options = {
            "model.backbone": mini_clip.config,
            "model.pretrained": mini_clip.weights,
            "model.adapters": mini_clip.adapters,
            "model.image_size": 70,
            "model.calibration": "test",
            "model.visualizer": "false",
            "data.root": bmad_mini,
            "data.category": category,
            "data.support_list": tmp_path,
            "data.num_workers": 0,
            "trainer.callbacks+": "anomalib_mvfa.compare.recorders.ScoreRecorder",
            "trainer.accelerator": "cpu",
            "trainer.enable_progress_bar": "false",
            "default_root_dir": tmp_path / "results",
            **{f"model.{name}": value for name, value in model.items()},
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        cli = AnomalibCLI(["test", "--model=Mvfa", "--data=BMADFewShot", *arguments])
        return {name: float(value) for name, value in cli.engine.trainer.callback_metrics.items()}, cli

    return test


@pytest.mark.parametrize("category", CATEGORIES)
def test_published_scores(run, category, monkeypatch):
    figures, seen, scores = FIGURES[category], [], MvfaModel.branch_scores

    def watched(*args, **kwargs):
        seen.append(scores(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(MvfaModel, "branch_scores", watched)
    metrics, cli = run(category)
    if category == "Brain":
        assert metrics["image_AUROC"] == pytest.approx(figures["auc_image_from_map"], abs=1e-6)
        assert metrics["pixel_AUROC"] == pytest.approx(figures["auc_pixel"], abs=5e-6)  # counted in bins
    else:
        assert metrics["image_AUROC"] == pytest.approx(figures["auc_image_from_det"], abs=1e-6)
        assert math.isnan(metrics["pixel_AUROC"])  # no masks: not defined
    if category == "Chest":
        recorder = next(c for c in cli.engine.trainer.callbacks if isinstance(c, ScoreRecorder))
        names = [Path(path).name for path in recorder.kept["paths"]]
        rows = [names.index(name) for name in figures["files"]]
        for branch, key in (("zero", "zero_det_mean"), ("few", "few_det_mean")):
            values = torch.cat([getattr(score, branch) for score in seen])[-len(names) :][rows]
            expected = torch.tensor(figures[key])
            torch.testing.assert_close(values, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("category", CATEGORIES)
def test_published_scores_without_support(run, category):
    """The leave-one-out scoring: the text branch alone, the det mean for every category."""
    metrics, _ = run(category, few_shot_weight=0, image_score="det_mean")
    assert metrics["image_AUROC"] == pytest.approx(FIGURES[category]["auc_image_zero_det"], abs=1e-6)
    if category == "Brain":
        assert metrics["pixel_AUROC"] == pytest.approx(FIGURES[category]["auc_pixel_zero"], abs=5e-6)
