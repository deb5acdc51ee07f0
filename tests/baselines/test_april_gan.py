"""AprilGan against loops by hand, and in anomalib's engine.

Axes: B images, L tokens (class token first), D width of the image tower, E joint width, H = W image size, l level.
"""

import inspect

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import by_hand
from anomalib_mvfa import AprilGan, BMADLeaveOneOut, Clip
from anomalib_mvfa.baselines.april_gan import AprilGanModel
from anomalib_mvfa.model.calibration import fill_bank
from anomalib_mvfa.model.fusion import Weights
from anomalib_mvfa.model.losses import MvfaLoss, dice_loss, focal_loss
from anomalib_mvfa.model.torch_model import Scoring
from recipe import TINY, blobs

SIZE = TINY.image_size
ZERO, BOTH = Weights(1.0, 0.0), Weights(0.5, 0.5)
LABELS = torch.tensor([0, 1, 1])


@pytest.fixture
def model(tiny_config):
    model = AprilGan(str(tiny_config), None, SIZE, normalize=False, visualizer=False).model.eval()
    features = torch.randn(TINY.config["embed_dim"], 2, generator=torch.Generator().manual_seed(1))
    model.text_features.copy_(torch.nn.functional.normalize(features, dim=0))
    return model


@pytest.fixture
def make(mini_clip):
    def build(**arguments):
        defaults = {"image_size": SIZE, "max_epochs": 1, "visualizer": False}
        return AprilGan(str(mini_clip.config), str(mini_clip.weights), **{**defaults, **arguments})

    return build


def projected(model, levels, branch):
    """Features ``(B, L, E)`` per level by the weights and biases of a branch."""
    weights = by_hand.weights_of(getattr(model, f"{branch}_adapters"))
    return [x @ weights[f"{row}.weight"].T + weights[f"{row}.bias"] for row, x in enumerate(levels)]


# ---------------------------------------------------------------------- torch


@torch.no_grad()
@pytest.mark.parametrize(
    ("weights", "map_branch", "image_score"),
    [(ZERO, "seg", "map_max"), (BOTH, "seg", "map_max"), (BOTH, "det", "det_mean")],
)
def test_scores(model, stream, views, pictures, weights, map_branch, image_score):
    model.scoring = Scoring(map_branch, image_score, weights, normalised=False)
    if weights.few:
        fill_bank(model, views)
    found = model(pictures["query"])

    text = model.text_features
    query = stream(model, pictures["query"])
    bank = [x[:, 1:] for x in stream(model, pictures["normal"])]  # of the frozen stream, whatever the branch
    few = by_hand.few_map(query, bank, SIZE)
    maps = [by_hand.seg_map(by_hand.logits(x, text), SIZE) for x in projected(model, query, map_branch)]
    expected = by_hand.fused(sum(maps) / 4, few, weights, None)
    score = expected.flatten(1).max(dim=1).values
    if image_score == "det_mean":
        det = sum(by_hand.det_probability(x, text).mean(dim=1) for x in projected(model, query, "det")) / 4
        score = by_hand.fused(det, few.mean(dim=(1, 2)), weights, None)
    assert (found.anomaly_map - expected).abs().max() < 2e-5
    assert (found.pred_score - score).abs().max() < 2e-5


@torch.no_grad()
def test_the_bank_holds_the_frozen_stream_and_finds_its_own_rows(model, stream, views, pictures):
    fill_bank(model, views)
    rows = torch.stack(stream(model, pictures["normal"]))[:, :, 1:]  # of unchanged views, without class tokens
    assert (model.bank.seg - by_hand.unit(rows).flatten(1, 2)).abs().max() < 1e-5  # (l, M, D)
    model.scoring = Scoring("seg", "map_max", Weights(0.0, 1.0), normalised=False)
    assert model(pictures["normal"]).anomaly_map.max() < 1e-6
    assert model(pictures["abnormal"]).anomaly_map.max() > 1e-4


def test_loss_and_what_learns(model, stream, pictures):
    model.train()
    masks = blobs("masks", 3, SIZE)
    output = model(pictures["query"])
    loss = MvfaLoss()(*output, masks, LABELS)

    query, text = stream(model, pictures["query"]), model.text_features
    expected = 0.0
    for seg, det in zip(projected(model, query, "seg"), projected(model, query, "det"), strict=True):
        abnormal = by_hand.seg_map(by_hand.logits(seg, text), SIZE)
        maps = torch.stack([1 - abnormal, abnormal], dim=1)
        score = by_hand.det_probability(det, text).mean(dim=1)
        expected += focal_loss(maps, masks) + dice_loss(abnormal, masks)
        expected += binary_cross_entropy_with_logits(score, LABELS.double())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)

    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("adapters" in name)
        assert not parameter.requires_grad or parameter.grad.any()


# ---------------------------------------------------------------------- in the engine


@pytest.mark.parametrize(("category", "layers"), [("Brain", ["seg", "det"]), ("Chest", ["det"])])
def test_few_shot_trains_the_layers_only(make, few_shot, engine, category, layers):
    model, runner = make(), engine()
    before = {key: value.clone() for key, value in model.state_dict().items() if "backbone" in key or "adapt" in key}
    runner.fit(model, datamodule=few_shot(category))
    after = model.state_dict()
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert moved == {key for key in before if any(f"{branch}_adapters" in key for branch in layers)}
    chosen = ("seg", "map_max") if category == "Brain" else ("det", "det_mean")  # it has no masks
    assert (model.settings.map_branch, model.settings.image_score) == chosen
    with pytest.raises(RuntimeError, match=r"^This is no checkpoint of this version's Clip"):
        Clip.load_from_checkpoint(runner.best_model_path, visualizer=False)
    with pytest.raises(RuntimeError, match="fingerprint"):
        AprilGan.load_from_checkpoint(runner.best_model_path, pretrained=None, visualizer=False)


def test_leave_one_out_has_no_bank_and_trains_with_each_class_name(make, categories, engine, monkeypatch):
    model, encoded = make(), []
    encode = AprilGanModel.encode_states
    monkeypatch.setattr(AprilGanModel, "encode_states", lambda self, name: encoded.append(name) or encode(self, name))
    data = BMADLeaveOneOut(categories, "Brain", ["Chest"], num_workers=0)
    engine().train(model, datamodule=data)
    assert set(encoded) == {"Chest X-ray film", "Brain"}
    assert model.model.bank.seg.numel() == model.model.bank.det.numel() == 0
    assert model.settings.learning_rate == 1e-3
    torch.testing.assert_close(model.model.text_features, model.model.encode_states("Brain"))


def test_class_name_is_that_of_the_data_unless_given(make, few_shot, engine):
    model = make(class_name="head")
    engine().test(model, datamodule=few_shot(), verbose=False)
    torch.testing.assert_close(model.model.text_features, model.model.encode_states("head"))


def test_defaults_are_the_authors():
    """As in their train.sh and test_few_shot.sh."""
    defaults = {name: value.default for name, value in inspect.signature(AprilGan).parameters.items()}
    found = {name: defaults[name] for name in ("image_size", "normalize", "learning_rate", "calibration")}
    assert found == {"image_size": 518, "normalize": True, "learning_rate": 1e-3, "calibration": "none"}
    assert AprilGan.BATCH_SIZE == 8
