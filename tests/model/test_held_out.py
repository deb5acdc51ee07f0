"""Thresholds where no image validates: scores of support images by models that have not learnt from them."""

import numpy as np
import pytest
import torch
from anomalib.engine import Engine

from anomalib_mvfa import BMADFewShot, FewShotFolder, Mvfa, MvfaPlus
from anomalib_mvfa.data.dataset import SampleDataset, SupportViewDataset
from anomalib_mvfa.model import lightning_model
from anomalib_mvfa.model.held_out import PARTS, split

LABELS = [0] * 6 + [1] * 5
OPTIONS = {"image_size": 56, "max_epochs": 1, "visualizer": False, "learning_rate": 0.01}


def test_every_image_is_held_out_once_with_its_group():
    groups = [0, 0, 1, 2, 3, 4, 5, 5, 6, 7, 8]
    parts = split(LABELS, groups, seed=0)
    assert len(parts) == PARTS
    assert sorted(np.concatenate([out for _, out in parts])) == list(range(11))
    for rest, out in parts:
        assert {*rest}.isdisjoint(out)
        assert {groups[row] for row in rest}.isdisjoint(groups[row] for row in out)
        assert {LABELS[row] for row in rest} == {0, 1}


@pytest.mark.parametrize(("labels", "groups"), [([0, 0, 0, 1], [0, 1, 2, 3]), ([0, 0, 1, 1], [0, 0, 1, 2])])
def test_there_are_no_parts_where_a_kind_could_not_be_learnt(labels, groups):
    assert split(labels, groups, seed=0) == []


@pytest.fixture
def fit(tiny_config, tmp_path):
    """Return a function that fits a model on data."""

    def run(data, kind=Mvfa, **options):
        model = kind(str(tiny_config), None, **{**OPTIONS, **options})
        engine = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1, enable_progress_bar=False)
        engine.fit(model, datamodule=data)
        return model

    return run


@pytest.fixture
def everything(phantom_root):
    """Return a function that makes data of which all images are the support."""
    brain = phantom_root / "Brain/valid"
    folders = {"normal": "good/img", "abnormal": "Ungood/img", "masks": "Ungood/label"}

    def make(**options):
        return FewShotFolder(brain, **folders, k_shot=None, train_batch_size=22, num_workers=0, **options)

    return make


@pytest.mark.parametrize("kind", [Mvfa, MvfaPlus])
def test_thresholds_come_from_models_that_have_not_learnt_from_the_image(fit, everything, monkeypatch, kind):
    """The scores of the first part are those of a model that is fitted without it."""
    found = {}

    def watched(model, start, support, parts, *args):
        found.update(parts=parts, samples=support.samples, scored=[*original(model, start, support, parts, *args)])
        return iter(found["scored"])

    original = lightning_model.held_out_scores
    monkeypatch.setattr(lightning_model, "held_out_scores", watched)
    falling = {"kind": kind, "warmup_epochs": 1, "max_epochs": 2}
    model = fit(everything(), **falling)
    evidence = model.post_processor.evidence
    assert (evidence.images, evidence.learnt, len(evidence.scores)) == ("held-out support", False, 12)
    assert sorted(evidence.labels) == [0] * 6 + [1] * 6

    rest, out = found["parts"][0]
    without = everything()
    setup = without._setup

    def leave_out(stage=None):
        setup(stage)
        some = SampleDataset.of(without.support, without.support.samples.iloc[rest], without.class_name)
        without.support = without.train_data = SupportViewDataset(some)

    without._setup = leave_out
    other = fit(without, threshold=0.5, class_name=model.settings.class_name, **falling).eval()
    for (predictions, item), row in zip(found["scored"], out, strict=False):
        assert item.image_path == found["samples"].image_path.iloc[row]
        expected = other.model(torch.as_tensor(item.image)[None])
        torch.testing.assert_close(predictions.pred_score, expected.pred_score, atol=1e-5, rtol=0)


def test_the_fit_itself_is_not_changed(fit, everything):
    found = [fit(everything(), threshold=threshold).model for threshold in ("best_f1", 0.5)]
    for one, other in zip(*(model.state_dict().values() for model in found), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, atol=0, rtol=0)


def test_validation_images_save_the_time(fit, phantom_root, monkeypatch):
    monkeypatch.setattr(lightning_model, "held_out_scores", lambda *_: pytest.fail("trained anew"))
    model = fit(BMADFewShot(phantom_root, k_shot=2, train_batch_size=22, num_workers=0))
    assert model.post_processor.evidence.images == "validation"


def test_one_abnormal_image_cannot_be_held_out(fit, phantom_root):
    data = BMADFewShot(phantom_root, k_shot=6, abnormal_shots=1, train_batch_size=22, num_workers=0)
    evidence = fit(data).post_processor.evidence
    assert (evidence.images, evidence.learnt) == ("support", True)
