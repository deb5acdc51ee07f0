"""Baselines in plain tensor operations, and engines that say little."""

import shutil

import pytest
import torch
from anomalib.engine import Engine

import by_hand
from anomalib_mvfa import BMADFewShot
from anomalib_mvfa.model.calibration import SupportBatch
from recipe import TINY, images

SIZE = TINY.image_size


@pytest.fixture(scope="session")
def stream():
    """Return a function: the stream ``(B, L, D)`` of a model's frozen tower after each level."""

    def run(model, image):
        weights = by_hand.weights_of(model.backbone.clip)
        x = by_hand.embed(image.double().clip(0, 1), weights, weights["visual.conv1.weight"].shape[-1])
        levels = []
        for number in range(1, model.levels[-1] + 1):
            x = by_hand.block(x, weights, f"visual.transformer.resblocks.{number - 1}", x.shape[-1] // 64)
            if number in model.levels:
                levels.append(x)
        return levels

    return run


@pytest.fixture(scope="session")
def pictures():
    """Return three images to score, and two normal and two abnormal ones of a support."""
    return {"query": images("model", 3, SIZE), "normal": images("normal", 2, SIZE), "abnormal": images("odd", 2, SIZE)}


@pytest.fixture
def views(pictures):
    """Return the support in one batch of its images and one of their mirror images."""
    image = torch.cat([pictures["normal"], pictures["abnormal"]])
    label, source = torch.tensor([0, 0, 1, 1]), list("abcd")
    return [SupportBatch(image, label, source), SupportBatch(image.flip(-1), label, source)]


@pytest.fixture
def engine(tmp_path):
    """Build an engine that says little."""

    def build(**arguments):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
        return Engine(default_root_dir=tmp_path / "results", **{**quiet, **arguments})

    return build


@pytest.fixture
def categories(phantom_root, tmp_path):
    """Return a root with the same images as Brain, with masks, and as Chest, without."""
    for category in ("Brain", "Chest"):
        shutil.copytree(phantom_root / "Brain", tmp_path / category)
    return tmp_path


@pytest.fixture
def few_shot(categories):
    """Build the few-shot datamodule of a category."""
    return lambda category="Brain": BMADFewShot(categories, category, k_shot=2, num_workers=0)
