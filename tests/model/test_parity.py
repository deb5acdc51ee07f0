"""The published implementation's figures, met by ours: forward, loss, gradient, training and scores.

Tolerances relate to the largest absolute value of an array.

Axes: B images, L tokens, D width of the image tower, E joint width, H = W image size, l level.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from anomalib_mvfa.contract import LEAVE_ONE_OUT
from anomalib_mvfa.data.augmentation import VIEWS, view
from anomalib_mvfa.data.bmad import CATEGORIES
from anomalib_mvfa.model import backbone
from anomalib_mvfa.model.build import build_mvfa
from anomalib_mvfa.model.calibration import SupportBatch, fill_bank, set_ranges
from anomalib_mvfa.model.fusion import Weights
from anomalib_mvfa.model.lightning_model import BETAS
from anomalib_mvfa.model.losses import MvfaLoss, dice_loss, focal_loss
from anomalib_mvfa.model.torch_model import Scoring
from anomalib_mvfa.model.weights import load_adapters
from recipe import MINI, VITL, Clip, adapter_weights, clip_weights, images, lesioned, write_config

FIGURES = Path(__file__).parents[1] / "figures"
CLASS_NAMES = {name: category.class_name for name, category in CATEGORIES.items()}


class Figures:
    """One file of figures, and how far an array is from them."""

    def __init__(self, name: str) -> None:
        self.arrays = json.loads((FIGURES / f"{name}.json").read_text())

    def values(self, key: str) -> np.ndarray:
        return np.array(self.arrays[key]["values"])

    def distance(self, key: str, found) -> float:
        """Largest difference from a figure, relative to its largest absolute value."""
        figure = self.arrays[key]
        found = found.detach().numpy() if torch.is_tensor(found) else np.asarray(found)
        found = found.astype(np.float64)
        assert list(found.shape) == figure["shape"], key
        difference = np.abs(found.flatten()[:: figure["stride"]] - self.values(key)).max()
        return float(difference / figure["peak"]) if difference else 0.0  # an AUROC of 0 has no scale

    def check(self, key: str, found, tolerance: float) -> None:
        assert self.distance(key, found) <= tolerance, key


class Images:
    """The support and the queries of a CLIP's figures: so many normal images, and as many abnormal ones, of each."""

    def __init__(self, clip: Clip, support: int, queries: int) -> None:
        size = clip.image_size
        self.normal = images("support/normal", support, size)
        self.abnormal, self.mask = lesioned("support/abnormal", support, size)
        abnormal, mask = lesioned("test/abnormal", queries, size)
        self.query = torch.cat([images("test/normal", queries, size), abnormal])
        self.query_mask = torch.cat([torch.zeros_like(mask), mask])
        self.query_label = np.repeat([0, 1], queries)

    @property
    def batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Support images, masks and labels."""
        count = len(self.normal)
        mask = torch.cat([torch.zeros_like(self.mask), self.mask])
        return torch.cat([self.normal, self.abnormal]), mask, torch.tensor([0] * count + [1] * count)


def views(image: torch.Tensor) -> torch.Tensor:
    """Return the views of images ``(B, C, H, W)``, view by view."""
    return torch.stack([view(one, index) for index in range(VIEWS) for one in image])


def check_scores(figures: Figures, key: str, model, data: Images, bank: torch.Tensor, tolerance: float) -> None:
    """Compare all scores of the queries: of both branches, fused by their ranges over the queries, and as AUROCs."""
    model.eval()
    sources = [str(row % len(data.normal)) for row in range(len(bank))]
    thin = model.image_size // figures.arrays[f"{key}/zero_map_sum"]["shape"][-1]
    levels = len(model.levels)

    def check_auc(name: str, target, score: torch.Tensor) -> None:
        figures.check(f"{key}/auc_{name}", roc_auc_score(np.ravel(target), score.flatten()), 1e-4)

    model.scoring = Scoring(image_score="det_mean")
    fill_bank(model, [SupportBatch(bank, torch.zeros(len(bank)), sources)])
    with torch.no_grad():
        scores = model.branch_scores(model.tokens(data.query), model.text_features)
    zero_map, few_map = model.maps(scores)
    figures.check(f"{key}/zero_map_sum", levels * zero_map[:, ::thin, ::thin], tolerance)
    figures.check(f"{key}/few_map_sum", levels * few_map[:, ::thin, ::thin], tolerance)
    figures.check(f"{key}/zero_det_sum", levels * scores.zero, tolerance)
    figures.check(f"{key}/few_det_sum", levels * scores.few, tolerance)

    set_ranges(model, [scores])  # the published fusion: ranges of all that is tested
    by_det = model.fuse(scores)
    figures.check(f"{key}/fused_map_minmax", unsquashed(by_det.anomaly_map)[:, ::thin, ::thin], tolerance)
    figures.check(f"{key}/fused_det_minmax", unsquashed(by_det.pred_score), tolerance)
    check_auc("pixel", data.query_mask, by_det.anomaly_map)
    check_auc("image_from_det", data.query_label, by_det.pred_score)

    model.scoring = Scoring(image_score="map_max")
    by_map = model.fuse(scores._replace(zero=None, few=None))
    check_auc("image_from_map", data.query_label, by_map.pred_score)

    model.scoring = Scoring(image_score="det_mean", weights=Weights(1.0, 0.0), normalised=False)
    zero_shot = model.fuse(scores._replace(distance=None, few=None))
    check_auc("pixel_zero", data.query_mask, zero_shot.anomaly_map)
    check_auc("image_zero_det", data.query_label, zero_shot.pred_score)


def unsquashed(score: torch.Tensor) -> torch.Tensor:
    """Invert the squash of the fusion."""
    centred = 2 * score.double() - 1
    return (centred / (1 - centred.abs()) + 1) / 2


# ---------------------------------------------------------------------- the tiny CLIP


@pytest.fixture(scope="module")
def mini() -> Figures:
    return Figures("mini")


@pytest.fixture(scope="module")
def data() -> Images:
    return Images(MINI, support=2, queries=4)


@pytest.fixture(scope="module")
def mini_model(mini_clip):
    model = build_mvfa(str(mini_clip.config), str(mini_clip.weights), MINI.image_size)
    model.text_features = model.encode_states("Brain")
    return model


@pytest.fixture
def model(mini_model, mini_clip):
    """The model with the adapters and settings that it starts from."""
    load_adapters(mini_model, mini_clip.adapters)
    mini_model.scoring = Scoring()
    return mini_model.eval()


@pytest.mark.parametrize("category", CLASS_NAMES)
def test_text_features(mini, mini_model, category):
    mini.check(f"text/{category}", mini_model.encode_states(CLASS_NAMES[category]), 1e-5)


def test_quarter_points_are_the_levels(mini_model):
    assert tuple(mini_model.levels) == MINI.levels


@torch.no_grad()
def test_tokens_of_both_branches(mini, model):
    tokens = model.tokens(images("query", 2, MINI.image_size))
    for level in range(4):
        mini.check(f"seg_tokens/{level}", tokens.seg[level], 1e-5)
        mini.check(f"det_tokens/{level}", tokens.det[level], 1e-5)


@pytest.mark.parametrize("kind", ["normal", "abnormal", "abnormal_mask"])
def test_views(mini, data, kind):
    source = {"normal": data.normal, "abnormal": data.abnormal, "abnormal_mask": data.mask.unsqueeze(1)}[kind]
    mini.check(f"augment/{kind}", views(source), 5e-4)  # figures are in half precision


def test_losses(mini, model, data):
    image, mask, label = data.batch
    maps, scores = model.train()(image)
    for level, probabilities in enumerate(maps):
        mini.check(f"loss/focal/{level}", focal_loss(probabilities, mask), 1e-5)
        mini.check(f"loss/dice/{level}", dice_loss(probabilities[:, 1], mask), 1e-5)
    det = MvfaLoss()([], scores, None, label)
    mini.check("loss/det", det, 1e-5)
    mini.check("loss/seg", MvfaLoss()(maps, scores, mask, label) - det, 1e-5)


def test_scores_before_training(mini, model, data):
    check_scores(mini, "init", model, data, views(data.normal), 5e-5)


@pytest.mark.parametrize("kind", ["pixel", "image"])
def test_one_epoch(mini, model, data, kind):
    """All 44 losses, the trained weights, and the scores with them."""
    image = torch.cat([views(data.abnormal), views(data.normal)])
    mask = (views(data.mask.unsqueeze(1)) > 0.5).float().squeeze(1)
    mask = torch.cat([mask, torch.zeros_like(mask)])
    label = torch.tensor([1] * 22 + [0] * 22)
    branches = (model.seg_adapters, model.det_adapters)
    groups = [{"params": [p for p in branch.parameters() if p.requires_grad]} for branch in branches]
    adam = torch.optim.Adam(groups, lr=1e-3, betas=(0.5, 0.999))

    losses = []
    model.train()
    for row in mini.values(f"train_{kind}/order"):
        one = slice(row, row + 1)
        maps, scores = model(image[one], with_seg=kind == "pixel")
        loss = MvfaLoss()(maps, scores, mask[one], label[one])
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    mini.check(f"train_{kind}/loss", losses, 1e-5)
    weights = model.state_dict()
    trained = [key for key in mini.arrays if key.startswith(f"train_{kind}/weights/")]
    assert len(trained) == 16
    for key in trained:
        mini.check(key, weights[key.rsplit("/", 1)[-1]][::8, ::8], 1e-4)
    check_scores(mini, f"train_{kind}", model, data, views(data.normal), 5e-5)


def test_leave_one_out(mini_model, model):
    """Two epochs of the published ``train_zero.py`` over data sets with and without masks, by our defaults.

    Its loop was run as it is, on the tiny CLIP with the recipe's adapters, in the order of its own shuffles.
    """
    figures = json.loads((FIGURES / "leave_one_out.json").read_text())
    image, mask, label, name = [], [], [], []
    for category in ("Brain", "Liver", "Chest"):
        abnormal, lesion = lesioned(f"zero/{category}/abnormal", 2, MINI.image_size)
        image += [*images(f"zero/{category}/normal", 2, MINI.image_size), *abnormal]
        mask += [*torch.zeros_like(lesion), *lesion]
        label += [0, 0, 1, 1]
        name += [category] * 4
    text = {category: mini_model.encode_states(CLASS_NAMES[category]) for category in name}
    groups = [
        {"params": [p for p in b.parameters() if p.requires_grad]} for b in (model.seg_adapters, model.det_adapters)
    ]
    adam = torch.optim.Adam(groups, lr=LEAVE_ONE_OUT.learning_rate, betas=BETAS)
    before = {key: value.clone() for key, value in model.state_dict().items() if "adapters" in key}
    losses = []
    model.train()
    for row in figures["order"]:
        with_seg = CATEGORIES[name[row]].has_masks
        maps, scores = model(image[row][None], text[name[row]], with_seg)
        loss = MvfaLoss()(maps, scores, mask[row][None], torch.tensor(label[row : row + 1]))
        adam.zero_grad()
        loss.backward()
        if not with_seg:  # as AdapterTrainingMixin does it
            for parameter in model.seg_adapters.parameters():
                parameter.grad = None
        adam.step()
        losses.append(loss.item())
    assert losses == pytest.approx(figures["loss"], rel=1e-5)
    moved = {key: (model.state_dict()[key] - value).norm().item() for key, value in before.items()}
    assert moved == pytest.approx(figures["moved"], rel=1e-3)


# ---------------------------------------------------------------------- ViT-L


@pytest.mark.slow
def test_vit_l(tmp_path, monkeypatch):
    """Tokens, losses, gradients, maps and scores at the size that MVFA has. Takes two minutes and 5 GB of memory."""
    figures, data = Figures("vitl"), Images(VITL, support=1, queries=1)
    config = write_config(tmp_path / "vitl.json", VITL)
    monkeypatch.setattr(backbone, "_read_weights", lambda *_: clip_weights(VITL))  # spares the disk 2 GB
    model = build_mvfa(str(config), "not read", VITL.image_size)
    assert tuple(model.levels) == VITL.levels
    for name, state in adapter_weights(VITL).items():
        getattr(model, name).load_state_dict(state)
    model.text_features = model.encode_states("Brain")
    figures.check("text/Brain", model.text_features, 1e-5)

    with torch.no_grad():
        tokens = model.tokens(images("query", 1, VITL.image_size))
    for level in range(4):
        figures.check(f"seg_tokens/{level}", tokens.seg[level][:, :8, :64], 1e-5)
        figures.check(f"det_tokens/{level}", tokens.det[level][:, :8, :64], 1e-5)

    check_scores(figures, "init", model, data, data.normal, 1e-4)

    image, mask, label = data.batch
    maps, scores = model.train()(image)
    det = MvfaLoss()([], scores, None, label)
    loss = MvfaLoss()(maps, scores, mask, label)
    figures.check("loss/det", det, 1e-5)
    figures.check("loss/seg", loss - det, 1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        key = f"grad_norm/{name}"
        if parameter.grad is not None:
            figures.check(key, parameter.grad.norm(), 1e-4)
        elif key in figures.arrays:
            assert figures.values(key) == 0, key
