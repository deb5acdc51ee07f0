"""Bgad against its losses and likelihoods by hand, and in anomalib's engine."""

import logging
import math

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.models.image.cflow.utils import positional_encoding_2d
from torch import nn
from torch.nn.functional import pixel_unshuffle
from torch.utils.data import DataLoader

from anomalib_mvfa import Bgad
from anomalib_mvfa.baselines.base import drawn_from, timm_features
from anomalib_mvfa.baselines.bgad import NORMALIZER, BgadModel, boundary_loss, likelihood_loss
from recipe import images, lesioned

SIZE = 64
LAYERS = ["layer1", "layer2"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    features = timm_features("test_resnet", LAYERS, pre_trained=False)
    return BgadModel(features, condition_vector=128, coupling_blocks=2, clamp_alpha=1.9).eval()


@pytest.fixture
def make():
    network = {"backbone": "test_resnet", "layers": LAYERS, "pre_trained": False, "coupling_blocks": 1}
    small = {**network, "image_size": SIZE, "warmup_epochs": 0, "fiber_batch_size": 1024, "visualizer": False}
    return lambda **more: Bgad(**{**small, **more})


# ---------------------------------------------------------------------- losses


def test_likelihood_loss_by_hand():
    value = torch.tensor([0.0, 2.0, -50.0], requires_grad=True)
    loss = likelihood_loss(value, torch.tensor([False, False, True]))
    assert loss.item() == pytest.approx((math.log(2) + math.log(1 + math.exp(-2))) / 2)
    loss.backward()
    assert value.grad[2] == 0 > value.grad[0]  # abnormal positions do not count
    assert likelihood_loss(value, torch.ones(3, dtype=torch.bool)).item() == 0


def boundary_of(normal, abnormal, share=0.25, margin=0.1):
    value = torch.tensor([*normal, *abnormal], requires_grad=True)
    kind = torch.tensor([False] * len(normal) + [True] * len(abnormal))
    return value, boundary_loss(value, kind, share, margin)


def test_boundary_loss_by_hand():
    # A quarter of the normal positions, one, is below the boundary 2, which counts too.
    value, loss = boundary_of([4.0, 2.0, 1.0, 3.0], [0.0, 1.5, 9.0])
    assert loss.item() == pytest.approx(((2 - 1) / 2 + (0.5 + 8) / 2) / NORMALIZER)
    loss.backward()
    assert value.grad.tolist() == pytest.approx([0, -0.05, -0.05, 0, 0, 0.05, 0.05])


def test_boundary_loss_is_nothing_on_the_right_sides():
    """Semi-push-pull: what is beyond the boundary is neither pulled nor pushed further."""
    abnormal = [0.9, 0.99, -7.0]
    value, loss = boundary_of([2.0, 3.0, 4.0, 30.0], abnormal, share=0)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    value, loss = boundary_of([2.0, 3.0, 4.0, 30.0], [1.5, *abnormal], share=0)
    assert loss.item() == pytest.approx(0.05)
    loss.backward()
    assert value.grad[1:4].abs().max() == 0
    assert value.grad[5:].abs().max() == 0 < value.grad[4]


@pytest.mark.parametrize(("share", "expected"), [(0, 50 - 1), (0.3, 1 / 2 + 50 - 2), (0.5, 3 / 3 + 50 - 3)])
def test_the_share_sets_the_boundary(share, expected):
    _, loss = boundary_of([4.0, 2.0, 1.0, 3.0], [50.0], share, margin=0)
    assert loss.item() == pytest.approx(expected / NORMALIZER)


# ---------------------------------------------------------------------- likelihoods and scores


def test_likelihood_is_a_density_by_the_flow(model):
    """By the change of variables: the density of the latent, times the volume that the flow makes of a unit one."""
    width = model.backbone.out_dims[0]
    row = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    condition = torch.randn(1, 128, generator=torch.Generator().manual_seed(1))
    latent = model.flows[0](row, [condition])[0]
    jacobian = torch.autograd.functional.jacobian(lambda x: model.flows[0](x, [condition])[0], row)
    density = torch.distributions.Normal(0, 1).log_prob(latent).sum() + torch.linalg.slogdet(jacobian[0, :, 0])[1]
    found = model.log_likelihood(0, row, condition)
    assert found.item() == pytest.approx(density.item() / width, abs=1e-4)


def test_likelihood_is_as_exact_in_mixed_precision(model):
    rows, condition = model.positions(model.features(images("query", 1, SIZE))[0])
    expected = model.log_likelihood(0, rows, condition)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.log_likelihood(0, rows, condition), expected)


