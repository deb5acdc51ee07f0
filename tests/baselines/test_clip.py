"""Clip against loops by hand, and in anomalib's engine: a bank, and nothing that is trained."""

import logging

import pytest
import torch

import by_hand
from anomalib_mvfa import BMADLeaveOneOut, BrainPhantom, Clip, Mvfa
from anomalib_mvfa.model.calibration import fill_bank, set_ranges
from anomalib_mvfa.model.fusion import Weights
from anomalib_mvfa.model.level_maps import level_maps
from anomalib_mvfa.model.torch_model import Scoring
from recipe import TINY

SIZE = TINY.image_size
FEW = Weights(0.0, 1.0)


@pytest.fixture
def model(tiny_config):
    return Clip(str(tiny_config), None, SIZE, visualizer=False).model


@pytest.fixture
def make(mini_clip):
    def build(**arguments):
        defaults = {"image_size": SIZE, "visualizer": False}
        return Clip(str(mini_clip.config), str(mini_clip.weights), **{**defaults, **arguments})

    return build


# ---------------------------------------------------------------------- torch


@torch.no_grad()
@pytest.mark.parametrize(
    ("map_branch", "image_score", "normalised"),
    [("seg", "map_max", False), ("seg", "map_max", True), ("det", "det_mean", True)],
)
def test_scores(model, stream, views, pictures, map_branch, image_score, normalised):
    model.scoring = Scoring(map_branch, image_score, FEW, normalised)
    support = fill_bank(model, views)
    if normalised:
        set_ranges(model, support)
    found = model(pictures["query"])

    distance = by_hand.few_map(stream(model, pictures["query"]), stream(model, pictures["bank"]), SIZE)
    pooled = distance.flatten(1).amax(1) if image_score == "map_max" else distance.flatten(1).mean(1)
    maps = torch.cat([by_hand.enlarge(one.distance.reshape(-1, 4, 4), SIZE) for one in support])
    own = maps if image_score == "map_max" else maps.mean(dim=(1, 2))
    for field, values, scale in (("anomaly_map", distance, maps), ("pred_score", pooled, own)):
        v = 2 * (values - scale.min()) / (scale.max() - scale.min()) - 1
        expected = 0.5 + 0.5 * v / (1 + v.abs()) if normalised else values / 2
        assert (getattr(found, field) - expected).abs().max() < 1e-5


@torch.no_grad()
def test_level_maps_are_those_of_each_level_alone(model, stream, views, pictures):
    model.scoring = Scoring("seg", "map_max", FEW, normalised=False)
    fill_bank(model, views)
    found = level_maps(model, pictures["query"])
    pairs = zip(stream(model, pictures["query"]), stream(model, pictures["bank"]), strict=True)
    expected = torch.stack([by_hand.few_map([query], [rows], SIZE) / 2 for query, rows in pairs], dim=1)
    assert found.shape == (3, 4, SIZE, SIZE)
    assert (found - expected).abs().max() < 1e-6


def test_nothing_is_trained_and_no_text_encoded(model, monkeypatch):
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.train().training
    monkeypatch.delattr(type(model.backbone), "encode_text")
    assert model.encode_states("Brain").shape == (TINY.config["embed_dim"], 0)


# ---------------------------------------------------------------------- in the engine


def test_a_fit_is_one_epoch_that_builds_the_bank(make, few_shot, engine, monkeypatch, caplog):
    monkeypatch.delattr("anomalib_mvfa.model.backbone.ClipBackbone.encode_text")
    model, runner = make(), engine(max_epochs=3)
    before = {key: value.clone() for key, value in model.state_dict().items() if "bank" not in key}
    with caplog.at_level(logging.WARNING, logger="anomalib.mvfa"):
        runner.fit(model, datamodule=few_shot("Chest", k_shot=2))
    assert caplog.text == ""
    assert (runner.trainer.current_epoch, runner.trainer.num_training_batches) == (1, 1)
    assert (model.settings.map_branch, model.settings.image_score) == ("det", "det_mean")  # there are no masks
    assert (model.settings.zero_shot_weight, model.settings.few_shot_weight) == (0.0, 1.0)
    after = model.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(after[key].nan_to_num(), value.nan_to_num())}
    assert all(key == "model.ranges" or key.startswith("post_processor.") for key in changed)
    assert model.model.bank.det.shape[:2] == (4, 2 * 11 * 17)


def test_normal_images_alone_are_no_reason_to_warn(make, engine, tmp_path, caplog):
    data = BrainPhantom(tmp_path / "phantom", size=32, num_workers=0)
    model = make(bank_images=3, calibration="none")
    with caplog.at_level(logging.WARNING, logger="anomalib.mvfa"):
        engine().fit(model, datamodule=data)
    assert caplog.text == ""
    assert model.model.bank.seg.shape[1] == 3 * 11 * 17


def test_leave_one_out_is_refused(make, categories, engine):
    with pytest.raises(ValueError, match=r"Clip needs normal images .* protocol leave_one_out has none"):
        engine().fit(make(), datamodule=BMADLeaveOneOut(categories, "Brain", ["Chest"], num_workers=0))


def test_checkpoints_for_other_arguments_and_of_others(make, few_shot, engine):
    runner, changed = engine(), {"levels": [3, 6], "normalize": True}
    runner.fit(make(), datamodule=few_shot())
    loaded = Clip.load_from_checkpoint(runner.best_model_path, visualizer=False, **changed)
    figures = engine().test(loaded, datamodule=few_shot(), verbose=False)[0]
    assert figures == pytest.approx(engine().test(make(**changed), datamodule=few_shot(), verbose=False)[0], abs=1e-6)
    with pytest.raises(RuntimeError, match=r"^This is no checkpoint of this version's Mvfa"):
        Mvfa.load_from_checkpoint(runner.best_model_path, visualizer=False)
    with pytest.raises(RuntimeError, match="fingerprint"):
        Clip.load_from_checkpoint(runner.best_model_path, pretrained=None, visualizer=False)


def test_a_model_without_bank_says_what_to_do(make, tmp_path):
    with pytest.raises(RuntimeError, match=r"memory bank or ranges are missing.* finished one\.$"):
        make().to_torch(tmp_path)
