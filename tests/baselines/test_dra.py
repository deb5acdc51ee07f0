"""Dra against its losses and scores by hand, and in anomalib's engine."""

import logging

import numpy as np
import pytest
import torch
from anomalib import LearningType
from torch import nn

from anomalib_mvfa import BMADFewShot, BrainPhantom, Dra
from anomalib_mvfa.baselines import trained
from anomalib_mvfa.baselines.dra import (
    AREA,
    MARGIN,
    NORMAL,
    PSEUDO,
    SEEN,
    DraModel,
    HeadScores,
    NormalityHead,
    PatchHead,
    cut_mix,
    deviation_loss,
    top_mean,
)
from anomalib_mvfa.compare.weights import Origin, build_model
from recipe import images, lesioned

SIZE = 128


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = DraModel(pre_trained=False).eval()
    model.memorise(images("reference", 3, SIZE))
    return model


@pytest.fixture
def make():
    return lambda **more: Dra(**{"pre_trained": False, "image_size": SIZE, "visualizer": False, **more})


@pytest.fixture
def data(categories):
    """Build the few-shot datamodule of a category, all of whose views are one batch."""
    return lambda category="Brain", **more: BMADFewShot(
        categories, category, k_shot=1, train_batch_size=22, num_workers=0, **more
    )


# ---------------------------------------------------------------------- losses and scores


@pytest.mark.parametrize(
    ("score", "abnormal", "loss"),
    [(0.0, False, 0), (-2.0, False, 2), (3.0, False, 3), (MARGIN, True, 0), (9.0, True, 0), (1.5, True, 3.5)],
)
def test_deviation_loss_of_one_score(score, abnormal, loss):
    always = torch.tensor([True])
    assert deviation_loss(torch.tensor([score]), torch.tensor([abnormal]), always).item() == loss


def test_deviation_loss_is_a_mean_over_what_counts():
    score = torch.tensor([1.0, 2.0, 3.0, 40.0], requires_grad=True)
    abnormal, counted = torch.tensor([False, True, True, False]), torch.tensor([True, True, True, False])
    loss = deviation_loss(score, abnormal, counted)
    assert loss.item() == pytest.approx((1 + 3 + 2) / 3)
    loss.backward()
    assert score.grad.tolist() == pytest.approx([1 / 3, -1 / 3, -1 / 3, 0])
    none = deviation_loss(score, abnormal, torch.zeros(4, dtype=torch.bool))
    assert none.item() == 0
    none.backward()  # without scores to learn from, a gradient of 0 and not of nan
    assert score.grad.isfinite().all()


def test_each_head_learns_from_its_own_images(model, monkeypatch):
    """The table of the paper: which kinds a head sees, and which of them are to be high."""
    kind = torch.tensor([NORMAL, NORMAL, SEEN, PSEUDO])
    scores = [torch.tensor(row) for row in ([4.0, 6, 1, 2], [1.0, 2, 4, 99], [1.0, 2, 99, 3], [0.5, 0.5, 2, 3])]
    monkeypatch.setattr(model, "features", lambda image: [torch.zeros(len(image), 512, 4, 4)] * 2)
    monkeypatch.setattr(model, "image_scores", lambda heads: scores)
    of_heads = [
        (1 + 0 + 1 + 2) / 4,  # normal ones beyond the margin, the others near 0
        (1 + 2 + 1) / 3,
        (1 + 2 + 2) / 3,
        (0.5 + 0.5 + 3 + 2) / 4,
    ]
    found = model.loss(torch.zeros(4, 3, SIZE, SIZE), kind, torch.zeros(2, 3, SIZE, SIZE))
    assert found.item() == pytest.approx(sum(of_heads))


