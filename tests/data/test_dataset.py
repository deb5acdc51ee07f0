"""Reading is the published code's: 8-bit RGB, resized by Pillow, masks nearest, threshold in the middle."""

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import AnomalibDataset, Folder, ImageItem
from lightning.fabric.utilities.apply_func import move_data_to_device
from PIL import Image
from torchvision.transforms.v2 import Compose, InterpolationMode, RandomHorizontalFlip, Resize
from torchvision.tv_tensors import Mask

from anomalib_mvfa import Mvfa
from anomalib_mvfa.contract import class_name_of
from anomalib_mvfa.data import dataset
from anomalib_mvfa.data.augmentation import view
from anomalib_mvfa.data.dataset import ConcatDataset, SampleDataset, SupportViewDataset, collate, read_item
from anomalib_mvfa.data.reading import MASK_THRESHOLD, read_image, read_mask, refuse_high_bit_depth
from anomalib_mvfa.data.samplers import eval_loader
from recipe import READS_YCBCR

RESIZE = Resize((24, 24), interpolation=InterpolationMode.BICUBIC, antialias=True)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def unit(image):
    return torch.from_numpy(image).permute(2, 0, 1) / 255


@pytest.fixture
def samples(tmp_path):
    """Two normal and two abnormal images of different sizes, the latter with masks."""
    rows = []
    for i, size in enumerate([(40, 50), (64, 33), (40, 50), (48, 48)]):
        image, mask = tmp_path / f"image{i}.png", tmp_path / f"mask{i}.png"
        Image.fromarray(noise(*size, 3, seed=i)).save(image)
        if i >= 2:
            Image.fromarray(noise(*size, seed=10 + i) // 128 * 255).save(mask)
        rows.append(
            {"image_path": str(image), "mask_path": str(mask) if i >= 2 else "", "label_index": i // 2, "split": "test"}
        )
    frame = pd.DataFrame(rows)
    frame.attrs["task"] = "segmentation"
    return frame


def as_task(samples, task):
    samples = samples.copy()
    samples.attrs = {"task": task}
    return samples


# --------------------------------------------------------------------------------------------------------------- Files


@pytest.mark.xfail(
    not READS_YCBCR,
    reason="Pillow before 13 cannot read the YCbCr TIFF that it writes: issue 9770 of Pillow",
    raises=ValueError,
    strict=True,
)
def test_ycbcr_is_read_as_rgb(tmp_path):
    image = Image.fromarray(noise(32, 32, 3)).convert("YCbCr")
    image.save(tmp_path / "image.tif")
    assert np.array_equal(read_image(tmp_path / "image.tif"), image.convert("RGB"))


def test_16_bit_colour_tiff_is_refused(tmp_path):
    cv2 = pytest.importorskip("cv2")
    cv2.imwrite(str(tmp_path / "rgb.tif"), noise(8, 8, 3).astype(np.uint16) * 13)
    with pytest.raises(ValueError, match=r"rgb\.tif has more than 8 bits a channel.*Convert it to 8 bits"):
        read_image(tmp_path / "rgb.tif")


def test_the_bit_depth_of_a_file_is_checked_once(tmp_path, samples, own_folder, monkeypatch):
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, *args, **kwargs: opened.append(str(path)) or real(path, *args))

    def begin(loader):
        for batch in loader:
            moved = move_data_to_device(batch, torch.device("cpu"))
            opened.clear()
            Mvfa.on_test_batch_start(None, moved)

    begin(eval_loader(SampleDataset(as_task(samples, "classification")), 1, num_workers=0))
    assert not opened  # what reads them has checked them
    source = Folder(**own_folder["init_args"], eval_batch_size=40, num_workers=0)  # reads by itself
    source.setup()
    begin(source.test_dataloader())
    assert sorted(opened) == sorted(source.test_data.samples.image_path)
    begin(source.test_dataloader())
    assert not opened
    Image.fromarray(noise(8, 8).astype(np.uint16) * 99).save(tmp_path / "high.png")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"high\.png has more than 8 bits"):
            refuse_high_bit_depth(str(tmp_path / "high.png"))
    (tmp_path / "notes.txt").touch()
    refuse_high_bit_depth(str(tmp_path / "notes.txt"))  # what is no image is not ours to refuse


