"""Clip against loops by hand, and in anomalib's engine: a bank, and nothing that is trained."""

import logging

import pytest
import torch

import by_hand
from anomalib_mvfa import BMADLeaveOneOut, BrainPhantom, Clip, Mvfa
from anomalib_mvfa.baselines.clip import ClipModel
from anomalib_mvfa.model.fusion import Weights
from anomalib_mvfa.model.torch_model import Scoring
from recipe import TINY

SIZE = TINY.image_size
FEW = Weights(0.0, 1.0)


@pytest.fixture
def model(tiny_config):
    return ClipModel(str(tiny_config), None, SIZE)


@pytest.fixture
def make(mini_clip):
    def build(**arguments):
        defaults = {"image_size": SIZE, "visualizer": False}
        return Clip(str(mini_clip.config), str(mini_clip.weights), **{**defaults, **arguments})

    return build


# ---------------------------------------------------------------------- torch


@torch.no_grad()
@pytest.mark.parametrize(("map_branch", "image_score"), [("seg", "map_max"), ("det", "det_mean")])
@pytest.mark.parametrize("ranged", [False, True])
def test_scores(model, stream, views, pictures, map_branch, image_score, ranged):
    model.scoring = Scoring(map_branch, image_score, FEW, ranged)
    support = model.memorise(views)
    if ranged:
        model.calibrate(support)
    found = model(pictures["query"])

    bank = stream(model, torch.cat([pictures["normal"], pictures["normal"].flip(-1)]))
    distance = by_hand.few_map(stream(model, pictures["query"]), bank, SIZE)
    pooled = distance.flatten(1).amax(1) if image_score == "map_max" else distance.flatten(1).mean(1)
    if ranged:
        maps = [by_hand.enlarge(one.distance.reshape(-1, 4, 4), SIZE) for one in support]
        own = maps if image_score == "map_max" else [one.mean(dim=(1, 2)) for one in maps]
        of_map, of_score = ((min(x.min() for x in y), max(x.max() for x in y)) for y in (maps, own))
    else:
        of_map = of_score = None
    expected_map, expected_score = (
        _fused(values, limits) for values, limits in ((distance, of_map), (pooled, of_score))
    )
    assert (found.anomaly_map - expected_map).abs().max() < 1e-5
    assert (found.pred_score - expected_score).abs().max() < 1e-5


def _fused(values, limits):
    if limits is None:
        return values / 2
    v = 2 * (values - limits[0]) / (limits[1] - limits[0]) - 1
    return 0.5 + 0.5 * v / (1 + v.abs())


@torch.no_grad()
def test_the_bank_finds_its_own_rows(model, views, pictures):
    model.scoring = Scoring("seg", "map_max", FEW, ranged=False)
    model.memorise(views)
    assert model.bank.seg.shape == (4, 4 * 17, TINY.config["vision_cfg"]["width"])
    assert model(pictures["normal"]).anomaly_map.max() < 1e-6
    assert model(pictures["abnormal"]).anomaly_map.max() > 1e-4


@torch.no_grad()
def test_level_maps_are_those_of_each_level_alone(model, stream, views, pictures):
    model.scoring = Scoring("seg", "map_max", FEW, ranged=False)
    model.memorise(views)
    found = model.level_maps(pictures["query"])
    bank = stream(model, torch.cat([pictures["normal"], pictures["normal"].flip(-1)]))
    pairs = zip(stream(model, pictures["query"]), bank, strict=True)
    expected = torch.stack([by_hand.few_map([query], [rows], SIZE) / 2 for query, rows in pairs], dim=1)
    assert found.shape == (3, 4, SIZE, SIZE)
    assert (found - expected).abs().max() < 1e-6


def test_nothing_is_trained_and_no_text_encoded(model, monkeypatch):
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.train().training
    monkeypatch.delattr(type(model.backbone), "encode_text")
    assert model.encode_states("Brain").shape == (TINY.config["embed_dim"], 0)


# ---------------------------------------------------------------------- in the engine


@pytest.mark.parametrize(
    ("category", "settings"),
    [
        ("Brain", {"map_branch": "seg", "image_score": "map_max"}),
        ("Chest", {"map_branch": "det", "image_score": "det_mean"}),
    ],
)
def test_a_fit_is_one_epoch_that_builds_the_bank(make, few_shot, engine, monkeypatch, caplog, category, settings):
    monkeypatch.delattr("anomalib_mvfa.model.backbone.ClipBackbone.encode_text")
    model, runner = make(), engine(max_epochs=3)
    before = {key: value.clone() for key, value in model.state_dict().items() if "bank" not in key}
    with caplog.at_level(logging.WARNING, logger="anomalib.mvfa"):
        runner.fit(model, datamodule=few_shot(category))
    assert caplog.text == ""
    assert (runner.trainer.current_epoch, runner.trainer.num_training_batches) == (1, 1)
    assert settings.items() <= model.settings.items()
    assert (model.settings["zero_shot_weight"], model.settings["few_shot_weight"]) == (0.0, 1.0)
    after = model.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(after[key].nan_to_num(), value.nan_to_num())}
    assert all(key == "model.ranges" or key.startswith("post_processor.") for key in changed)
    assert getattr(model.model.bank, settings["map_branch"]).shape[:2] == (4, 2 * 11 * 17)

    figures = runner.test(model, datamodule=few_shot(category), verbose=False)[0]
    loaded = Clip.load_from_checkpoint(runner.best_model_path, visualizer=False)
    again = engine().test(loaded, datamodule=few_shot(category), verbose=False)[0]
    assert again == pytest.approx(figures, abs=1e-6)
    saved = torch.load(runner.best_model_path, weights_only=True)["state_dict"]
    assert not [key for key in saved if "backbone" in key]


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


@pytest.mark.parametrize("changed", [{"levels": [3, 6]}, {"normalize": True}])
def test_other_arguments_build_the_bank_anew(make, few_shot, engine, changed):
    runner = engine()
    runner.fit(make(), datamodule=few_shot())
    loaded = Clip.load_from_checkpoint(runner.best_model_path, visualizer=False, **changed)
    figures = engine().test(loaded, datamodule=few_shot(), verbose=False)[0]
    assert figures == pytest.approx(engine().test(make(**changed), datamodule=few_shot(), verbose=False)[0], abs=1e-6)


def test_checkpoints_of_others_are_refused(make, few_shot, engine, mini_clip):
    runner = engine()
    runner.fit(make(), datamodule=few_shot())
    with pytest.raises(RuntimeError, match=r"^This is no checkpoint of Mvfa\. Published adapters"):
        Mvfa.load_from_checkpoint(runner.best_model_path, visualizer=False)
    with pytest.raises(RuntimeError, match="fingerprint"):
        Clip.load_from_checkpoint(runner.best_model_path, pretrained=None, visualizer=False)


def test_a_model_without_bank_says_what_to_do(make, tmp_path):
    with pytest.raises(RuntimeError, match=r"memory bank or ranges are missing.* finished one\.$"):
        make().to_torch(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"calibration": "train"}, "support, none, test"), ({"bank_images": 0}, "bank_images=0 must be at least 1")],
)
def test_unknown_values_are_refused_before_weights_load(arguments, named):
    with pytest.raises(ValueError, match=named):
        Clip(backbone="no such backbone", **arguments)