def test_positions_keep_their_place(model):
    features = torch.arange(2 * 5 * 2 * 3.0).reshape(2, 5, 2, 3)
    rows, condition = model.positions(features)
    encoding = positional_encoding_2d(128, 2, 3)
    for number, (image, y, x) in enumerate(np.ndindex(2, 2, 3)):
        assert torch.equal(rows[number], features[image, :, y, x])
        assert torch.equal(condition[number], encoding[:, y, x])


@torch.no_grad()
def test_map_and_score_by_hand(model):
    image = images("query", 2, SIZE)
    model.top.copy_(torch.tensor([0.5, -0.25]))
    expected = 0
    for level, x in enumerate(model.features(image)):
        value = model.log_likelihood(level, *model.positions(x)).reshape(2, *x.shape[-2:])
        likelihood = (value - model.top[level]).exp()
        expected = expected + torch.nn.functional.interpolate(
            1 - likelihood[:, None], (SIZE, SIZE), mode="bilinear", align_corners=True
        )
    found = model(image)
    torch.testing.assert_close(found.anomaly_map, expected[:, 0])
    assert torch.equal(found.pred_score, found.anomaly_map.flatten(1).max(dim=1).values)


# ---------------------------------------------------------------------- training


# Of the authors' `train_meta_epoch` (xcyao00/BGAD at commit 2806d37), run as it is over three meta epochs of eight
# epochs with the settings of its config.py, and of its `conditional_flow_model` with 2 blocks and 16 encodings by
# NumPy's and torch's seed 0: the first level's loss in every epoch, learning rates, and both levels' log-likelihoods at
# every 37th position. Gradients were zeroed as torch did before 2.0; positions came in our order.
LOSSES = [
    *(1.35841, 1.358249, 1.357733, 1.357262, 1.357395, 1.357573, 1.357057, 1.356695),
    *(1.445987, 1.444279, 1.445405, 1.445767, 1.443252, 1.442797, 1.440407, 1.442131),
    *(1.439501, 1.438856, 1.438347, 1.438535, 1.437058, 1.434138, 1.435543, 1.434512),
]
RATES = [2e-5, 3.105384e-05, 1.858076e-4, 1.968615e-4, 1.968615e-4]  # of epochs 0, 1, 15, 16 and 23
LIKELIHOODS = [
    [-1.120063, -0.9656456, -1.032196, -1.042537, -1.055986, -1.050164, -1.022121],
    [-1.122279, -0.9601572, -1.039324, -1.007699, -1.05563, -1.049364, -1.0163],
]


class Patches(nn.Module):
    """A backbone of two levels: patches of 4 x 4 pixels, in colour and in grey."""

    out_dims = (48, 16)

    def forward(self, image):
        return [pixel_unshuffle(image, 4), pixel_unshuffle(image.mean(1, keepdim=True), 4)]


def test_training_is_that_of_the_authors(engine, monkeypatch):
    model, losses, rates = Bgad("test_resnet", LAYERS, False, SIZE, visualizer=False), [], []
    with drawn_from(0):
        model.model = BgadModel(Patches(), condition_vector=16, coupling_blocks=2, clamp_alpha=1.9)
    monkeypatch.setattr(BgadModel, "features", lambda self, image: self.backbone(image))
    take_step = model._take_step

    def watch(level, *arguments):
        rates.append(model.optimizers().param_groups[0]["lr"])
        losses.append(take_step(level, *arguments))
        return losses[-1]

    monkeypatch.setattr(model, "_take_step", watch)
    abnormal, lesions = lesioned("bgad/abnormal", 8, SIZE)
    pictures = [*images("bgad/normal", 20, SIZE), *abnormal]
    masks = [*torch.zeros(20, SIZE, SIZE), *lesions]
    data = [
        ImageItem(image=image, gt_mask=mask.bool(), gt_label=torch.tensor(row >= 20))
        for row, (image, mask) in enumerate(zip(pictures, masks, strict=True))
    ]
    loader = DataLoader(data, batch_size=28, collate_fn=ImageBatch.collate)
    engine(max_epochs=-1, max_steps=48).fit(model, train_dataloaders=loader)
    assert losses[::2] == pytest.approx(LOSSES, abs=2e-6)
    assert [rates[2 * epoch] for epoch in (0, 1, 15, 16, 23)] == pytest.approx(RATES, rel=1e-6)
    with torch.no_grad():
        for level, x in enumerate(Patches()(images("bgad/query", 1, SIZE))):
            value = model.model.log_likelihood(level, *model.model.positions(x))[::37]
            assert value.tolist() == pytest.approx(LIKELIHOODS[level], abs=1e-5)