def test_a_batch_is_compared_with_its_references(model, monkeypatch):
    image, reference = images("batch", 3, SIZE), images("reference", 2, SIZE)
    monkeypatch.setattr(model, "features", lambda pixels: [pixels, 2 * pixels])
    monkeypatch.setattr(model, "image_scores", lambda heads: [torch.zeros(3)] * 4)
    compared = []
    monkeypatch.setattr(model, "head_scores", lambda *features: compared.extend(features))
    model.loss(image, torch.tensor([NORMAL, SEEN, PSEUDO]), reference)
    (x, doubled), (mean, mean_doubled) = compared
    assert torch.equal(x, image)
    assert torch.equal(doubled, 2 * image)
    torch.testing.assert_close(mean, (reference[0] + reference[1]) / 2)
    torch.testing.assert_close(mean_doubled, reference[0] + reference[1])


@pytest.mark.parametrize(("share", "expected"), [(0.5, 3.5), (0.25, 4), (0.01, 4), (1, 2.5)])
def test_top_mean(share, expected):
    patches = torch.tensor([[[1.0, 4.0], [3.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert top_mean(patches, share).tolist() == [expected, 0]


@torch.no_grad()
def test_heads_by_hand():
    features = torch.randn(2, 6, 3, 2, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    normality, patch, residual = NormalityHead(6), PatchHead(6), PatchHead(6, is_residual=True).eval()
    first, last = normality.layers[0], normality.layers[2]
    hidden = (features.mean(dim=(2, 3)) @ first.weight.T + first.bias).clamp(min=0)
    torch.testing.assert_close(normality(features), (hidden @ last.weight.T + last.bias)[:, 0].abs())
    weight, bias = patch[0].weight[0, :, 0, 0], patch[0].bias
    torch.testing.assert_close(patch(features), (torch.einsum("d,bdhw->bhw", weight, features) + bias).abs())
    looked = nn.functional.conv2d(features, residual[0].weight, residual[0].bias, padding=1)
    looked = (looked / (1 + residual[1].eps) ** 0.5).clamp(min=0)  # batch norm as it begins
    weight, bias = residual[3].weight[0, :, 0, 0], residual[3].bias
    torch.testing.assert_close(residual(features), (torch.einsum("d,bdhw->bhw", weight, looked) + bias).abs())


@torch.no_grad()
def test_score_and_map_by_hand(model):
    image = images("query", 2, SIZE)
    heads = model.head_scores(model.features(image), [model.reference_0, model.reference_1])
    assert [tuple(patches.shape) for patches in heads.seen] == [(2, 4, 4), (2, 2, 2)]
    expected, maps = -heads.normality, 0
    for head in (heads.seen, heads.pseudo, heads.residual):
        for patches in head:  # of 16 positions a tenth is one, and so of 4
            expected = expected + patches.flatten(1).max(dim=1).values / 2
            maps = maps + nn.functional.interpolate(patches[:, None], (SIZE, SIZE), mode="bilinear")[:, 0] / 2
    found = model(image)
    torch.testing.assert_close(found.pred_score, expected)
    torch.testing.assert_close(found.anomaly_map, maps)


@torch.no_grad()
def test_scales_are_the_image_and_the_mean_of_each_four_pixels(model):
    image = images("query", 2, SIZE)
    blocks = image.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).mean(dim=(-1, -3))
    torch.testing.assert_close(model.features(image)[1], model.features(blocks)[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_residual_head_sees_nothing_in_the_reference_itself(model):
    reference = images("reference", 3, SIZE)
    of_one = DraModel(pre_trained=False).eval()
    of_one.memorise(reference[:1])
    seen = []
    of_one.residual_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    of_one(reference[:2])
    for difference in seen:
        assert difference[0].abs().max() < 1e-5 < difference[1].abs().max()
    mean = torch.stack([model.features(image[None])[0][0] for image in reference]).mean(dim=0)
    torch.testing.assert_close(model.reference_0, mean, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_score_depends_on_no_other_image(model):
    image = images("query", 3, SIZE)
    together, alone = model(image), model(image[1:2])
    torch.testing.assert_close(together.pred_score[1:2], alone.pred_score)
    torch.testing.assert_close(together.anomaly_map[1:2], alone.anomaly_map)


@torch.no_grad()
def test_normality_lowers_the_score_and_anomalies_raise_it(model):
    patches = [torch.ones(1, 2, 2), torch.ones(1, 1, 1)]
    normality, *others = model.image_scores(HeadScores(torch.tensor([2.0]), patches, patches, patches))
    assert normality.item() == 2
    assert [score.item() for score in others] == [1, 1, 1]


@pytest.mark.parametrize("count", [1, 3])
def test_pseudo_anomalies(count):
    image = images("normal", count, 40)
    source = image.roll(-1, dims=0)
    for seed in range(20):
        pasted = cut_mix(image, np.random.default_rng(seed))
        for row in range(count):
            changed = (pasted[row] != image[row]).any(dim=0).nonzero()
            (top, left), (bottom, right) = changed.min(dim=0).values, changed.max(dim=0).values + 1
            patch = pasted[row, :, top:bottom, left:right]
            assert 0.5 * AREA[0] <= patch[0].numel() / 40**2 <= AREA[1]
            windows = source[row].unfold(1, patch.shape[1], 1).unfold(2, patch.shape[2], 1)
            assert (windows == patch[:, None, None]).all(dim=(0, 3, 4)).any()  # it is cut out of the next image
    again, other = (cut_mix(image, np.random.default_rng(seed)) for seed in (19, 20))
    assert torch.equal(again, pasted)
    assert not torch.equal(other, pasted)


def test_pseudo_anomalies_of_nothing():
    assert cut_mix(torch.zeros(0, 3, 8, 8), np.random.default_rng(0)).shape == (0, 3, 8, 8)


# ---------------------------------------------------------------------- training


def test_a_lesion_stands_out_after_training():
    torch.manual_seed(0)
    model = DraModel(pre_trained=False).train()
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
    model.memorise(normal[:2])
    assert model.training
    with torch.no_grad():
        score = model.eval()(image).pred_score
    assert score[:6].max() < score[6:].min()


@pytest.mark.parametrize(("category", "has_masks"), [("Brain", True), ("Chest", False)])
def test_fit_and_test(make, data, engine, category, has_masks):
    model, runner = make(max_epochs=2), engine()
    before = {name: value.clone() for name, value in model.model.named_parameters()}
    runner.fit(model, datamodule=data(category))
    assert (runner.trainer.max_epochs, runner.trainer.global_step) == (2, 2)
    after = dict(model.model.named_parameters())
    assert not [name for name, value in before.items() if torch.equal(value, after[name])]  # the backbone too
    assert len(model._references) == 0  # images do not outlive the fit

    figures = runner.test(model, datamodule=data(category), verbose=False)[0]
    assert ("pixel_AUROC" in figures) == has_masks
    loaded = Dra.load_from_checkpoint(runner.best_model_path, visualizer=False)
    again = engine().test(loaded, datamodule=data(category), verbose=False)[0]
    assert again == pytest.approx(figures, abs=1e-6)
    assert model.learning_type == LearningType.ONE_CLASS


def test_references_are_the_normal_images_themselves(make, categories, engine):
    data = BMADFewShot(categories, "Brain", k_shot=2, train_batch_size=44, num_workers=0)
    kept = []

    class Kept(Dra):
        def on_train_epoch_end(self):
            kept.append(self._references)
            super().on_train_epoch_end()

    model = Kept(pre_trained=False, image_size=SIZE, visualizer=False, max_epochs=1)
    engine().fit(model, datamodule=data)
    items = [data.support[row] for row in range(4)]
    expected = torch.stack([model.pre_processor.transform(item.image) for item in items if not item.gt_label])
    assert torch.equal(kept[0], expected)
    fresh = DraModel(pre_trained=False).eval()
    fresh.load_state_dict(model.model.state_dict())
    fresh.memorise(expected)
    torch.testing.assert_close(fresh.reference_0, model.model.reference_0)


def test_a_seed_decides_everything(make, data, engine):
    def fitted(seed, noise):
        torch.manual_seed(noise)  # whatever was drawn before
        model = make(max_epochs=1, seed=seed)
        engine().fit(model, datamodule=data())
        return model.model.state_dict()

    one, same, other = fitted(3, 0), fitted(3, 1), fitted(4, 0)
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not torch.equal(one["seen_head.0.weight"], other["seen_head.0.weight"])


def test_learning_rate_falls_by_thirds(make, data, engine):
    model = make(max_epochs=3, learning_rate=1e-2)
    rates = []
    model.on_train_epoch_start = lambda: rates.append(model.optimizers().param_groups[0]["lr"])
    engine().fit(model, datamodule=data("Chest"))
    assert rates == pytest.approx([1e-2, 1e-3, 1e-4])


def test_training_by_steps_can_score_too(make, categories, engine):
    data = BMADFewShot(categories, "Chest", k_shot=1, train_batch_size=4, num_workers=0)
    model, runner = make(), engine(max_epochs=-1, max_steps=1)
    runner.fit(model, datamodule=data)
    assert runner.trainer.global_step == 1
    assert "image_AUROC" in runner.test(model, datamodule=data, verbose=False)[0]


def test_normal_images_alone_teach_less_and_say_so(make, engine, tmp_path, caplog):
    data = BrainPhantom(tmp_path / "phantom", size=32, num_workers=0)
    with caplog.at_level(logging.WARNING, logger="anomalib.mvfa"):
        engine().fit(make(max_epochs=1), datamodule=data)
    assert "its head of seen anomalies learns nothing" in caplog.text


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batches_of_one_kind_are_learnt_from(make, categories, engine, batch_size):
    data = BMADFewShot(categories, "Chest", k_shot=1, train_batch_size=batch_size, num_workers=0)
    model = make(max_epochs=1)
    engine(limit_train_batches=4).fit(model, datamodule=data)
    assert all(value.isfinite().all() for value in model.model.state_dict().values())


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
    assert all(parameter.requires_grad for parameter in model.model.parameters())  # it can be trained on
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
    state = make().model.backbone.feature_extractor.state_dict()
    state = {name: torch.full_like(value, 0.5) for name, value in state.items()}
    torch.save(state, tmp_path / "resnet18.pth")
    spec = {"class_path": "Dra", "init_args": {"pre_trained": True, "image_size": SIZE}}
    built, origin = build_model(spec, str(tmp_path / "resnet18.pth"), visualizer=False, seed=3)
    assert origin == Origin("resnet18.pth")
    assert torch.equal(built.model.backbone.feature_extractor.state_dict()["conv1.weight"], state["conv1.weight"])
    one, other = (build_model(spec, None, visualizer=False, seed=seed)[0].model for seed in (3, 4))
    assert torch.equal(one.backbone.feature_extractor.conv1.weight, other.backbone.feature_extractor.conv1.weight)
    assert not torch.equal(one.seen_head[0].weight, other.seen_head[0].weight)


def test_weights_that_cannot_be_had(make, monkeypatch):
    def offline(*args, **kwargs):
        msg = "cannot find the requested files\nin the cache"
        raise FileNotFoundError(msg)

    monkeypatch.setattr(trained, "TimmFeatureExtractor", offline)
    with pytest.raises(
        RuntimeError, match=r"weights of resnet18 could not be had \(FileNotFoundError: cannot.*files\)"
    ):
        make(pre_trained=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 96}, r"image_size=96 must be at least 128"),
        ({"references": 0}, r"references=0 must be at least 1\."),
        ({"top_share": 1.5}, r"top_share=1.5 must be between 0 and 1\."),
        ({"max_epochs": 0}, r"max_epochs=0 must be at least 1\."),
    ],
)
def test_mistakes(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_a_model_without_references_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"no reference features yet\. Fit it"):
        DraModel(pre_trained=False)(torch.zeros(1, 3, SIZE, SIZE))


def test_data_without_normal_images_are_refused(make, data, engine):
    source = data()
    source.setup()
    source.train_data.samples = source.train_data.samples[source.train_data.samples.label_index == 1]
    source.setup = lambda stage=None: None
    with pytest.raises(ValueError, match="Dra needs normal training images"):
        engine().fit(make(), datamodule=source)
