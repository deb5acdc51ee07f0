"""Dra against its losses and scores by hand, and in anomalib's engine."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import recipe
from anomalib_mvfa import BrainPhantom, Dra
from anomalib_mvfa.baselines.base import timm_features
from anomalib_mvfa.baselines.dra import AREA, NORMAL, PSEUDO, SEEN, DraModel, cut_mix, deviation_loss, top_mean, turned
from recipe import images, lesioned

SIZE = 128


def new_model():
    return DraModel(timm_features("test_resnet", [-1], pre_trained=False, requires_grad=True), top_share=0.1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = new_model().eval()
    model.set_references(images("reference", 3, SIZE))
    return model


@pytest.fixture
def make():
    small = {"backbone": "test_resnet", "pre_trained": False, "image_size": SIZE, "visualizer": False}
    return lambda **more: Dra(**{**small, **more})


# ---------------------------------------------------------------------- losses and scores


def test_deviation_loss_is_a_mean_over_what_counts():
    score = torch.tensor([-1.0, 0.0, 1.0, 5.0, 9.0, 40.0], requires_grad=True)
    abnormal, counted = torch.tensor([0, 0, 1, 1, 1, 0]) == 1, torch.tensor([1, 1, 1, 1, 1, 0]) == 1
    loss = deviation_loss(score, abnormal, counted)
    assert loss.item() == pytest.approx((1 + 0 + 4 + 0 + 0) / 5)
    loss.backward()
    assert score.grad[[0, 2, 4, 5]].tolist() == pytest.approx([-1 / 5, -1 / 5, 0, 0])
    none = deviation_loss(score, abnormal, torch.zeros(6, dtype=torch.bool))
    assert none.item() == 0
    none.backward()  # without scores to learn from, a gradient of 0 and not of nan
    assert score.grad.isfinite().all()


def test_each_head_learns_from_its_own_images(model, monkeypatch):
    """The table of the paper: which kinds a head sees, which are to be high, and what they are compared with."""
    image, reference, compared = images("batch", 4, SIZE), images("reference", 2, SIZE), []
    kind = torch.tensor([NORMAL, NORMAL, SEEN, PSEUDO])
    scores = [torch.tensor(row) for row in ([4.0, 6, 1, 2], [1.0, 2, 4, 99], [1.0, 2, 99, 3], [0.5, 0.5, 2, 3])]
    monkeypatch.setattr(model, "features", lambda pixels: [pixels, 2 * pixels])
    monkeypatch.setattr(model, "head_scores", lambda *features: compared.extend(features) or scores)
    monkeypatch.setattr(model, "image_score", lambda score: score)
    of_heads = [
        (1 + 0 + 1 + 2) / 4,  # normal ones beyond the margin, the others near 0
        (1 + 2 + 1) / 3,
        (1 + 2 + 2) / 3,
        (0.5 + 0.5 + 3 + 2) / 4,
    ]
    assert model.loss(image, kind, reference).item() == pytest.approx(sum(of_heads))
    mean = (reference[0] + reference[1]) / 2
    torch.testing.assert_close(compared, [[image, 2 * image], [mean, 2 * mean]])


def test_top_mean():
    patches = torch.tensor([[[1.0, 4.0], [3.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]])
    for share, expected in ((0.5, 3.5), (0.25, 4), (0.01, 4), (1, 2.5)):
        assert top_mean(patches, share).tolist() == [expected, 0]


@torch.no_grad()
def test_heads_by_hand(model):
    def positions(layer, x):
        return (torch.einsum("d,bdhw->bhw", layer.weight[0, :, 0, 0], x) + layer.bias).abs()

    features, reference = (torch.rand(2, 96, 3, 2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    normality, seen, pseudo, residual = model.head_scores([features], [reference[0]])
    first, last = model.normality_head[0], model.normality_head[2]
    hidden = (features.mean(dim=(2, 3)) @ first.weight.T + first.bias).clamp(min=0)
    torch.testing.assert_close(normality, (hidden @ last.weight.T + last.bias)[:, 0].abs())
    torch.testing.assert_close(seen, [positions(model.seen_head[0], features)])
    torch.testing.assert_close(pseudo, [positions(model.pseudo_head[0], features)])
    look, norm, _, last = model.residual_head
    looked = nn.functional.conv2d(reference[0] - features, look.weight, look.bias, padding=1)
    looked = (looked / (1 + norm.eps) ** 0.5).clamp(min=0)  # batch norm as it begins
    torch.testing.assert_close(residual, [positions(last, looked)])


@torch.no_grad()
def test_score_and_map_by_hand(model):
    image = images("query", 2, SIZE)
    normality, *heads = model.head_scores(model.features(image), [model.reference_0, model.reference_1])
    assert [tuple(patches.shape) for patches in heads[0]] == [(2, 4, 4), (2, 2, 2)]
    expected, maps = -normality, 0
    for head in heads:
        for patches in head:  # of 16 positions a tenth is one, and so of 4
            expected = expected + patches.flatten(1).max(dim=1).values / 2
            maps = maps + nn.functional.interpolate(patches[:, None], (SIZE, SIZE), mode="bilinear")[:, 0] / 2
    found = model(image)
    torch.testing.assert_close(found.pred_score, expected)
    torch.testing.assert_close(found.anomaly_map, maps)


@torch.no_grad()
def test_scales_are_the_image_and_every_second_pixel(model):
    image = images("query", 2, SIZE)
    torch.testing.assert_close(model.features(image)[1], model.features(image[..., ::2, ::2])[0])


@torch.no_grad()
def test_references_are_mean_features(model):
    features = [model.features(image[None]) for image in images("reference", 3, SIZE)]
    for found, scale in zip((model.reference_0, model.reference_1), zip(*features, strict=True), strict=True):
        torch.testing.assert_close(found, torch.cat(scale).mean(dim=0), atol=1e-5, rtol=1e-4)


def test_pseudo_anomalies():
    image = images("normal", 3, 40)
    for seed in range(20):
        pasted = cut_mix(image, np.random.default_rng(seed))
        for row in range(3):
            changed = (pasted[row] != image[row]).any(dim=0).nonzero()
            (top, left), (bottom, right) = changed.min(dim=0).values, changed.max(dim=0).values + 1
            patch = pasted[row, :, top:bottom, left:right]
            assert 0.5 * AREA[0] <= patch[0].numel() / 40**2 <= 1.3 * AREA[1]
            windows = image[row].unfold(1, patch.shape[1], 1).unfold(2, patch.shape[2], 1)
            # It is cut out of the image itself, and its colours are other ones.
            distance = (windows - patch[:, None, None]).abs().mean(dim=(0, 3, 4)).min()
            assert 0 < distance < 0.15
    again, other = (cut_mix(image, np.random.default_rng(seed)) for seed in (19, 20))
    assert torch.equal(again, pasted)
    assert not torch.equal(other, pasted)
    assert cut_mix(torch.zeros(0, 3, 8, 8), np.random.default_rng(0)).shape == (0, 3, 8, 8)


def test_turned():
    image = torch.ones(40, 3, 9, 9)
    found = turned(image, np.random.default_rng(0))
    assert (found[:, :, 4, 4] == 1).all()
    corner = found[:, 0, 0, 0]
    assert 0 < corner.sum() < 40  # black where there was nothing, at most angles
    assert not torch.equal(found[0], found[1])


# Of the authors' model and `Trainer.training` (Choubo/DRA at commit 3fb0e9c, on the CPU), with the recipe's weights and
# the prior at its own mean and deviation: losses and gradient norms of four steps, and scores after them.
LOSSES, NORMS = [8.37179, 9.264736, 3.998088, 4.212612], [131.4922, 72.42133, 77.20151, 50.79946]
SCORES = [24.94036, 33.92314, 92.22951, 97.29082, 100.6772, 90.88878]
RATES = {0: 2e-4, 8: 2e-4, 9: 2e-5, 18: 2e-5, 19: 2e-6, 28: 2e-6, 29: 2e-7}  # by epoch, of 30


def test_figures_of_the_authors():
    model = Dra("resnet18", False, SIZE, visualizer=False)
    torch_model = model.model.train()
    for number, (name, parameter) in enumerate(torch_model.backbone.feature_extractor.named_parameters()):
        value = recipe.weight(f"dra/{number}", tuple(parameter.shape))
        bias = name.endswith("bias")
        parameter.data.copy_(value * 2**0.5 if parameter.ndim == 4 else 0.02 * value if bias else 1 + 0.1 * value)
    heads = {
        "holistic.fc1": torch_model.normality_head[0],
        "holistic.fc2": torch_model.normality_head[2],
        "seen.scoring": torch_model.seen_head[0],
        "pseudo.scoring": torch_model.pseudo_head[0],
        "composite.scoring": torch_model.residual_head[3],
        "composite.conv.0": torch_model.residual_head[0],
        "composite.conv.1": torch_model.residual_head[1],
    }
    for name, layer in heads.items():
        for key, parameter in layer.named_parameters():
            value = recipe.weight(f"dra/{name}.{key}", tuple(parameter.shape))
            parameter.data.copy_(1 + 0.1 * value if (name, key) == ("composite.conv.1", "weight") else value)
    reference = images("dra/reference", 2, SIZE)
    image = [images("dra/normal", 2, SIZE), lesioned("dra/seen", 2, SIZE)[0], lesioned("dra/pseudo", 2, SIZE)[0]]
    kind = torch.tensor([NORMAL] * 2 + [SEEN] * 2 + [PSEUDO] * 2)
    model._trainer = SimpleNamespace(max_epochs=30)
    (optimizer,), (schedule,) = model.configure_optimizers()
    losses, norms = [], []
    for _ in LOSSES:
        loss = torch_model.loss(torch.cat(image), kind, reference)
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.get_total_norm([p.grad for p in torch_model.parameters()]).item())
        model.configure_gradient_clipping(optimizer)
        optimizer.step()
        losses.append(loss.item())
    assert losses[:2] == pytest.approx(LOSSES[:2], rel=1e-3)
    assert (losses, norms) == (pytest.approx(LOSSES, rel=1e-2), pytest.approx(NORMS, rel=1e-2))
    torch_model.set_references(reference)
    with torch.no_grad():
        assert torch_model.eval()(torch.cat(image)).pred_score.tolist() == pytest.approx(SCORES, rel=1e-2)
    assert {epoch: 2e-4 * schedule.lr_lambdas[0](epoch) for epoch in RATES} == pytest.approx(RATES)


# ---------------------------------------------------------------------- training


def test_a_lesion_stands_out_after_training():
    torch.manual_seed(0)
    model = new_model().train()
    normal, (ill, _) = images("normal", 6, SIZE), lesioned("normal", 6, SIZE)
    image, kind = torch.cat([normal, ill]), torch.tensor([NORMAL] * 6 + [SEEN] * 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(model.loss(image, kind, normal[:2]))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    model.set_references(normal[:2])
    assert model.training
    with torch.no_grad():
        score = model.eval()(image).pred_score
    assert score[:6].max() < score[6:].min()


def test_everything_learns_and_normal_images_are_the_references(make, few_shot, engine):
    model, runner, data = (
        make(max_epochs=3, learning_rate=1e-2),
        engine(limit_train_batches=1),
        few_shot("Chest", k_shot=2),
    )
    before = {name: value.clone() for name, value in model.model.named_parameters()}
    kept, rates = [], []
    set_references = model.model.set_references
    model.model.set_references = lambda image: (kept.append(image), set_references(image))
    model.on_train_epoch_start = lambda: rates.append(model.optimizers().param_groups[0]["lr"])
    runner.fit(model, datamodule=data)
    assert (runner.trainer.max_epochs, runner.trainer.global_step) == (3, 3)
    assert rates == pytest.approx([1e-2, 1e-3, 1e-4])  # falls by thirds
    after = dict(model.model.named_parameters())
    assert not [name for name, value in before.items() if torch.equal(value, after[name])]  # the backbone too
    items = [data.support[row] for row in range(4)]
    expected = torch.stack([model.pre_processor.transform(item.image) for item in items if not item.gt_label])
    assert all(torch.equal(image, expected) for image in kept)
    assert len(model._reference_images) == 0  # images do not outlive the fit
    fresh = new_model().eval()
    fresh.load_state_dict(model.model.state_dict())
    fresh.set_references(expected)
    torch.testing.assert_close(fresh.reference_0, model.model.reference_0)


def test_training_by_steps_on_batches_of_one_kind_can_score_too(make, few_shot, engine):
    data = few_shot("Chest", train_batch_size=1)
    model, runner = make(), engine(max_epochs=-1, max_steps=3)
    runner.fit(model, datamodule=data)
    assert runner.trainer.global_step == 3
    assert all(value.isfinite().all() for value in model.model.state_dict().values())
    assert "image_AUROC" in runner.test(model, datamodule=data, verbose=False)[0]


def test_normal_images_alone_teach_less_and_say_so(make, engine, tmp_path, caplog):
    data = BrainPhantom(tmp_path / "phantom", size=32, num_workers=0)
    with caplog.at_level(logging.WARNING, logger="anomalib.mvfa"):
        engine().fit(make(max_epochs=1), datamodule=data)
    assert "hold no abnormal image: DRA's head of seen anomalies learns nothing" in caplog.text


def test_a_model_without_references_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"no reference features yet\. Fit it"):
        new_model()(torch.zeros(1, 3, SIZE, SIZE))


def test_data_without_normal_images_are_refused(make, few_shot, engine):
    source = few_shot()
    source.setup()
    source.train_data.samples = source.train_data.samples[source.train_data.samples.label_index == 1]
    source.setup = lambda stage=None: None
    with pytest.raises(ValueError, match="Dra needs normal training images"):
        engine().fit(make(), datamodule=source)
