"""MvfaPlus: its scores against plain tensor operations, what it trains, and what data and arguments decide."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from lightning.pytorch import Callback
from torch.nn.functional import gelu, layer_norm

import by_hand
from anomalib_mvfa import BMADFewShot, BMADLeaveOneOut, MvfaPlus
from anomalib_mvfa.data.random_views import RandomViewDataset
from anomalib_mvfa.model.calibration import fill_bank
from anomalib_mvfa.model.fusion import Weights
from anomalib_mvfa.model.torch_model import Scoring
from recipe import TINY, images

SIZE = TINY.image_size
IMAGES = images("model", 3, SIZE)


@pytest.fixture
def make(tiny_config):
    """Build a small MvfaPlus."""

    def build(**arguments):
        defaults = {"pretrained": None, "image_size": SIZE, "max_epochs": 2, "visualizer": False}
        return MvfaPlus(backbone=str(tiny_config), **{**defaults, **arguments})

    return build


class SaveFirst(Callback):
    """Saves a checkpoint of the first epoch."""

    def on_train_epoch_end(self, trainer, pl_module):
        del pl_module
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "first.ckpt")


def fit(model, datamodule, folder, ckpt_path=None):
    """Fit a model, and return it."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    engine = Engine(default_root_dir=folder, callbacks=[SaveFirst()], **quiet)
    engine.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
    return model


@torch.no_grad()
def streams(model, image):
    """Streams ``(B, P, D)`` of the frozen backbone, per level, in double precision."""
    return [level[:, 1:].double() for level in model.frozen_tokens(image)]


def with_neighbours(stream):
    """Patches ``(B, P, D)``, and beside each the mean of it and its neighbours, of which there are 3, 5 or 8."""
    side = int(stream.shape[1] ** 0.5)
    grid, means = stream.unflatten(1, (side, side)), torch.empty_like(stream)
    for row, column in np.ndindex(side, side):
        around = grid[:, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
        means[:, row * side + column] = around.flatten(1, 2).mean(dim=1)
    return torch.cat([stream, means], dim=-1)


def read(model, level, branch, stream):
    """What a branch's adapter of a level makes of a stream."""
    w = by_hand.weights_of(getattr(model, f"{branch}_adapters")[level])
    hidden = gelu(with_neighbours(layer_norm(stream, stream.shape[-1:])) @ w["3.weight"].T + w["3.bias"])
    return hidden @ w["5.weight"].T


@torch.no_grad()
@pytest.mark.parametrize(("map_branch", "image_score"), [("seg", "map_top"), ("det", "det_mean")])
def test_scores(make, views, text, map_branch, image_score):
    """Text branch of what adapters read, distances of the stream itself to that of normal patches."""
    model, weights = make().model.eval(), Weights(0.75, 0.25)
    model.text_features.copy_(text)
    model.scoring = Scoring(map_branch, image_score, weights, normalised=False)
    fill_bank(model, views())
    found = model(IMAGES)

    query, bank = streams(model, IMAGES), streams(model, torch.cat([v.image for v in views(abnormal=False)]))
    root = text.shape[0] ** 0.5
    logits = [read(model, level, map_branch, stream) @ text.double() / root for level, stream in enumerate(query)]
    zero = sum(by_hand.seg_map(level, SIZE) for level in logits) / 3
    few = by_hand.few_map([torch.cat([stream[:, :1], stream], dim=1) for stream in query], bank, SIZE)
    expected = by_hand.fused(zero, few, weights, None)
    assert (found.anomaly_map - expected).abs().max() < 2e-5
    score = expected.flatten(1).topk(round(0.05 * SIZE**2)).values.mean(dim=1)
    if image_score == "det_mean":
        det = sum(level.softmax(dim=-1)[..., 1].mean(dim=1) for level in logits) / 3
        score = by_hand.fused(det, few.mean(dim=(1, 2)), weights, None)
    assert (found.pred_score - score).abs().max() < 2e-5


def test_training_runs_the_backbone_once_for_each_view(make, categories, tmp_path, monkeypatch):
    model, seen = make(max_epochs=3), []
    network = model.model.backbone
    streams_of = network.streams

    def counted(image, ends):
        seen.extend([model.model.training] * len(image))
        return streams_of(image, ends)

    monkeypatch.setattr(network, "streams", counted)
    fit(model, BMADFewShot(categories, "Brain", k_shot=1, num_workers=0), tmp_path)
    assert sum(seen) == 44


def test_views_are_random_where_masks_say_what_they_show(make, categories):
    brain, chest = (BMADFewShot(categories, name, k_shot=1) for name in ("Brain", "Chest"))
    for data in (brain, chest):
        data.setup()
    assert type(make().training_views(brain.support)) is RandomViewDataset
    assert make().training_views(chest.support) is chest.support


def test_only_adapters_learn_and_half_of_what_they_read_is_dropped(make, categories, tmp_path):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, BMADFewShot(categories, "Brain", k_shot=1, num_workers=0), tmp_path)
    weights = {name for name, _ in model.named_parameters()}
    moved = {name for name in weights if not torch.equal(before[name], model.state_dict()[name])}
    assert moved == {name for name in weights if "_adapters." in name}

    adapter, stream = model.model.seg_adapters[0], torch.ones(1, 4, TINY.config["vision_cfg"]["width"]).cumsum(-1)
    assert torch.equal(adapter.eval()(stream), adapter(stream))
    torch.manual_seed(0)
    kept = adapter.train()[2](torch.ones(1000))
    assert set(kept.tolist()) == {0.0, 2.0}
    assert abs(kept.mean() - 1) < 0.1
    assert not torch.equal(adapter(stream), adapter(stream))


