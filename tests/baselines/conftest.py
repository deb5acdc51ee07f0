"""Baselines in plain tensor operations, data with and without masks, and engines that say little."""

import pytest
import torch
from anomalib.engine import Engine

import by_hand
from anomalib_mvfa import BMADFewShot
from anomalib_mvfa.model.calibration import SupportBatch
from recipe import TINY, images

SIZE = TINY.image_size
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}


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
    """Return images to score, normal and abnormal ones of a support, and the normal ones with their mirror images."""
    normal = images("normal", 2, SIZE)
    bank = torch.cat([normal, normal.flip(-1)])
    return {"query": images("model", 3, SIZE), "normal": normal, "abnormal": images("odd", 2, SIZE), "bank": bank}


@pytest.fixture(scope="session")
def views(pictures):
    """Return the support in one batch of its images and one of their mirror images."""
    image = torch.cat([pictures["normal"], pictures["abnormal"]])
    label, source = torch.tensor([0, 0, 1, 1]), list("abcd")
    return [SupportBatch(image, label, source), SupportBatch(image.flip(-1), label, source)]


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """Build an engine that says little."""
    return lambda **more: Engine(default_root_dir=tmp_path_factory.mktemp("results"), **{**QUIET, **more})


@pytest.fixture(scope="session")
def few_shot(categories):
    """Build the few-shot datamodule of a category, all of whose views are one batch."""
    defaults = {"k_shot": 1, "train_batch_size": 22, "num_workers": 0}
    return lambda category="Brain", **more: BMADFewShot(categories, category, **{**defaults, **more})