def test_files_are_closed(tmp_path, recwarn):
    Image.fromarray(noise(8, 8)).save(tmp_path / "a.tif", save_all=True, append_images=[Image.fromarray(noise(8, 8))])
    with pytest.raises(ValueError, match=r"a\.tif has 2 pages, of which one would be read\. Save each as a file"):
        read_image(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"gone\.png is no file"):
        read_image(tmp_path / "gone.png")
    assert not [warning for warning in recwarn if warning.category is ResourceWarning]


def test_masks_have_the_size_of_their_image_and_0_and_255(tmp_path):
    path = tmp_path / "mask.png"
    Image.new("L", (9, 8), 255).save(path)
    assert np.asarray(read_mask(path, (9, 8))).all()
    with pytest.raises(ValueError, match=r"Mask .*mask\.png is 9x8 pixels, its image 8x9\. They must agree\."):
        read_mask(path, (8, 9))


LEFT, RIGHT, NOTHING = np.eye(8, 4), np.eye(8, 4, -4), np.zeros((8, 4))
BOTH = np.hstack([LEFT, RIGHT]) > 0


def painted(left, right, ground=0):
    """Return a mask of two lesions: one of a value, one of another, on a ground."""
    where = np.hstack([LEFT, 2 * RIGHT]).astype(int)
    return Image.fromarray(np.array([ground, left, right], np.uint8)[where])


WHITE, RED, GREEN, CLEAR = (255, 255, 255), (255, 0, 0), (0, 255, 0), (255, 255, 255, 0)
TOO_LOW = (
    r"has grey values such as \[.*{}\], of {} up to 127 that would not count\. Write masks with 0 and 255, and not as"
)
MASKS = {
    "white": (painted(255, 255), None),
    "above the middle": (painted(128, 200), None),
    "bright colours": (painted(GREEN, (255, 255, 0), (0, 0, 0)), None),
    "one bit": (painted(255, 255).convert("1"), None),
    "in a transparent layer": (painted((*WHITE, 255), (*WHITE, 200), CLEAR), None),
    "in a transparent layer of grey": (painted((255, 255), (255, 255), (255, 0)), None),
    "two grey levels": (painted(85, 170), TOO_LOW.format(85, 1)),
    "label numbers": (painted(1, 2), TOO_LOW.format(2, 2)),
    "two colours": (painted(RED, GREEN, (0, 0, 0)), TOO_LOW.format(76, 1)),
    "hardly opaque": (painted((*WHITE, 255), (*WHITE, 90), CLEAR), TOO_LOW.format(90, 1)),
    "black on transparent": (
        painted((0, 0, 0, 255), (0, 0, 0, 255), CLEAR),
        "marks nothing, and its image is abnormal",
    ),
    "black": (painted(0, 0), r"marks nothing, and its image is abnormal\. Correct the mask, or move the image"),
}


@pytest.mark.parametrize(("mask", "error"), MASKS.values(), ids=MASKS)
def test_every_painted_pixel_counts_or_the_mask_is_refused(mask, error, tmp_path):
    mask.save(tmp_path / "mask.png")
    if error is None:
        assert np.array_equal(np.asarray(read_mask(tmp_path / "mask.png", (8, 8))) > MASK_THRESHOLD, BOTH)
        return
    with pytest.raises(ValueError, match=rf"Mask .*mask\.png {error}"):
        read_mask(tmp_path / "mask.png", (8, 8))


# ------------------------------------------------------------------------------------------------------ SampleDataset


