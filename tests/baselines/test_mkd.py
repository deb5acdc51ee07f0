"""Mkd against its losses by hand, and in anomalib's engine."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from scipy.ndimage import gaussian_filter, grey_opening
from sklearn.metrics import roc_auc_score
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

import recipe
from anomalib_mvfa import BMADOneClass, Mkd
from anomalib_mvfa.baselines import mkd
from anomalib_mvfa.baselines.mkd import MkdModel, discrepancy, opening
from anomalib_mvfa.compare.models import Origin, build_model
from recipe import images, lesioned, vgg_features

SIZE = 64
CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MkdModel(vgg_features(), value_weight=0.3).eval()


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(mkd, "get_model", lambda name, weights: SimpleNamespace(features=vgg_features()))
    return lambda **more: Mkd("vgg11", False, SIZE, visualizer=False, **more)


# ---------------------------------------------------------------------- losses and scores


def test_discrepancy_by_hand():
    student = torch.tensor([[3.0, 4.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]).view(2, 1, 2, 2)
    teacher = torch.tensor([[4.0, 3.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]]).view(2, 1, 2, 2)
    # 1 - 24 / 25 and (1 + 1) / 4; 1 - 0 and (1 + 4) / 4
    expected = torch.tensor([0.04 + 0.1 * 0.5, 1.0 + 0.1 * 1.25])
    torch.testing.assert_close(discrepancy(student, teacher, 0.1), expected)


def losses_by_hand(model, image):
    def activations(blocks):
        return [nn.Sequential(*blocks[: number + 1])(image).flatten(1) for number in range(len(blocks))]

    pairs = zip(activations(model.student), activations(model.teacher), strict=True)
    return [
        1 - (s * t).sum(1) / (s.norm(dim=1) * t.norm(dim=1)) + model.value_weight * ((s - t) ** 2).mean(1)
        for s, t in list(pairs)[1:]
    ]


def test_training_counts_four_blocks_and_scores_three(model):
    image = images("mkd", 3, SIZE)
    of_blocks = losses_by_hand(model, image)
    assert len(of_blocks) == 4
    torch.testing.assert_close(model(image).pred_score, sum(of_blocks[1:]))
    assert model(image).pred_score.std() > 0
    model.train().student.eval()  # as above, with the statistics that batch norm has
    torch.testing.assert_close(model(image), sum(of_blocks))


def test_map_by_hand(model):
    model.student.apply(lambda layer: setattr(layer, "__class__", nn.ReLU) if isinstance(layer, nn.ReLU) else None)
    image = images("mkd", 2, SIZE).requires_grad_()
    sum(loss.sum() for loss in losses_by_hand(model, image)[1:]).backward()
    saliency = image.grad.abs().sum(1).numpy()
    for one in saliency:
        one[:] = np.clip((one - one.min()) / (np.percentile(one, 99) - one.min()), 0, 1)
    expected = [grey_opening(gaussian_filter(one, 4), footprint=CROSS) for one in saliency]
    found = model(image).anomaly_map
    assert found.shape == (2, SIZE, SIZE)
    assert not found.requires_grad
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-4)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:  # needs no gradients around it
            assert torch.equal(model(image * 1.0).anomaly_map, found)


# Of the authors' `gbp_localization`, `compute_localization_auc`, loss and Adam (rohban-lab/Knowledge_Distillation_AD at
# commit 0c574ae, on the CPU), with the recipe's weights of vgg16 and of the student, times the root of 2: scores of two
# abnormal images by `detection_test`'s formula, their maps opened at each of its 1000 thresholds, at every 32nd pixel
# from the eighth, and the AUROC of the pixels; then three losses of four normal images.
SCORES, PIXEL_AUROC, LOSSES = [1.946106, 1.931932], 0.8168951, [2.361417, 2.25039, 2.143914]
MAPS = [
    *(0.187, 0.174, 0.26, 0.14, 0.109, 0.315, 0.153, 0.33, 0.109, 0.249, 0.326, 0.483, 0.485, 0.216, 0.334, 0.119),
    *(0.088, 0.258, 0.218, 0.106, 0.377, 0.168, 0.348, 0.135, 0.627, 0.497, 0.576, 0.149, 0.349, 0.212, 0.16, 0.324),
]


def test_figures_of_the_authors():
    model = MkdModel(make_layers(cfgs["D"]), value_weight=0.01)
    for name, blocks in (("teacher", model.teacher), ("student", model.student)):
        for key, parameter in nn.Sequential(*(layer for block in blocks for layer in block)).named_parameters():
            value = recipe.weight(f"mkd/{name}.{key}", tuple(parameter.shape))
            norm = parameter.ndim == 1 and key.endswith("weight")
            parameter.data.copy_(1 + 0.1 * value if norm else value * 2**0.5 if parameter.ndim == 4 else value)
    ill, mask = lesioned("mkd/abnormal", 2, 128)
    found = model.eval()(ill)
    assert found.pred_score.tolist() == pytest.approx(SCORES, rel=1e-5)
    assert (found.anomaly_map[:, 8::32, 8::32].flatten() - torch.tensor(MAPS) - 0.0005).abs().max() < 0.0006
    assert roc_auc_score(mask.flatten(), found.anomaly_map.flatten()) == pytest.approx(PIXEL_AUROC, abs=1e-3)
    model.train()
    image, optimizer, losses = images("mkd/normal", 4, 128), torch.optim.Adam(model.student.parameters(), 1e-3), []
    for _ in LOSSES:
        losses.append(model(image).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert [loss.item() for loss in losses] == pytest.approx(LOSSES, rel=1e-5)


def test_a_student_that_equals_its_teacher_finds_nothing(model):
    other = images("mkd", 2, SIZE)
    before = model(other)
    model.student = copy.deepcopy(model.teacher)
    after = model(other)
    assert after.pred_score.abs().max() < 1e-5 < before.pred_score.min()
    assert model.train()(other).abs().max() < 1e-5


def test_opening():
    maps = torch.rand(2, 1, 12, 9, generator=torch.Generator().manual_seed(0))
    expected = np.stack([grey_opening(one[0], footprint=CROSS) for one in maps.numpy()])[:, None]
    np.testing.assert_array_equal(opening(maps), expected)
    # As opening the regions above each threshold
    for threshold in (0.3, 0.6):
        assert torch.equal(opening(maps) > threshold, opening((maps > threshold).float()) > 0)
    dot = torch.zeros(1, 1, 7, 7)
    dot[..., 3, 3] = 1
    assert opening(dot).max() == 0


def test_student_of_vgg16():
    teacher = mkd._blocks(make_layers(cfgs["D"]))
    student = mkd._student(teacher)
    layers = [layer for block in student for layer in block]
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    widths = [16, 16, 16, 128, 16, 16, 256, 16, 16, 512, 16, 16, 512]  # as published
    assert [layer.out_channels for layer in convolutions] == widths
    assert not any(layer.bias is not None for layer in convolutions)
    for block in student:  # nothing is normalised before a pooling
        assert [type(layer) for layer in block[-3:]] == [nn.Conv2d, mkd.GuidedReLU, nn.MaxPool2d]
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in layers) == len(widths) - 5
    x = y = torch.rand(1, 3, 32, 32)
    for number, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        x, y = ours(x), theirs(y)
        assert (x.shape == y.shape) == (number > 0)


# ---------------------------------------------------------------------- in the engine


def test_a_lesion_stands_out_after_training(make):
    torch.manual_seed(0)
    model = make(learning_rate=5e-3).model.train()
    normal = images("normal", 8, SIZE)
    optimizer = torch.optim.Adam(model.student.parameters(), lr=5e-3)
    first = None
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(normal).mean()
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss < 0.5 * first
    model.eval()
    ill, mask = lesioned("normal", 8, SIZE)
    of_normal, of_ill = model(normal), model(ill)
    assert (of_ill.pred_score > of_normal.pred_score).all()
    inside = (of_ill.anomaly_map * mask).sum() / mask.sum()
    outside = (of_ill.anomaly_map * (1 - mask)).sum() / (1 - mask).sum()
    assert inside > 1.2 * outside


def test_the_student_learns(make, categories, engine):
    model, runner = make(max_epochs=2), engine()
    before = copy.deepcopy(model.model.state_dict())
    runner.fit(model, datamodule=BMADOneClass(categories, "Brain", train_batch_size=2, num_workers=0))
    assert runner.trainer.current_epoch == 2
    changed = {name for name, value in model.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("student.")}


# ---------------------------------------------------------------------- weights and mistakes


def test_file_reaches_the_teacher(tmp_path):
    with torch.device("meta"):
        whole = torchvision.models.vgg11().state_dict()
    # Expanded numbers take no room, neither here nor in the file.
    state = {name: torch.full((), 0.01 * row).expand(value.shape) for row, (name, value) in enumerate(whole.items())}
    torch.save(state, tmp_path / "vgg11.pth")
    spec = {"class_path": "Mkd", "init_args": {"backbone": "vgg11", "pre_trained": True}}
    built, origin = build_model(spec, str(tmp_path / "vgg11.pth"), visualizer=False)
    assert origin == Origin("vgg11.pth", False)
    names = [name for name in state if name.startswith("features")]
    for name, weight in zip(names, built.model.teacher.state_dict().values(), strict=True):
        assert torch.equal(weight, state[name])
