"""The protocols on real medical images, where they are (see `bmad_mini`)."""

import math

import pytest
import torch
from anomalib.engine import Engine

from anomalib_mvfa import BMADFewShot, BMADLeaveOneOut, Mvfa
from anomalib_mvfa.contract import class_name_of, describe
from anomalib_mvfa.data.bmad import CATEGORIES
from anomalib_mvfa.data.support import group_of

HERE = ["Brain", "Chest", "Histopathology", "Retina_OCT2017"]


@pytest.mark.parametrize("category", HERE)
def test_few_shot(bmad_mini, category, contents):
    data = BMADFewShot(bmad_mini, category, k_shot=4, num_workers=0)
    data.prepare_data()
    data.setup()
    hashes = [contents(part.samples.image_path) for part in (data.support, data.val_data, data.test_data)]
    assert len(set.union(*hashes)) == sum(map(len, hashes))
    assert len(hashes[0]) == 8
    facts = describe(data)
    assert (facts.class_name, facts.has_masks) == (CATEGORIES[category].class_name, CATEGORIES[category].has_masks)
    for part in (data.support, data.val_data, data.test_data):
        item = part[0]
        assert item.image.dtype == torch.float32
        assert 0 <= item.image.min() < item.image.max() <= 1
        assert (item.gt_mask is not None) == facts.has_masks


def test_patients_stay_in_one_split(bmad_mini):
    data = BMADFewShot(bmad_mini, "Brain", k_shot=4, group_by=r"patient\d+", num_workers=0)
    data.setup()
    groups = [
        {group_of(path, data.group_by) for path in part.samples.image_path}
        for part in (data.support, data.val_data, data.test_data)
    ]
    assert groups == [{"patient26"}, set(), {"patient07", "patient19"}]
    assert len(data.test_data) == 152


def test_leave_one_out_trains_and_tests(bmad_mini, tiny_config, tmp_path):
    category = "Retina_OCT2017"
    others = [name for name in HERE if name != category]
    data = BMADLeaveOneOut(bmad_mini, category, train_categories=others, train_batch_size=16, num_workers=0)
    seen = {}

    class Watched(Mvfa):
        def training_step(self, batch, *args, **kwargs):
            for path in batch.image_path:
                name = next(name for name in HERE if f"{name}_AD" in path)
                seen.setdefault(name, []).append(path)
                assert class_name_of(batch) == CATEGORIES[name].class_name
                assert (batch.gt_mask is not None) == CATEGORIES[name].has_masks
            return super().training_step(batch, *args, **kwargs)

    model = Watched(str(tiny_config), pretrained=None, image_size=56, max_epochs=1, visualizer=False)
    options = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "limit_val_batches": 2}
    engine = Engine(default_root_dir=tmp_path, **options)
    engine.fit(model, datamodule=data)
    (results,) = engine.test(model, datamodule=data)
    assert 0 < results["image_AUROC"] < 1
    assert math.isnan(results["pixel_AUROC"])  # no masks: not defined
    counts = {"Brain": 152, "Chest": 120, "Histopathology": 160, "Retina_OCT2017": 39}
    assert {name: len(paths) for name, paths in seen.items()} == {name: counts[name] for name in others}
    assert all(len(set(paths)) == len(paths) for paths in seen.values())
    assert all("/test/" in path for paths in seen.values() for path in paths)