def test_data_and_arguments_decide_how_branches_are_scored(make, categories, tmp_path):
    def settings(datamodule, **arguments):
        chosen = fit(make(max_epochs=1, **arguments), datamodule, tmp_path).settings
        return chosen.image_score, chosen.zero_shot_weight, chosen.few_shot_weight

    brain, chest = (BMADFewShot(categories, name, k_shot=1, num_workers=0) for name in ("Brain", "Chest"))
    assert settings(brain) == ("map_top", 0.75, 0.25)
    assert settings(chest) == ("det_mean", 0.75, 0.25)  # it has no masks
    assert settings(BMADLeaveOneOut(categories, "Brain", ["Chest"], num_workers=0)) == ("det_mean", 0.5, 0.0)
    asked = {"image_score": "map_max", "zero_shot_weight": 0.5, "few_shot_weight": 0.5}
    assert settings(brain, **asked) == ("map_max", 0.5, 0.5)


def test_a_checkpoint_keeps_what_was_in_use(make, categories, tmp_path):
    model = fit(make(image_score="map_max"), BMADFewShot(categories, "Brain", k_shot=1, num_workers=0), tmp_path)
    model.trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = MvfaPlus.load_from_checkpoint(tmp_path / "model.ckpt", visualizer=False)
    assert loaded.settings == model.settings
    assert loaded.settings.scoring.weights == Weights(0.75, 0.25)

    other = make()  # whose arguments leave open what the checkpoint's said
    other.on_load_checkpoint(torch.load(tmp_path / "model.ckpt", weights_only=True))
    assert other.settings == model.settings


def test_resumed_training_drops_what_unbroken_training_does(make, categories, tmp_path):
    def data():
        return BMADFewShot(categories, "Brain", k_shot=1, num_workers=0)

    unbroken = fit(make(), data(), tmp_path)
    (first,) = tmp_path.rglob("first.ckpt")
    torch.rand(3)  # whatever else is drawn
    resumed = fit(make(), data(), tmp_path / "resumed", ckpt_path=first)
    assert resumed.trainer.current_epoch == 2
    assert all(map(torch.equal, unbroken.model.parameters(), resumed.model.parameters()))


def test_the_last_three_of_the_published_levels_are_read(make):
    assert make().model.levels == [2, 3, 4]
    assert make(levels=[1, 4]).model.levels == [1, 4]
    with pytest.raises(ValueError, match="levels"):
        make(levels=[])


@torch.no_grad()
def test_half_precision_scores_as_well(make, text):
    model = make(few_shot_weight=0).model.eval()
    model.text_features.copy_(text)
    model.scoring = Scoring("seg", "map_top", Weights(1, 0), normalised=False)
    expected = model(IMAGES).pred_score
    assert (model.bfloat16()(IMAGES.bfloat16()).pred_score - expected).abs().max() < 0.02


def test_a_branch_must_have_weight():
    with pytest.raises(ValueError, match="both 0; one branch at least"):
        MvfaPlus(backbone="no such backbone", zero_shot_weight=0, few_shot_weight=0)