def test_the_flows_learn_by_steps_of_positions(make, few_shot, engine):
    model, runner = make(max_epochs=2, fiber_batch_size=300, learning_rate=1e-2), engine()
    before, rates = {name: value.clone() for name, value in model.model.state_dict().items()}, []
    step = model.training_step
    model.training_step = lambda *args: (step(*args), rates.append(model.optimizers().param_groups[0]["lr"]))[0]
    runner.fit(model, datamodule=few_shot())
    steps = 22 * 16 * 16 // 300 + 22 * 8 * 8 // 300  # what is left over is left out
    assert (runner.trainer.max_epochs, runner.trainer.global_step) == (2, 2 * steps)
    cosine = (1 + math.cos(math.pi * 12 / 25)) / 2  # of the middle of 25 parts
    assert rates == pytest.approx([1e-3, 1e-2 * (1e-3 + 0.999 * cosine)])
    after = model.model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    learning = {f"flows.{name}" for name, p in model.model.flows.named_parameters() if p.requires_grad}
    assert changed == learning | {"top"}


def test_top_is_the_highest_likelihood_of_normal_positions(make, few_shot, engine):
    model = make(max_epochs=1, learning_rate=0.0, fiber_batch_size=22 * 64)  # the flows stay as they are
    source = few_shot()
    runner = engine()
    runner.fit(model, datamodule=source)
    batch = source.support.collate_fn([source.support[row] for row in range(22)])
    image, mask = model.pre_processor.transform(batch.image), batch.gt_mask.float()
    with torch.no_grad():
        for level, x in enumerate(model.model.features(image)):
            value = model.model.log_likelihood(level, *model.model.positions(x))
            side = 64 // x.shape[-1]
            normal = value[mask[:, ::side, ::side].flatten() == 0]  # the nearest pixel, as torch has it
            assert len(normal) < len(value)
            assert model.model.top[level].item() == pytest.approx(normal.max().item(), abs=1e-5)


def test_the_boundary_counts_after_the_warm_up(make, few_shot, engine, caplog):
    def flows(**more):
        model = make(max_epochs=2, **more)
        engine().fit(model, datamodule=few_shot())
        return torch.cat([p.detach().flatten() for p in model.model.flows.parameters()])

    assert torch.equal(flows(warmup_epochs=2), flows(warmup_epochs=2, boundary_weight=0.0))
    assert "warmup_epochs=2 leave none of 2 epochs to learn from masks" in caplog.text
    caplog.clear()
    assert not torch.equal(flows(warmup_epochs=1), flows(warmup_epochs=1, boundary_weight=0.0))
    assert "warmup_epochs" not in caplog.text


def test_masks_teach_what_has_to_be_unlikely(make):
    """On the same images, positions of lesions are less likely with the boundary than without."""
    normal, (ill, mask) = images("normal", 8, SIZE), lesioned("normal", 8, SIZE)
    image, odd = torch.cat([normal, ill]), torch.cat([torch.zeros_like(mask), mask])

    def gap(weight):
        model = make(backbone="resnet18", layers=["layer2", "layer3"], coupling_blocks=2).model
        (rows, condition), *_ = [model.positions(x) for x in model.features(image)]
        abnormal = torch.nn.functional.interpolate(odd[:, None], (8, 8)).flatten() > 0
        optimizer = torch.optim.Adam(model.flows.parameters(), lr=5e-3)
        for _ in range(40):
            value = model.log_likelihood(0, rows, condition)
            loss = likelihood_loss(value, abnormal) + weight * boundary_loss(value, abnormal, 0.05, 0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (value[~abnormal].mean() - value[abnormal].mean()).item()

    assert gap(1.0) > gap(0.0) + 0.5


def test_data_without_masks_are_refused_with_options(make, few_shot, engine):
    message = (
        r"learns abnormal positions from masks, and the data of Chest X-ray film have none\. Choose .* Brain, Liver"
    )
    with pytest.raises(ValueError, match=message):
        engine().fit(make(), datamodule=few_shot("Chest"))


def test_normal_images_alone_teach_less_and_say_so(make, few_shot, engine, caplog):
    with caplog.at_level(logging.WARNING, logger="anomalib.mvfa"):
        model = make(max_epochs=1)
        engine().fit(model, datamodule=few_shot("Chest", abnormal_shots=0))
    assert "hold no abnormal image: BGAD learns no boundary" in caplog.text
    assert model.model.top.isfinite().all()


def test_layers_that_the_backbone_does_not_have(make):
    message = r"layers=\['layer2', 'layer7'\] are not all layers of test_resnet, which has "
    with pytest.raises(ValueError, match=message):
        make(layers=["layer2", "layer7"])
