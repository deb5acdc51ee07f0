"""BMAD in both layouts, and its download."""

import shutil
from pathlib import Path

import pytest
from anomalib.data import BMAD, get_datamodule
from PIL import Image

from anomalib_mvfa.data.bmad import (
    CATEGORIES,
    BMADFewShot,
    BMADLeaveOneOut,
    BMADOneClass,
    category_folder,
    find_samples,
)
from anomalib_mvfa.data.dataset import SampleDataset

NONE = {"num_workers": 0}


def read(root, category, split):
    return SampleDataset(find_samples(root, category, split), CATEGORIES[category].class_name)


def test_the_class_names_are_the_published_ones():
    assert {name: category.class_name for name, category in CATEGORIES.items()} == {
        "Brain": "Brain",
        "Liver": "Liver",
        "Retina_RESC": "retinal OCT",
        "Retina_OCT2017": "retinal OCT",
        "Chest": "Chest X-ray film",
        "Histopathology": "histopathological image",
    }
    assert [name for name, category in CATEGORIES.items() if category.has_masks] == ["Brain", "Liver", "Retina_RESC"]


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("with_img", [False, True])
def test_both_layouts_with_and_without_img(tmp_path, write_category, published, with_img):
    folder = write_category(tmp_path, "Liver", published=published)
    if not with_img:
        for img in list(folder.rglob("img")):
            for path in img.iterdir():
                path.rename(img.parent / path.name)
            img.rmdir()
    samples = find_samples(tmp_path, "Liver", "valid")
    assert samples.attrs["task"] == "segmentation"
    assert samples.label_index.tolist() == [0, 0, 0, 1, 1, 1]
    normal, abnormal = samples[samples.label_index == 0], samples[samples.label_index == 1]
    assert set(normal.mask_path) == {""}
    assert all("/good/" in path for path in normal.image_path)
    masks = "anomaly_mask" if published else "label"
    for row in abnormal.itertuples():
        assert Path(row.mask_path).parent == folder / "valid" / "Ungood" / masks
        assert Path(row.mask_path).stem == Path(row.image_path).stem
    dataset = read(tmp_path, "Liver", "test")
    assert (len(dataset), dataset.class_name) == (8, "Liver")
    assert all(dataset[i].gt_mask.any() == bool(dataset[i].gt_label) for i in range(8))


def test_masks_inside_img_are_found_too(tmp_path, write_category):
    ungood = write_category(tmp_path, "Brain") / "valid" / "Ungood"
    (ungood / "label").rename(ungood / "img" / "label")
    assert (find_samples(tmp_path, "Brain", "valid").mask_path != "").sum() == 3


def test_the_plain_name_goes_before_the_published_one(tmp_path):
    for name in ("Brain_AD", "Brain", "Chest_AD"):
        (tmp_path / name).mkdir()
    assert category_folder(tmp_path, "Brain") == tmp_path / "Brain"
    assert category_folder(tmp_path, "Chest") == tmp_path / "Chest_AD"


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".JPG", ".jpeg", ".Jpeg", ".tif", ".TIFF", ".tiff", ".bmp"])
def test_every_suffix_in_any_case(tmp_path, suffix):
    for kind in ("good", "Ungood"):
        (tmp_path / "Chest" / "valid" / kind).mkdir(parents=True)
        Image.new("L", (8, 8), 9).save(tmp_path / "Chest" / "valid" / kind / f"a{suffix}")
        (tmp_path / "Chest" / "valid" / kind / "notes.txt").touch()
    dataset = read(tmp_path, "Chest", "valid")
    assert [Path(path).name for path in dataset.samples.image_path] == [f"a{suffix}"] * 2
    assert dataset[0].image.shape == (3, 8, 8)


def test_a_mask_may_have_another_suffix_than_its_image(tmp_path, write_category):
    write_category(tmp_path, "Retina_RESC", published=True, suffix=".bmp")
    samples = find_samples(tmp_path, "Retina_RESC", "test")
    assert {Path(path).suffix for path in samples.image_path} == {".bmp"}
    assert {Path(path).suffix for path in samples.mask_path if path} == {".png"}


