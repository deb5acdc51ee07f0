"""Random views: what they are drawn from, and that image, mask and label belong together."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import Resize

from anomalib_mvfa.contract import class_name_of
from anomalib_mvfa.data import random_views
from anomalib_mvfa.data.augmentation import VIEWS
from anomalib_mvfa.data.dataset import SampleDataset, SupportViewDataset
from anomalib_mvfa.data.random_views import RandomViewDataset, move, paste_lesion, turn

SIDE = 32
BRIGHT, DULL = 230, 90
"""Grey values of a lesion and of what is around it."""


@pytest.fixture
def table(tmp_path):
    """Build the samples of a normal and an abnormal grey image, whose lesion is a brighter square."""

    def build(mask=True):
        rows = []
        for label in (0, 1):
            pixels = np.full((SIDE, SIDE), DULL, np.uint8)
            marked = np.zeros_like(pixels)
            if label:
                pixels[8:16, 10:18], marked[8:16, 10:18] = BRIGHT, 255
            for name, content in (("image", pixels), ("mask", marked)):
                Image.fromarray(content).save(tmp_path / f"{name}{label}.png")
            paths = {"image_path": str(tmp_path / f"image{label}.png")}
            paths["mask_path"] = str(tmp_path / f"mask{label}.png") if label and mask else ""
            rows.append({**paths, "label_index": label, "split": "train"})
        frame = pd.DataFrame(rows)
        frame.attrs["task"] = "segmentation"
        return frame

    return build


def views_of(samples, seed=0):
    return RandomViewDataset(SupportViewDataset(SampleDataset(samples, "Brain", Resize((SIDE, SIDE)))), seed)


def test_views_follow_seed_and_number_and_come_image_by_image_first(table):
    support = SupportViewDataset(SampleDataset(table(), "Brain", Resize((SIDE, SIDE))))
    views, others = RandomViewDataset(support, 0), RandomViewDataset(support, 1)
    assert len(support) == 2 * VIEWS
    assert len(views) == 2 * RandomViewDataset.VIEWS
    state = torch.random.get_rng_state()
    for index in range(2):
        assert torch.equal(views[index].image, support[index].image)
    for index in (5, 2, 5):
        assert torch.equal(views[index].image, RandomViewDataset(support, 0)[index].image)
        assert not torch.equal(views[index].image, others[index].image)
        assert class_name_of(views[index]) == "Brain"
        assert views[index].image_path == support[index % 2].image_path
    assert torch.equal(torch.random.get_rng_state(), state)
    drawn = torch.stack([views[index].image for index in range(2, 44)])
    assert len(drawn.unique(dim=0)) == 42


def test_masks_mark_the_lesions_of_views_and_labels_say_so(table):
    views = views_of(table())
    pasted = 0
    for index in range(len(views)):
        item = views[index]
        assert item.image.shape == (3, SIDE, SIDE)
        assert item.gt_mask.shape == (SIDE, SIDE)
        assert 0 <= item.image.min() <= item.image.max() <= 1
        assert item.gt_label == item.gt_mask.any()
        marked, grey = item.gt_mask.bool(), item.image.mean(dim=0)
        if marked.any() and not marked.all():
            assert grey[marked].mean() > grey[~marked].mean() + 0.1
        pasted += bool(index % 2 == 0 and marked.any())
    assert 5 <= pasted <= 16  # of 21 views of a normal image


def test_an_image_that_lacks_its_mask_neither_gets_nor_gives_a_lesion(table, monkeypatch):
    monkeypatch.setattr(random_views, "paste_lesion", None)
    views = views_of(table(mask=False))
    for index in range(len(views)):
        item = views[index]
        assert item.gt_label == index % 2
        assert (item.gt_mask is None) == (index % 2 == 1)


def test_a_lesion_in_a_corner_stays_in_sight():
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[:2, :2] = True
    for seed in range(30):
        torch.manual_seed(seed)
        assert move(mask)[1].any()
    mask[:] = False
    assert not torch.equal(move(mask)[0], torch.eye(2, 3))


def test_views_are_counted_and_reading_does_not_change_what_is_kept(table):
    views = views_of(table())
    views[0].image = torch.zeros(3, 4, 4)
    assert views[0].image.shape == (3, SIDE, SIDE)
    assert len(list(views)) == len(views)
    with pytest.raises(IndexError, match="View -1 does not exist; there are 44"):
        views[-1]


def test_turn_keeps_angles_and_scales_as_far_as_it_may():
    torch.manual_seed(0)
    found = torch.stack([turn() for _ in range(200)])
    scales = found.det().abs().sqrt()
    assert torch.allclose(found.transpose(1, 2) @ found, scales[:, None, None] ** 2 * torch.eye(2), atol=1e-5)
    assert 1 / 1.6 <= scales.min() < 0.7
    assert 1.5 < scales.max() <= 1.6
    assert 60 < (found.det() > 0).sum() < 140
    angles = torch.atan2(found[:, 1, 0], found[:, 0, 0])
    assert angles.min() < -3
    assert angles.max() > 3


@pytest.fixture
def unturned(monkeypatch):
    """Leave a pasted lesion as it is, but for its place."""
    monkeypatch.setattr(random_views, "turn", lambda: torch.eye(2))


@pytest.mark.usefixtures("unturned")
def test_a_lesion_goes_where_the_image_is_not_black_and_takes_on_its_colour():
    torch.manual_seed(0)
    image, donor, lesion = torch.zeros(3, SIDE, SIDE), torch.full((3, SIDE, SIDE), 0.2), torch.zeros(SIDE, SIDE)
    image[:, 18:24, 8:14] = 0.6
    donor[:, 8:17, 12:21], lesion[8:17, 12:21] = 0.5, 1
    tissue = image[0] > 0
    for _ in range(20):
        new, mask = paste_lesion(image, torch.zeros(SIDE, SIDE, dtype=torch.bool), donor, lesion)
        assert 73 <= mask.sum() <= 81  # without its corners
        middle = torch.nonzero(mask).float().mean(dim=0).long()
        assert tissue[tuple(middle)]
        far = torch.nn.functional.max_pool2d(mask[None].float(), 7, 1, 3)[0] == 0
        assert torch.equal(new[:, far], image[:, far])

    flat = torch.full((3, SIDE, SIDE), 0.4)
    new, mask = paste_lesion(flat, tissue, donor, lesion)
    assert mask[tissue].all()
    assert new[0].max().item() == pytest.approx(0.5 + 0.7 * (0.4 - 0.2), abs=0.02)


@pytest.mark.usefixtures("unturned")
def test_one_lesion_of_several_is_pasted():
    image, mask = torch.full((3, SIDE, SIDE), 0.4), torch.zeros(SIDE, SIDE, dtype=torch.bool)
    donor, lesions = torch.rand(3, SIDE, SIDE), torch.zeros(SIDE, SIDE)
    lesions[1:6, 1:6] = lesions[16:25, 16:25] = 1
    torch.manual_seed(0)
    areas = {int(paste_lesion(image, mask, donor, lesions)[1].sum()) for _ in range(30)}
    assert any(17 <= area <= 25 for area in areas)
    assert 73 <= max(areas) <= 90  # and not 106, those of both


@pytest.mark.usefixtures("unturned")
def test_what_is_to_be_seen_of_a_small_lesion_is_marked():
    image, donor, lesions = torch.full((3, SIDE, SIDE), 0.4), torch.full((3, SIDE, SIDE), 0.4), torch.zeros(SIDE, SIDE)
    donor[:, 10, 10], lesions[10, 10] = 1, 1
    for seed in range(20):
        torch.manual_seed(seed)
        new, mask = paste_lesion(image, torch.zeros(SIDE, SIDE, dtype=torch.bool), donor, lesions)
        changed = (new - image).abs().amax(dim=0)
        assert changed[mask].max() == changed.max() > 0.3


@pytest.mark.usefixtures("unturned")
def test_a_donor_of_another_size_and_a_lesion_that_was_cut_off():
    image, mask = torch.full((3, 20, 30), 0.4), torch.zeros(20, 30, dtype=torch.bool)
    donor, lesion = torch.rand(3, 40, 60), torch.zeros(40, 60)
    unchanged, same = paste_lesion(image, mask, donor, lesion)
    assert torch.equal(unchanged, image)
    assert not same.any()
    lesion[10:20, 10:20] = 1
    torch.manual_seed(1)
    new, found = paste_lesion(image, mask, donor, lesion)
    assert new.shape == (3, 20, 30)
    assert found.sum() <= 25
    assert math.isclose(float(found.sum()), 25, abs_tol=15)