def test_a_resize_equals_the_published_code(samples):
    dataset = SampleDataset(samples, "Brain", RESIZE)
    for i, item in enumerate(dataset[i] for i in range(4)):
        with Image.open(samples.image_path[i]) as image:
            resized = np.array(image.convert("RGB").resize((24, 24), Image.Resampling.BICUBIC))
        torch.testing.assert_close(torch.Tensor(item.image), unit(resized), atol=1e-7, rtol=0)
        assert item.gt_label == i // 2
        assert (item.gt_mask.dtype, item.gt_mask.shape) == (torch.bool, (24, 24))
        if i < 2:
            assert not item.gt_mask.any()
        else:
            with Image.open(samples.mask_path[i]) as mask:
                nearest = np.asarray(mask.resize((24, 24), Image.Resampling.NEAREST)) / 255
            assert torch.equal(item.gt_mask, torch.from_numpy(nearest > 0.5))


def test_without_augmentations_images_keep_their_size(samples):
    item = SampleDataset(samples)[1]
    assert item.image.shape == (3, 64, 33)
    torch.testing.assert_close(torch.Tensor(item.image), unit(noise(64, 33, 3, seed=1)), atol=1e-7, rtol=0)


def test_other_augmentations_move_image_and_mask_alike(samples):
    plain = SampleDataset(samples)[2]
    flipped = SampleDataset(samples, augmentations=Compose([RandomHorizontalFlip(p=1)]))[2]
    assert torch.equal(flipped.image, plain.image.flip(-1))
    assert torch.equal(flipped.gt_mask, plain.gt_mask.flip(-1))


def test_classification_and_unknown_labels_have_no_masks(samples):
    items = [SampleDataset(as_task(samples, "classification"), augmentations=RESIZE)[i] for i in range(4)]
    assert [(item.gt_mask, item.mask_path) for item in items] == [(None, None)] * 4
    flipped = SampleDataset(as_task(samples, "classification"), augmentations=RandomHorizontalFlip(p=1))[0]
    assert flipped.gt_mask is None
    samples.loc[0, "label_index"] = -1
    item = SampleDataset(samples, augmentations=RESIZE)[0]
    assert (item.gt_label, item.gt_mask) == (None, None)


def test_items_and_batches_carry_the_class_name(samples):
    dataset = SampleDataset(samples, "retinal OCT", RESIZE)
    assert class_name_of(dataset[0]) == "retinal OCT"
    batch = dataset.collate_fn([dataset[0], dataset[3]])
    assert class_name_of(batch) == "retinal OCT"
    assert batch.image.shape == (2, 3, 24, 24)
    assert batch.gt_mask.shape == (2, 24, 24)
    assert batch.gt_label.tolist() == [0, 1]
    items = [SampleDataset(samples, class_name, RESIZE)[0] for class_name in ("Brain", "Liver")]
    with pytest.raises(ValueError, match=r"A batch mixes the class names \['Brain', 'Liver'\]; its images must"):
        collate(items)


# ----------------------------------------------------------------------------------------------- other data sets' items


def test_anomalib_datasets_are_read_in_our_way(own_folder):
    source = Folder(**own_folder["init_args"], val_split_mode="synthetic", seed=0)
    source.setup()
    dataset = SampleDataset.of(source.test_data, source.test_data.samples[:3], "mine")
    assert (dataset.reader, len(dataset), dataset.task, class_name_of(dataset[0])) == (None, 3, "segmentation", "mine")
    synthetic = SampleDataset.of(source.val_data, source.val_data.samples)
    assert {int(item.gt_label) for item in synthetic} == {0, 1}


class InvertedDataset(AnomalibDataset):
    """Reads items in a way of its own, with two masks an image (as MVTec LOCO has) that make one."""

    def __init__(self, samples):
        super().__init__()
        self.samples = samples

    def __getitem__(self, index):
        row = self.samples.iloc[index]
        image = 1 - unit(np.array(read_image(row.image_path)))
        halves = torch.zeros(2, *image.shape[-2:], dtype=torch.bool)
        halves[0, :8], halves[1, -8:] = True, True
        mask = Mask(halves.any(dim=0))
        image, mask = self.augmentations(image, mask) if self.augmentations else (image, mask)
        label = torch.tensor(int(row.label_index))
        return ImageItem(image=image, gt_mask=mask, gt_label=label, image_path=row.image_path)


