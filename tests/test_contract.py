"""What the model learns of data, from our datamodules, from anomalib's own, and from bare datasets."""

import shutil
from types import SimpleNamespace

import pytest
from anomalib.data import Folder, ImageItem, MVTecAD
from anomalib.data.datasets import MVTecADDataset

from anomalib_mvfa.contract import FEW_SHOT, LEAVE_ONE_OUT, DataFacts, class_name_of, describe, has_label
from anomalib_mvfa.data import BMADFewShot, BMADOneClass
from anomalib_mvfa.data.augmentation import VIEWS
from anomalib_mvfa.data.support import support_of


@pytest.fixture(scope="module")
def mvtec_root(tmp_path_factory, phantom_root):
    """A root of MVTec AD's form: 4 normal training images of metal_nut, 4 normal and 4 abnormal test images."""
    root = tmp_path_factory.mktemp("mvtec")
    brain, nut = phantom_root / "Brain", root / "metal_nut"
    shutil.copytree(brain / "train" / "good" / "img", nut / "train" / "good")
    shutil.copytree(brain / "test" / "good" / "img", nut / "test" / "good")
    shutil.copytree(brain / "test" / "Ungood" / "img", nut / "test" / "bent")
    shutil.copytree(brain / "test" / "Ungood" / "label", nut / "ground_truth" / "bent")
    return root


@pytest.fixture
def nuts(mvtec_root):
    data = MVTecAD(mvtec_root, "metal_nut", num_workers=0)
    data.setup()
    return data


def folder(phantom_root, **arguments):
    directories = {"normal_dir": "train/good/img", "abnormal_dir": "test/Ungood/img"}
    data = Folder("own", root=phantom_root / "Brain", **directories, **arguments, seed=0)
    data.setup()
    return data


# ------------------------------------------------------------------------------------------------------------ describe


def test_what_is_known_of_datamodules(phantom_root, nuts):
    assert describe(None) == DataFacts(FEW_SHOT, "object", has_masks=True, normal_only=False)
    few_shot = BMADFewShot(phantom_root, k_shot=1)
    few_shot.setup()
    assert describe(few_shot) == DataFacts(FEW_SHOT, "Brain", has_masks=True, normal_only=False)
    assert describe(nuts) == DataFacts(FEW_SHOT, "metal nut", has_masks=True, normal_only=True)
    assert describe(BMADOneClass(phantom_root, "Chest")).class_name == "Chest X-ray film"  # which is not set up


def test_own_folders_have_no_class_name_and_masks_only_where_given(phantom_root):
    assert describe(folder(phantom_root)) == DataFacts(FEW_SHOT, "object", has_masks=False, normal_only=True)
    with_masks = folder(phantom_root, mask_dir="test/Ungood/label")
    assert describe(with_masks) == DataFacts(FEW_SHOT, "object", has_masks=True, normal_only=True)


def test_bare_datasets(mvtec_root):
    train, test = (MVTecADDataset(mvtec_root, "metal_nut", split=split) for split in ("train", "test"))
    assert describe(None, train, test) == DataFacts(FEW_SHOT, "metal nut", has_masks=True, normal_only=True)
    assert describe(None, test, test).normal_only is False
    assert describe(None, None, test) == DataFacts(FEW_SHOT, "metal nut", has_masks=True, normal_only=False)
    bare = SimpleNamespace()  # without samples, and so taken to hold every kind
    assert has_label(bare, 0)
    assert has_label(bare, 1)
    assert describe(None, bare, bare) == DataFacts()


def test_a_protocol_of_the_datamodule_is_used(nuts):
    nuts.protocol = LEAVE_ONE_OUT
    assert describe(nuts).protocol is LEAVE_ONE_OUT


# ------------------------------------------------------------------------------------------------------------- support


def test_a_datamodules_own_support_is_used(phantom_root, nuts):
    data = BMADFewShot(phantom_root, k_shot=2)
    data.setup()
    assert support_of(data, None, bank_images=1, seed=0) is data.support
    nuts.support = None  # a datamodule may say that there is none
    assert support_of(nuts, None, bank_images=1, seed=0) is None


@pytest.mark.parametrize(("bank_images", "used"), [(1, 1), (3, 3), (16, 4)])
def test_normal_training_images_are_drawn_from_a_seed(nuts, bank_images, used):
    def drawn(seed):
        return list(support_of(nuts, None, bank_images, seed).samples.image_path)

    views = support_of(nuts, None, bank_images, seed=0)
    assert len(views) == VIEWS * used
    assert set(views.samples.label_index) == {0}
    assert set(drawn(0)) <= set(nuts.train_data.samples.image_path)
    assert drawn(0) == drawn(0)
    assert (len({tuple(drawn(seed)) for seed in range(8)}) > 1) == (used < 4)
    item = views[0]
    assert item.gt_label == 0
    assert item.image.shape == (3, 64, 64)
    assert not item.gt_mask.any()


def test_abnormal_training_images_are_no_support(phantom_root, mvtec_root):
    mixed = MVTecADDataset(mvtec_root, "metal_nut", split="test")
    views = support_of(None, mixed, bank_images=16, seed=0)
    assert len(views.samples) == 4
    assert set(views.samples.label_index) == {0}
    mixed.samples = mixed.samples[mixed.samples.label_index == 1]
    for without in (mixed, SimpleNamespace(), None):
        assert support_of(None, without, bank_images=16, seed=0) is None


def test_support_is_resized_as_the_training_images_are(nuts):
    from torchvision.transforms.v2 import Resize

    nuts.train_data.augmentations = Resize((32, 32))
    assert support_of(nuts, None, 2, 0)[3].image.shape == (3, 32, 32)


def test_batches_of_others_carry_no_class_name(nuts):
    batch = next(iter(nuts.test_dataloader()))
    assert class_name_of(batch) is None
    assert class_name_of(ImageItem(image=batch.image[0])) is None