def test_masks_that_do_not_match_are_named(tmp_path, write_category):
    masks = write_category(tmp_path, "Brain") / "valid" / "Ungood" / "label"
    (masks / "001.png").rename(masks / "007.png")
    message = r"Ungood do not match the images: 1 images have no mask \['001'\], 1 masks have no image \['007'\]"
    with pytest.raises(ValueError, match=message):
        find_samples(tmp_path, "Brain", "valid")
    shutil.rmtree(masks)
    with pytest.raises(ValueError, match=r"3 images have no mask .* A mask lies in label or anomaly_mask under its"):
        find_samples(tmp_path, "Brain", "valid")


def test_categories_without_masks_are_classification(bmad_root):
    for category in ("Chest", "Retina_OCT2017"):
        dataset = read(bmad_root, category, "test")
        assert dataset.task == "classification"
        assert set(dataset.samples.mask_path) == {""}
        assert {int(dataset[i].gt_label) for i in range(len(dataset))} == {0, 1}
        assert all(dataset[i].gt_mask is None for i in range(len(dataset)))


def test_an_empty_split_says_where_images_belong(tmp_path):
    (tmp_path / "Brain").mkdir()
    with pytest.raises(FileNotFoundError, match=r"valid has no images in good/ or Ungood/ \(\.bmp, \.jpeg, .*any case"):
        find_samples(tmp_path, "Brain", "valid")


# -------------------------------------------------------------------------------------------------------------- Roots


def test_a_wrong_root_says_what_is_there(bmad_root):
    message = (
        r"holds neither Liver nor Liver_AD; categories found there: .*Give the folder that contains Liver, or name cat"
    )
    with pytest.raises(FileNotFoundError, match=message) as error:
        BMADFewShot(bmad_root, "Liver").prepare_data()
    for name in ("Brain", "Retina_RESC", "Retina_OCT2017", "Chest"):
        assert name in str(error.value)
    with pytest.raises(FileNotFoundError, match="found there: none"):
        BMADFewShot(bmad_root / "Brain").prepare_data()


@pytest.mark.parametrize("datamodule", [BMADOneClass, BMADFewShot, BMADLeaveOneOut])
def test_a_category_typo_lists_the_categories(bmad_root, datamodule):
    with pytest.raises(ValueError, match=r"BMAD has no category 'brain'\. Choose from: Brain, Liver, .*Histopathology"):
        datamodule(bmad_root, category="brain")


@pytest.mark.parametrize("name", ["Good", "ungood", "good_2"])
def test_misnamed_folders_are_refused(tmp_path, write_category, name):
    write_category(tmp_path, "Brain")
    (tmp_path / "Brain/test/good").rename(tmp_path / "Brain/test" / name)
    with pytest.raises(ValueError, match=rf"test has a folder '{name}'; its folders must be called good and Ungood"):
        find_samples(tmp_path, "Brain", "test")


# ----------------------------------------------------------------------------------------------------------- One class


def test_one_class_uses_all_normal_training_images(bmad_root):
    for category, masks in (("Brain", True), ("Chest", False)):
        data = BMADOneClass(bmad_root, category, eval_batch_size=3, **NONE)
        data.setup()
        assert (data.name, data.category) == ("BMAD", category)
        assert data.class_name == CATEGORIES[category].class_name
        assert [len(part) for part in (data.train_data, data.val_data, data.test_data)] == [2, 6, 8]
        assert set(data.train_data.samples.label_index) == {0}
        assert all("/train/good/" in path for path in data.train_data.samples.image_path)
        assert data.task == ("segmentation" if masks else "classification")
        batch = next(iter(data.test_dataloader()))
        assert (batch.gt_mask is not None) == masks


