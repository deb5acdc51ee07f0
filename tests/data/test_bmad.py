"""BMAD in both layouts, and its download."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from anomalib.data import BMAD, get_datamodule
from anomalib.data.datamodules.image import bmad
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


@pytest.mark.parametrize(("published", "with_img"), [(False, True), (True, True), (False, False)])
def test_both_layouts_with_and_without_img(tmp_path, write_category, published, with_img):
    folder = write_category(tmp_path, "Liver", published=published)
    for img in [] if with_img else list(folder.rglob("img")):
        for path in img.iterdir():
            path.rename(img.parent / path.name)
        img.rmdir()
    samples = find_samples(tmp_path, "Liver", "valid")
    assert samples.attrs["task"] == "segmentation"
    assert samples.label_index.tolist() == [0, 0, 0, 1, 1, 1]
    normal, abnormal = samples[samples.label_index == 0], samples[samples.label_index == 1]
    assert set(normal.mask_path) == {""}
    assert all("/good/" in path for path in normal.image_path)
    for row in abnormal.itertuples():
        assert Path(row.mask_path).parent == folder / "valid/Ungood" / ("anomaly_mask" if published else "label")
        assert Path(row.mask_path).stem == Path(row.image_path).stem
    dataset = read(tmp_path, "Liver", "test")
    assert (len(dataset), dataset.class_name) == (8, "Liver")
    assert all(dataset[i].gt_mask.any() == bool(dataset[i].gt_label) for i in range(8))


def test_masks_match_their_images(tmp_path, write_category):
    ungood = write_category(tmp_path, "Retina_RESC", suffix=".bmp") / "valid/Ungood"
    (ungood / "label").rename(ungood / "img/label")  # inside is right too
    samples = find_samples(tmp_path, "Retina_RESC", "valid")
    assert {Path(path).suffix for path in samples.image_path} == {".bmp"}
    assert [Path(path).suffix for path in samples.mask_path if path] == [".png"] * 3
    (ungood / "img/label/001.png").rename(ungood / "img/label/007.png")
    message = r"Ungood do not match the images: 1 images have no mask \['001'\], 1 masks have no image \['007'\]"
    with pytest.raises(ValueError, match=message):
        find_samples(tmp_path, "Retina_RESC", "valid")
    shutil.rmtree(ungood / "img/label")
    with pytest.raises(ValueError, match=r"3 images have no mask .* A mask lies in label or anomaly_mask under its"):
        find_samples(tmp_path, "Retina_RESC", "valid")


def test_the_plain_name_goes_before_the_published_one(tmp_path):
    for name in ("Brain_AD", "Brain", "Chest_AD"):
        (tmp_path / name).mkdir()
    assert category_folder(tmp_path, "Brain") == tmp_path / "Brain"
    assert category_folder(tmp_path, "Chest") == tmp_path / "Chest_AD"
    with pytest.raises(FileNotFoundError, match=r"valid has no images in good/ or Ungood/ \(\.bmp, \.jpeg, .*any case"):
        find_samples(tmp_path, "Brain", "valid")


def test_every_suffix_in_any_case(tmp_path):
    suffixes = [".png", ".PNG", ".jpg", ".JPG", ".jpeg", ".Jpeg", ".tif", ".TIFF", ".tiff", ".bmp"]
    for kind in ("good", "Ungood"):
        (tmp_path / "Chest/valid" / kind).mkdir(parents=True)
        (tmp_path / "Chest/valid" / kind / "notes.txt").touch()
        for index, suffix in enumerate(suffixes):
            Image.new("L", (8, 8), 9).save(tmp_path / "Chest/valid" / kind / f"{index}{suffix}")
    dataset = read(tmp_path, "Chest", "valid")
    assert [Path(path).suffix for path in dataset.samples.image_path] == suffixes * 2
    assert all(item.image.shape == (3, 8, 8) for item in dataset)


def test_categories_without_masks_are_classification(bmad_root):
    for category in ("Chest", "Retina_OCT2017"):
        dataset = read(bmad_root, category, "test")
        assert dataset.task == "classification"
        assert set(dataset.samples.mask_path) == {""}
        assert {int(dataset[i].gt_label) for i in range(len(dataset))} == {0, 1}
        assert all(dataset[i].gt_mask is None for i in range(len(dataset)))


# ------------------------------------------------------------------------------------------------------------ Mistakes


def test_a_wrong_root_says_what_is_there(bmad_root):
    message = (
        r"neither Liver nor Liver_AD; .*: Brain, Retina_RESC, Retina_OCT2017, Chest\. Give the folder that contains"
    )
    with pytest.raises(FileNotFoundError, match=message):
        BMADFewShot(bmad_root, "Liver").prepare_data()
    with pytest.raises(FileNotFoundError, match="found there: none"):
        BMADFewShot(bmad_root / "Brain").prepare_data()
    with pytest.raises(FileNotFoundError, match="train has no images"):  # published folders have none
        BMADOneClass(bmad_root, "Retina_RESC").setup()


@pytest.mark.parametrize("datamodule", [BMADOneClass, BMADFewShot, BMADLeaveOneOut])
def test_a_category_typo_lists_the_categories(datamodule):
    with pytest.raises(ValueError, match=r"BMAD has no category 'brain'\. Choose from: Brain, Liver, .*Histopathology"):
        datamodule(category="brain")


def test_misnamed_folders_are_refused(tmp_path, write_category):
    folder = write_category(tmp_path, "Brain") / "test/good"
    for name in ("Good", "ungood", "good_2"):
        folder = folder.rename(folder.with_name(name))
        with pytest.raises(ValueError, match=rf"test has a folder '{name}'; its folders must be called good and Ung"):
            find_samples(tmp_path, "Brain", "test")


# ----------------------------------------------------------------------------------------------------------- One class


def test_one_class_uses_all_normal_training_images(bmad_root):
    for category, masks in (("Brain", True), ("Chest", False)):
        data = BMADOneClass(bmad_root, category, eval_batch_size=3, num_workers=0)
        data.setup()
        assert (data.name, data.category) == ("BMAD", category)
        assert data.class_name == CATEGORIES[category].class_name
        assert [len(part) for part in (data.train_data, data.val_data, data.test_data)] == [2, 6, 8]
        assert set(data.train_data.samples.label_index) == {0}
        assert all("/train/good/" in path for path in data.train_data.samples.image_path)
        assert data.task == ("segmentation" if masks else "classification")
        assert (next(iter(data.test_dataloader())).gt_mask is not None) == masks


def test_one_class_takes_anomalibs_arguments(bmad_root):
    init_args = {"root": str(bmad_root), "category": "Brain", "seed": 3, "val_split_mode": "from_test"}
    data = get_datamodule({"class_path": "BMADOneClass", "init_args": {**init_args, "val_split_ratio": 0.5}})
    assert (type(data), data.category, data.seed) == (BMADOneClass, "Brain", 3)
    data.setup()
    assert (len(data.val_data), len(data.test_data)) == (4, 4)
    assert isinstance(BMADOneClass(root=None), BMAD)


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
        calls.append(info.name)
        root.mkdir(parents=True)
        (root / "bmad.zip").write_bytes(b"half")
        write_category(root, "Brain", counts=(1, 1, 1))
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
    assert calls == ["bmad"]
    assert [path.name for path in root.parent.iterdir()] == ["BMAD"]
    assert [path.name for path in root.iterdir()] == ["Brain"]
    assert data.source.root == root


@pytest.mark.parametrize("error", [OSError("no route to host"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failed_download_leaves_nothing(tmp_path, download, error):
    calls, failure = download
    failure.append(error)
    data = BMADOneClass(tmp_path / "BMAD")
    message = (
        r"root='.*BMAD' is absent or empty, and BMAD could not be downloaded to it \(no route to host\)\. Run once"
    )
    expected = pytest.raises(RuntimeError, match=message)
    with expected if isinstance(error, OSError) else pytest.raises(KeyboardInterrupt):
        data.prepare_data()
    assert [path.name for path in tmp_path.iterdir()] == [".BMAD.lock"]
    failure.clear()
    (tmp_path / ".BMAD.partial/Brain/test").mkdir(parents=True)  # as a killed download leaves it
    with pytest.raises(FileNotFoundError, match="found there: none"):
        data.setup()
    data.prepare_data()
    assert len(calls) == 2
    data.setup()
    assert [path.name for path in tmp_path.iterdir()] == ["BMAD"]


def test_processes_download_one_after_the_other(tmp_path, download, monkeypatch):
    write = bmad.download_and_extract

    def slowly(root, info):
        time.sleep(0.2)
        write(root, info)

    monkeypatch.setattr("anomalib.data.datamodules.image.bmad.download_and_extract", slowly)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: BMADOneClass(tmp_path / "BMAD").prepare_data(), range(3)))
    assert download[0] == ["bmad"]
    assert [path.name for path in tmp_path.iterdir()] == ["BMAD"]


def test_a_root_with_anything_in_it_is_not_downloaded_to(tmp_path, download):
    (tmp_path / "README.txt").touch()
    with pytest.raises(FileNotFoundError, match="holds neither Brain nor Brain_AD"):
        BMADOneClass(tmp_path).prepare_data()
    assert not download[0]
