"""Bgad against its losses and likelihoods by hand, and in anomalib's engine."""

import logging
import math

import numpy as np
import pytest
import torch
from anomalib import LearningType
from anomalib.models.image.cflow.utils import positional_encoding_2d

from anomalib_mvfa import Bgad, BMADFewShot, BrainPhantom, FewShot
from anomalib_mvfa.baselines.bgad import NORMALIZER, BgadModel, boundary_loss, likelihood_loss
from anomalib_mvfa.compare.weights import Origin, build_model
from recipe import images, lesioned

SIZE = 64
SMALL = {"backbone": "resnet18", "layers": ["layer2", "layer3"], "pre_trained": False, "coupling_blocks": 2}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return BgadModel(**SMALL).eval()


@pytest.fixture
def make():
    small = {**SMALL, "image_size": SIZE, "warmup_epochs": 0, "fiber_batch_size": 512, "visualizer": False}
    return lambda **more: Bgad(**{**small, **more})


@pytest.fixture
def data(categories):
    """Build the few-shot datamodule of a category, all of whose views are one batch."""
    return lambda category="Brain", **more: BMADFewShot(
        categories, category, k_shot=1, train_batch_size=22, num_workers=0, **more
    )


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
    # A quarter of the normal positions, one, is below the boundary 2.
    value, loss = boundary_of([4.0, 2.0, 1.0, 3.0], [0.0, 1.5, 9.0])
    assert loss.item() == pytest.approx(((2 - 1) + (0.5 + 8) / 2) / NORMALIZER)
    loss.backward()
    assert value.grad.tolist() == pytest.approx([0, 0, -0.1, 0, 0, 0.05, 0.05])  # and the boundary stays where it is


@pytest.mark.parametrize("abnormal", [[0.9, -7.0], [1.0, 1.0]])
def test_boundary_loss_is_nothing_on_the_right_sides(abnormal):
    """Semi-push-pull: what is beyond the boundary is neither pulled nor pushed further."""
    value, loss = boundary_of([2.0, 2.0, 2.0, 30.0], abnormal)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    value, loss = boundary_of([2.0, 2.0, 2.0, 30.0], [1.5, *abnormal])
    assert loss.item() == pytest.approx(0.05)
    loss.backward()
    assert value.grad[:4].abs().max() == 0
    assert value.grad[5:].abs().max() == 0 < value.grad[4]


@pytest.mark.parametrize(("share", "boundary"), [(0, 1), (0.25, 2), (0.3, 2), (0.5, 3)])
def test_the_share_sets_the_boundary(share, boundary):
    _, loss = boundary_of([4.0, 2.0, 1.0, 3.0], [50.0], share, margin=0)
    pulled = [boundary - value for value in (1, 2, 3, 4) if value < boundary]
    expected = (np.mean(pulled) if pulled else 0) + 50 - boundary
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


@torch.no_grad()
def test_score_depends_on_no_other_image(model):
    image = images("query", 3, SIZE)
    together, alone = model(image), model(image[1:2])
    torch.testing.assert_close(together.pred_score[1:2], alone.pred_score)
    torch.testing.assert_close(together.anomaly_map[1:2], alone.anomaly_map)


def test_a_flow_fitted_on_normal_features_finds_shifted_ones_unlikely():
    torch.manual_seed(0)
    model = BgadModel(**{**SMALL, "layers": ["layer1"]})
    flow, width = model.flows[0], model.backbone.out_dims[0]
    rows, condition = torch.randn(256, width) + 2, torch.zeros(256, 128)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        likelihood_loss(model.log_likelihood(0, rows, condition), torch.zeros(256, dtype=torch.bool)).backward()
        optimizer.step()
    with torch.no_grad():
        new, shifted = torch.randn(64, width) + 2, torch.randn(64, width) + 4
        of_new, of_shifted = (model.log_likelihood(0, x, condition[:64]) for x in (new, shifted))
    assert of_new.min() > of_shifted.max()


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("fiber_batch_size", [10_000, 300])
def test_fit_and_test(make, data, engine, fiber_batch_size):
    model, runner = make(max_epochs=2, fiber_batch_size=fiber_batch_size), engine()
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    runner.fit(model, datamodule=data())
    positions = [22 * 8 * 8, 22 * 4 * 4]
    steps = sum(math.ceil(count / fiber_batch_size) for count in positions)
    assert (runner.trainer.max_epochs, runner.trainer.global_step) == (2, 2 * steps)
    after = model.model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    learning = {f"flows.{name}" for name, p in model.model.flows.named_parameters() if p.requires_grad}
    assert changed == learning | {"top"}
    assert not model.model.train().backbone.training

    figures = runner.test(model, datamodule=data(), verbose=False)[0]
    assert 0 <= figures["pixel_AUROC"] <= 1
    loaded = Bgad.load_from_checkpoint(runner.best_model_path, visualizer=False)
    again = engine().test(loaded, datamodule=data(), verbose=False)[0]
    assert again == pytest.approx(figures, abs=1e-6)
    assert model.learning_type == LearningType.ONE_CLASS


def test_top_is_the_highest_likelihood_of_normal_positions(make, data, engine):
    model = make(max_epochs=1, learning_rate=0.0, fiber_batch_size=30)  # the flows stay as they are
    source = data()
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