def test_one_class_keeps_anomalibs_split_modes(bmad_root):
    data = BMADOneClass(bmad_root, "Brain", val_split_mode="from_test", val_split_ratio=0.5, seed=0)
    data.setup()
    assert (len(data.val_data), len(data.test_data)) == (4, 4)


def test_one_class_by_its_short_name(bmad_root):
    config = {"class_path": "BMADOneClass", "init_args": {"root": str(bmad_root), "category": "Chest", "seed": 3}}
    data = get_datamodule(config)
    assert (type(data), data.category, data.seed) == (BMADOneClass, "Chest", 3)


def test_one_class_needs_the_training_images_that_the_protocols_do_not(bmad_root):
    with pytest.raises(FileNotFoundError, match="train has no images"):
        BMADOneClass(bmad_root, "Retina_RESC").setup()
    BMADFewShot(bmad_root, "Retina_RESC", k_shot=1).setup()


def test_tests_without_a_normal_image_stay_as_they_are(bmad_root):
    shutil.rmtree(bmad_root / "Brain" / "test" / "good")
    data = BMADFewShot(bmad_root, "Brain", k_shot=1)
    data.setup()
    assert data.test_data.samples.label_index.tolist() == [1, 1, 1, 1]


# ------------------------------------------------------------------------------------------------------------ Download


@pytest.fixture
def download(monkeypatch, write_category):
    """Replace anomalib's download by one that writes a category; return its calls, and what to raise midway."""
    calls, failure = [], []

    def download_and_extract(root, info):
        calls.append((root, info))
        root.mkdir(parents=True)
        (root / "bmad.zip").write_bytes(b"half")
        write_category(root, "Brain")
        if failure:
            raise failure[0]
        (root / "bmad.zip").unlink()

    monkeypatch.setattr("anomalib.data.datamodules.image.bmad.download_and_extract", download_and_extract)
    return calls, failure


@pytest.mark.parametrize("there", [False, True])
def test_an_absent_or_empty_root_is_downloaded_to(tmp_path, download, there):
    calls, _ = download
    root = tmp_path / "datasets" / "BMAD"
    if there:
        root.mkdir(parents=True)
    data = BMADFewShot(root, k_shot=1)
    data.prepare_data()
    data.prepare_data()
    data.setup()
    assert [info.name for _, info in calls] == ["bmad"]
    assert [path.name for path in root.parent.iterdir()] == ["BMAD"]
    assert [path.name for path in root.iterdir()] == ["Brain"]
    assert data.source.root == root


@pytest.mark.parametrize("error", [OSError("no route to host"), ValueError("hash"), KeyboardInterrupt()])
def test_a_failed_download_leaves_nothing(tmp_path, download, error):
    calls, failure = download
    failure.append(error)
    data = BMADOneClass(tmp_path / "BMAD")
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            data.prepare_data()
    else:
        message = (
            rf"root='.*BMAD' is absent or empty, and BMAD could not be downloaded to it \({error}\)\. Run once with a"
        )
        with pytest.raises(RuntimeError, match=message):
            data.prepare_data()
    assert not list(tmp_path.iterdir())
    failure.clear()
    data.prepare_data()
    assert len(calls) == 2
    data.setup()


def test_what_a_killed_download_leaves_is_no_data(tmp_path, download):
    calls, _ = download
    partial = tmp_path / ".BMAD.partial" / "Brain" / "test"
    partial.mkdir(parents=True)
    data = BMADOneClass(tmp_path / "BMAD")
    with pytest.raises(FileNotFoundError, match="found there: none"):
        data.setup()
    data.prepare_data()
    assert len(calls) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["BMAD"]


def test_a_root_with_anything_in_it_is_not_downloaded_to(tmp_path, download):
    calls, _ = download
    (tmp_path / "README.txt").touch()
    with pytest.raises(FileNotFoundError, match="holds neither Brain nor Brain_AD"):
        BMADOneClass(tmp_path).prepare_data()
    assert not calls


def test_anomalibs_own_arguments_are_those_of_one_class():
    assert isinstance(BMADOneClass(root=None), BMAD)