def test_a_dataset_with_a_form_of_its_own_reads_its_items(samples):
    own = InvertedDataset(samples)
    dataset = SampleDataset.of(own, samples[1:], "box")
    again = SampleDataset.of(dataset, dataset.samples[1:])
    empty = SampleDataset.of(dataset, dataset.samples[:0])
    assert [len(part) for part in (own, dataset, again, empty)] == [4, 3, 2, 0]
    assert type(empty.reader) is InvertedDataset
    for part, first in ((dataset, 1), (again, 2)):
        assert part.class_name == "box"
        item = part[0]
        assert class_name_of(item) == "box"
        assert torch.equal(item.image, own[first].image)
        assert torch.equal(item.gt_mask, own[first].gt_mask)
        part.augmentations = RESIZE
        assert part[0].image.shape == (3, 24, 24)
    assert own.augmentations is None
    views = SupportViewDataset(dataset)
    assert len(views) == 33
    assert views[4].gt_mask.shape == (24, 24)
    assert torch.equal(views[0].gt_mask, dataset[0].gt_mask)


# -------------------------------------------------------------------------------------------------------- SupportViews


def test_views_come_view_by_view_with_masks_moved_alike(samples):
    dataset = SampleDataset(samples, "Brain", RESIZE)
    views = SupportViewDataset(dataset)
    assert len(views) == 44
    for index in range(44):
        which, row = divmod(index, 4)
        item, source = views[index], dataset[row]
        assert torch.equal(item.image, view(source.image, which))
        assert torch.equal(item.gt_mask, view(source.gt_mask[None].float(), which)[0] > 0.5)
        assert (item.gt_label, item.image_path) == (source.gt_label, source.image_path)
        assert class_name_of(item) == "Brain"
    views = SupportViewDataset(SampleDataset(as_task(samples, "classification"), augmentations=RESIZE))
    assert all(views[index].gt_mask is None for index in range(44))


def test_support_is_read_once_unless_augmentations_are_random(samples, monkeypatch):
    reads = []
    monkeypatch.setattr(dataset, "read_item", lambda data, row: reads.append(row) or read_item(data, row))
    views = SupportViewDataset(SampleDataset(samples, augmentations=RESIZE))
    for _ in range(3):
        assert len([views[index] for index in range(44)]) == 44
    assert len(reads) == 4
    views.augmentations = Resize((20, 20))
    assert views[0].image.shape == (3, 20, 20)
    reads.clear()
    views.augmentations = Compose([RandomHorizontalFlip(), RESIZE])
    assert len([views[0] for _ in range(5)]) == len(reads) == 5


# ------------------------------------------------------------------------------------------------------- ConcatDataset


def test_a_concatenation_keeps_order_class_name_and_masks_of_its_parts(samples):
    parts = [SampleDataset(samples, "Brain"), SampleDataset(as_task(samples[:3], "classification"), "Chest")]
    whole = ConcatDataset(parts)
    whole.augmentations = RESIZE
    assert all(part.augmentations is RESIZE for part in parts)
    assert len(whole) == len(whole.samples) == 7
    assert whole.task == "segmentation"
    items = whole[[0, 3, 4, 6]]
    assert [class_name_of(item) for item in items] == ["Brain", "Brain", "Chest", "Chest"]
    assert [item.gt_mask is None for item in items] == [False, False, True, True]
    assert whole.collate_fn(whole[[4, 5]]).gt_mask is None
    assert ConcatDataset(parts[1:]).task == "classification"
    with pytest.raises(IndexError):
        whole[7]
