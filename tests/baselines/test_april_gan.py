"""AprilGan against loops by hand, and in anomalib's engine.

Axes: B images, L tokens (class token first), D width of the image tower, E joint width, H = W image size, l level.
"""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import by_hand
from anomalib_mvfa import AprilGan, BMADLeaveOneOut, Clip
from anomalib_mvfa.baselines.april_gan import AprilGanModel
from anomalib_mvfa.compare.level_maps import level_maps
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
    model = AprilGan(str(tiny_config), None, SIZE, visualizer=False).model.eval()
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
@pytest.mark.parametrize("weights", [ZERO, BOTH], ids=["zero", "both"])
@pytest.mark.parametrize("map_branch", ["seg", "det"])
@pytest.mark.parametrize("image_score", ["map_max", "det_mean"])
def test_scores(model, stream, views, pictures, weights, map_branch, image_score):
    model.scoring = Scoring(map_branch, image_score, weights, normalised=False)
    if weights.few:
        fill_bank(model, views)
    found = model(pictures["query"])

    text = model.text_features
    query = stream(model, pictures["query"])
    bank = stream(model, torch.cat([pictures["normal"], pictures["normal"].flip(-1)]))
    few = by_hand.few_map(query, bank, SIZE)  # of the frozen stream, whatever the branch
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
    rows = torch.stack(stream(model, torch.cat([pictures["normal"], pictures["normal"].flip(-1)])))
    assert (model.bank.seg - by_hand.unit(rows).flatten(1, 2)).abs().max() < 1e-5  # (l, M, D)
    model.scoring = Scoring("seg", "map_max", Weights(0.0, 1.0), normalised=False)
    assert model(pictures["normal"]).anomaly_map.max() < 1e-6
    assert model(pictures["abnormal"]).anomaly_map.max() > 1e-4


@torch.no_grad()
def test_level_maps_are_those_of_each_level_alone(model, stream, views, pictures):
    model.scoring = Scoring("seg", "map_max", BOTH, normalised=False)
    fill_bank(model, views)
    found = level_maps(model, pictures["query"])
    query = stream(model, pictures["query"])
    bank = stream(model, torch.cat([pictures["normal"], pictures["normal"].flip(-1)]))
    for level, feature in enumerate(projected(model, query, "seg")):
        zero = by_hand.seg_map(by_hand.logits(feature, model.text_features), SIZE)
        few = by_hand.few_map([query[level]], [bank[level]], SIZE)
        assert (found[:, level] - by_hand.fused(zero, few, BOTH, None)).abs().max() < 2e-5


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
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {
        f"{branch}_adapters.{level}.{kind}"
        for branch in ("seg", "det")
        for level in range(4)
        for kind in ("weight", "bias")
    }
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if name in learning)


def test_batches_without_masks_have_no_seg_loss(model, pictures):
    output = model.train()(pictures["query"], with_seg=False)
    assert output.seg_maps == []
    MvfaLoss()(*output, None, LABELS).backward()
    assert all(parameter.grad is None for parameter in model.seg_adapters.parameters())
    assert all(parameter.grad.any() for parameter in model.det_adapters.parameters())


def test_layers_start_from_the_seed(tiny_config):
    one, same, other = (AprilGan(str(tiny_config), None, SIZE, seed=seed).model for seed in (0, 0, 1))
    for branch in ("seg_adapters", "det_adapters"):
        first, second, third = (
            torch.cat([p.flatten() for p in getattr(m, branch).parameters()]) for m in (one, same, other)
        )
        assert torch.equal(first, second)
        assert not torch.equal(first, third)


# ---------------------------------------------------------------------- in the engine


def test_few_shot_trains_the_layers_only(make, few_shot, engine):
    model, runner = make(), engine()
    before = {key: value.clone() for key, value in model.state_dict().items() if ".bank." not in key}
    runner.fit(model, datamodule=few_shot())
    after = model.state_dict()
    moved = {key for key, value in before.items() if not torch.equal(value.nan_to_num(), after[key].nan_to_num())}
    layers = {key for key in before if "adapters" in key}
    assert len(layers) == 16
    assert layers <= moved
    assert not any("backbone" in key for key in moved)
    with pytest.raises(RuntimeError, match=r"^This is no checkpoint of this version's Clip"):
        Clip.load_from_checkpoint(runner.best_model_path, visualizer=False)
    with pytest.raises(RuntimeError, match="fingerprint"):
        AprilGan.load_from_checkpoint(runner.best_model_path, pretrained=None, visualizer=False)


def test_data_without_masks_leave_the_seg_layers_as_they_are(make, few_shot, engine):
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items() if "adapters" in key}
    engine().fit(model, datamodule=few_shot("Chest"))
    after = model.state_dict()
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert moved == {key for key in before if "det_adapters" in key}
    assert (model.settings.map_branch, model.settings.image_score) == ("det", "det_mean")


def test_leave_one_out_has_no_bank_and_trains_with_each_class_name(make, categories, engine, monkeypatch):
    model, asked = make(), []
    encode = AprilGanModel.encode_states
    monkeypatch.setattr(AprilGanModel, "encode_states", lambda self, name: asked.append(name) or encode(self, name))
    data = BMADLeaveOneOut(categories, "Brain", ["Chest"], num_workers=0)
    engine().train(model, datamodule=data)
    assert set(asked) == {"Chest X-ray film", "Brain"}
    assert model.model.bank.seg.numel() == model.model.bank.det.numel() == 0
    assert model.settings.learning_rate == 1e-4
    torch.testing.assert_close(model.model.text_features, model.model.encode_states("Brain"))


@pytest.mark.parametrize(("given", "class_name"), [(None, "Brain"), ("head", "head")])
def test_class_name_is_that_of_the_data_unless_given(make, few_shot, engine, given, class_name):
    model = make(class_name=given)
    engine().test(model, datamodule=few_shot(), verbose=False)
    torch.testing.assert_close(model.model.text_features, model.model.encode_states(class_name))