def test_the_boundary_counts_after_the_warm_up(make, data, engine):
    def flows(**more):
        model = make(max_epochs=2, **more)
        engine().fit(model, datamodule=data())
        return torch.cat([p.detach().flatten() for p in model.model.flows.parameters()])

    without = flows(boundary_weight=0.0)
    assert torch.equal(flows(warmup_epochs=2), without)
    assert not torch.equal(flows(warmup_epochs=1), without)
    assert not torch.equal(flows(warmup_epochs=1), flows(warmup_epochs=0))


def test_masks_teach_what_has_to_be_unlikely(make):
    """On the same images, positions of lesions are less likely with the boundary than without."""
    normal, (ill, mask) = images("normal", 8, SIZE), lesioned("normal", 8, SIZE)
    image, odd = torch.cat([normal, ill]), torch.cat([torch.zeros_like(mask), mask])

    def gap(weight):
        model = make().model
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


def test_a_seed_decides_everything(make, data, engine):
    def fitted(seed, noise):
        torch.manual_seed(noise)  # whatever was drawn before
        model = make(max_epochs=1, seed=seed)
        engine().fit(model, datamodule=data())
        return model.model.state_dict()

    one, same, other = fitted(3, 0), fitted(3, 1), fitted(4, 0)
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not torch.equal(one["top"], other["top"])


def test_learning_rate_falls_along_a_cosine(make, data, engine):
    model = make(max_epochs=4, learning_rate=1e-2, fiber_batch_size=10_000)
    rates = []
    step = model.training_step
    model.training_step = lambda *args: (rates.append(model.optimizers().param_groups[0]["lr"]), step(*args))[1]
    engine().fit(model, datamodule=data())
    assert rates == pytest.approx([1e-2 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)])


def test_exports(make, data, engine, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    openvino = pytest.importorskip("openvino")
    model, runner = make(max_epochs=1), engine()
    runner.fit(model, datamodule=data())
    image = images("films", 2, 80)
    with torch.no_grad():
        expected = model.eval()(image)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    loaded = torch.load(runner.export(model, "torch", export_root=tmp_path), weights_only=False)["model"].eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(image).anomaly_map, expected.anomaly_map)
    onnx = runner.export(model, "onnx", export_root=tmp_path)
    session = onnxruntime.InferenceSession(str(onnx))
    names = [output.name for output in session.get_outputs()]
    compiled = openvino.Core().compile_model(openvino.convert_model(onnx), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for found in (dict(zip(names, session.run(None, {"input": image.numpy()}), strict=True)), compiled(image.numpy())):
        for name in ("anomaly_map", "pred_score"):
            wanted = getattr(expected, name).numpy()
            np.testing.assert_allclose(np.asarray(found[name]).reshape(wanted.shape), wanted, atol=1e-4)


# ---------------------------------------------------------------------- weights and mistakes


def test_weights_of_a_comparison_reach_the_backbone(make, tmp_path):
    state = BgadModel(**{**SMALL, "layers": ["layer4"]}).backbone.feature_extractor.state_dict()
    state = {name: torch.full_like(value, 0.5) for name, value in state.items()}
    torch.save(state, tmp_path / "resnet18.pth")
    spec = {"class_path": "Bgad", "init_args": {**SMALL, "pre_trained": True}}
    built, origin = build_model(spec, str(tmp_path / "resnet18.pth"), visualizer=False)
    assert origin == Origin("resnet18.pth")
    assert torch.equal(built.model.backbone.feature_extractor.state_dict()["conv1.weight"], state["conv1.weight"])
    assert build_model(spec, None, visualizer=False)[1].is_random


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["layer2", "layer7"]}, r"layers=\['layer2', 'layer7'\] are not all layers of resnet18, which has "),
        ({"condition_vector": 30}, r"condition_vector=30 must be a multiple of 4"),
        ({"boundary_share": 0.6}, r"boundary_share=0.6 must be between 0 and 0.5\."),
        ({"margin": -0.1}, r"margin=-0.1 must be at least 0\."),
        ({"fiber_batch_size": 0}, r"fiber_batch_size=0 must be at least 1\."),
        ({"warmup_epochs": -1}, r"warmup_epochs=-1 must be at least 0\."),
    ],
)
def test_mistakes(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_data_without_masks_are_refused_with_a_way_out(make, data, engine):
    message = (
        r"learns abnormal positions from masks, and the data of Chest X-ray film have none\. Choose .* Brain, Liver"
    )
    with pytest.raises(ValueError, match=message):
        engine().fit(make(), datamodule=data("Chest"))


def test_batches_without_masks_are_refused_too(make, data, engine):
    source = data("Chest")
    source.setup()
    with pytest.raises(ValueError, match="learns abnormal positions from masks"):
        engine().fit(make(max_epochs=1), train_dataloaders=source.train_dataloader())


@pytest.mark.parametrize("category", ["Brain", "Chest"])
def test_normal_images_alone_teach_less_and_say_so(make, categories, engine, caplog, category):
    data = BMADFewShot(categories, category, k_shot=2, abnormal_shots=0, num_workers=0)
    with caplog.at_level(logging.WARNING, logger="anomalib.mvfa"):
        model = make(max_epochs=1)
        engine().fit(model, datamodule=data)
    assert "learns the likelihood of normal features alone, and no boundary" in caplog.text
    assert model.model.top.isfinite().all()


def test_other_data_with_masks(make, engine, tmp_path):
    source = BrainPhantom(tmp_path / "phantom", size=32, num_workers=0)
    data = FewShot(source, k_shot=1, train_batch_size=22, num_workers=0)
    figures = engine().train(make(max_epochs=1), datamodule=data)[0]
    assert "pixel_AUROC" in figures
