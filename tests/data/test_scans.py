"""Scans in datamodules and in prediction: right slices, labels and masks, or one error and nothing left behind."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data.utils import LabelName
from anomalib.engine import Engine
from PIL import Image
from pydicom import dcmread

from anomalib_mvfa import FewShot, Mvfa, PredictScans, SaveMaps, Scans
from anomalib_mvfa.data import scans
from anomalib_mvfa.data.scan_files import read_scan
from anomalib_mvfa.data.scans import origin_of
from scan_recipe import write_dicom, write_nifti

SIZE = 24
SLICES = 4
MARKED = (1, 2)
"""Slices of an abnormal volume that its mask marks."""
WINDOW = [0, 1000]
NORMAL, ABNORMAL = 7, 5


def volume(seed, lesion):
    """Return a volume ``(W, H, N)`` of noise and, in some slices of it, a bright corner; and the corner's mask."""
    values = np.random.default_rng(seed).integers(100, 500, (SIZE, SIZE, SLICES)).astype(np.int16)
    mask = np.zeros_like(values, np.uint8)
    if lesion:
        mask[:9, :9, MARKED] = 2
        values[mask > 0] = 900
    return values, mask


@pytest.fixture(scope="session")
def hospital(tmp_path_factory):
    """Folders of NIfTI volumes and, among the normal ones, DICOM files."""
    root = tmp_path_factory.mktemp("hospital")
    for number in range(NORMAL - 1):
        write_nifti(root / f"healthy/p{number}.nii.gz", volume(number, lesion=False)[0])
    write_dicom(root / "healthy/deep/p9", volume(99, lesion=False)[0].T)
    for number in range(ABNORMAL):
        values, mask = volume(50 + number, lesion=True)
        write_nifti(root / f"ill/q{number}.nii.gz", values)
        write_nifti(root / f"drawn/q{number}.nii", mask)
    (root / "healthy/notes.txt").write_text("no scan")
    return root


@pytest.fixture
def copied(hospital, tmp_path):
    """A copy of them, to change."""
    shutil.copytree(hospital, tmp_path / "hospital")
    return tmp_path / "hospital"


def source(root, pictures, **changes):
    folders = {"normal_dir": "healthy", "abnormal_dir": "ill", "mask_dir": "drawn"}
    return Scans("wards", root=root, pictures=pictures, **{**folders, "window": WINDOW, "num_workers": 0, **changes})


def converted(data):
    """Return the folder of the 8-bit slices."""
    return scans.convert(data.folders, data.pictures, data.window)


def names(folder):
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return sorted(str(path.relative_to(folder)) for path in found)


def test_every_slice_is_converted_by_its_mask(hospital, tmp_path, caplog):
    out = converted(source(hospital, tmp_path / "out"))
    found = names(out)
    numbers = [f"q{number}_slice{index:03d}.png" for number in range(ABNORMAL) for index in range(SLICES)]
    ill = [name for name in numbers if int(name[-7:-4]) in MARKED]
    assert [name for name in found if name.startswith("abnormal/")] == [f"abnormal/{name}" for name in ill]
    assert [name for name in found if name.startswith("mask/")] == [f"mask/{name}" for name in ill]
    rest = [f"normal_test/abnormal/{name}" for name in numbers if name not in ill]
    assert [name for name in found if name.startswith("normal_test/")] == rest
    assert sum(name.startswith("normal/") for name in found) == NORMAL * SLICES
    assert f"normal/deep/p9_slice{SLICES - 1:03d}.png" in found
    assert "1 files are no images by their names and left out: ['notes.txt']" in caplog.text
    image, mask = (np.asarray(Image.open(out / kind / "q3_slice002.png")) for kind in ("abnormal", "mask"))
    assert set(np.unique(mask)) == {0, 255}
    assert (image[mask > 0] == round(255 * 0.9)).all()
    assert (image[mask == 0] < 128).all()
    assert mask[-9:, -9:].all()  # the patient's left and back


def test_scans_train_test_and_are_kept_apart_by_volume(hospital, tmp_path, tiny_config):
    few_shot = {"k_shot": 2, "train_batch_size": 44, "eval_batch_size": 16, "num_workers": 0}
    data = FewShot(source(hospital, tmp_path / "out", val_split_ratio=0.6), **few_shot)
    model = Mvfa(str(tiny_config), pretrained=None, image_size=56, max_epochs=1, visualizer=False)
    engine = Engine(default_root_dir=tmp_path / "run", accelerator="cpu", devices=1, enable_progress_bar=False)
    (results,) = engine.train(model, datamodule=data)
    assert 0 <= results["pixel_AUROC"] <= 1
    volumes = [
        {Path(path).name.partition("_slice")[0] for path in part.samples.image_path}
        for part in (data.support, data.val_data, data.test_data)
    ]
    assert sum(map(len, volumes)) == len(set.union(*volumes))


def test_other_models_of_anomalib_read_scans_too(hospital, tmp_path):
    data = source(hospital, tmp_path / "out", test_split_ratio=0.3, val_split_ratio=0.5, seed=1)
    data.setup()
    parts = [data.train_data, data.val_data, data.test_data]
    abnormal = [int((part.samples.label_index == LabelName.ABNORMAL).sum()) for part in parts]
    assert [len(part) for part in parts] == [(NORMAL - 2) * SLICES, (1 + 2) * SLICES, (1 + 3) * SLICES]
    assert abnormal == [0, 2 * len(MARKED), 3 * len(MARKED)]
    files = [{Path(path).name.partition("_slice")[0] for path in part.samples.image_path} for part in parts]
    assert sum(map(len, files)) == len(set().union(*files)) == NORMAL + ABNORMAL
    item = next(item for item in data.test_data if item.gt_label)
    assert item.gt_mask.sum() == 81


def test_normal_scans_to_test_on(copied, tmp_path):
    (copied / "healthy/deep").rename(copied / "well")
    data = source(copied, tmp_path / "out", normal_test_dir="well", val_split_mode="none")
    data.setup()
    assert (len(data.train_data), len(data.test_data)) == ((NORMAL - 1) * SLICES, SLICES + ABNORMAL * SLICES)
    for folder in ("healthy", "ill"):
        write_dicom(tmp_path / "few" / folder / f"{folder}.dcm", volume(1, lesion=False)[0][..., 0])
    with pytest.raises(ValueError, match=r"wards has no normal image to test on: test_split_ratio=0\.2 of its normal"):
        source(tmp_path / "few", tmp_path / "out", mask_dir=None).setup()


def test_nothing_is_converted_twice_unless_it_changed(copied, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        scans, "read_scan", lambda path, real=scans.read_scan, **how: (read.append(path.name), real(path, **how))[1]
    )
    data = source(copied, tmp_path / "out")
    files = NORMAL + 2 * ABNORMAL
    first = converted(data)
    assert converted(data) == first
    assert len(read) == files
    darker = converted(source(copied, tmp_path / "out", window=[0, 500]))
    assert len(read) == 2 * files
    assert np.asarray(Image.open(darker / "abnormal/q3_slice002.png")).max() == 255
    write_nifti(copied / "healthy/p0.nii.gz", volume(7, lesion=False)[0][..., :1])
    changed = converted(data)
    assert len(read) == 3 * files
    assert "normal/p0.png" in names(changed)
    assert "normal/p0_slice000.png" in names(first)  # which is not touched


def corrupt(root, how):
    """Put a mistake into a data set, and return what the error must say."""
    values, mask = volume(1, lesion=True)
    if how == "cut short":
        path = root / "healthy/p3.nii.gz"
        path.write_bytes(path.read_bytes()[:200])
        return r"p3\.nii\.gz cannot be read as a scan"
    if how == "no mask":
        (root / "drawn/q1.nii").unlink()
        return r"1 images have no mask \['q1'\], 0 masks have no image \[\]\. A mask has its scan's name"
    if how == "other shape":
        write_nifti(root / "drawn/q1.nii", mask[..., :2])
        return r"q1\.nii and its scan .*q1\.nii\.gz are not .* Slices, height and width: \(2, 24, 24\), \(4, 24, 24\)"
    if how == "other orientation":
        write_nifti(root / "drawn/q1.nii", mask, np.diag([-1, 1, 1, 1]))
        return r"(?s)q1\.nii and its scan .*q1\.nii\.gz are not on the same grid.*orientation: LAS, RAS;.*Resample it"
    if how == "other grid":
        write_nifti(root / "drawn/q1.nii", mask, np.diag([3, 3, 9, 1]))
        return r"(?s)q1\.nii and its scan .*q1\.nii\.gz are not on the same grid.*affine: "
    if how == "empty mask":
        write_nifti(root / "drawn/q1.nii", np.zeros_like(mask))
        return r"Masks mark nothing of \['q1'\], in the folder of abnormal scans\. Correct"
    if how == "two suffixes":
        write_nifti(root / "healthy/p3.nii", values)
        return r"p3\.nii.* and .*p3\.nii.* have the same name, but for the suffix"
    if how == "dangling link":
        (root / "healthy/p8.nii.gz").symlink_to(root / "gone.nii.gz")
        return r"p8\.nii\.gz is no file: a folder, or a link to nothing"
    if how == "one name":
        Image.new("L", (SIZE, SIZE)).save(root / "healthy/p0_slice001.png")
        return r"Two scans have the slice p0_slice001\.png"
    shutil.rmtree(root / "healthy")
    return r"healthy does not exist or holds no scan .*\. Give the folder of the scans"


MISTAKES = ["cut short", "no mask", "other shape", "other orientation", "other grid", "empty mask", "two suffixes"]


@pytest.mark.parametrize("how", [*MISTAKES, "dangling link", "one name", "no folder"])
def test_a_mistake_gives_one_error_and_leaves_the_slices_as_they_were(copied, tmp_path, how):
    data = source(copied, tmp_path / "out")
    if how in MISTAKES[::2]:
        converted(data)
    message, there = corrupt(copied, how), names(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        converted(data)
    assert names(tmp_path) == there


def test_what_is_left_out_is_asked_for(hospital, tmp_path):
    with pytest.raises(ValueError, match=r"q0\.nii\.gz has 4 slices, and only a mask tells .* Give mask_dir"):
        source(hospital, tmp_path / "out", mask_dir=None).prepare_data()
    with pytest.raises(ValueError, match=r"more than 8 bits a pixel and no intensity window of its own"):
        source(hospital, tmp_path / "out", window=None).prepare_data()
    with pytest.raises(ValueError, match=r"window=\[5, 1\] must be two ends"):
        source(hospital, tmp_path / "out", window=[5, 1])


@pytest.mark.parametrize("gone", [scans.RECORD, "normal/p0_slice001.png", "mask"])
def test_slices_that_are_gone_are_made_again_and_other_files_left_alone(hospital, tmp_path, gone):
    """As after a kill amid the removal of slices, or of a conversion."""
    (tmp_path / "thesis.txt").write_text("mine")
    data = source(hospital, tmp_path)
    out = converted(data)
    slices = names(tmp_path)
    partial = out.with_name(f".{out.name}.partial")
    shutil.copytree(out, partial)
    shutil.rmtree(out / gone) if (out / gone).is_dir() else (out / gone).unlink()
    assert converted(data) == out
    assert names(tmp_path) == slices
    assert "thesis.txt" in slices


@pytest.mark.parametrize(
    ("pictures", "changes", "message"),
    [
        ("healthy/out", {}, r"folder of pictures .*healthy/out\) is, or is inside, that of normal"),
        (".", {}, r"folder of normal .*healthy\) is, or is inside, that of pictures"),
        ("out", {"abnormal_dir": "healthy/deep"}, r"of abnormal .*healthy/deep\) is, or is inside, that of normal"),
        ("out", {"normal_test_dir": "healthy"}, "folder of normal .* is, or is inside, that of normal_test"),
    ],
)
def test_folders_are_apart(copied, pictures, changes, message):
    with pytest.raises(ValueError, match=message):
        source(copied, copied / pictures, **changes).prepare_data()
    assert (copied / "healthy/p0.nii.gz").exists()


def test_two_windows_and_two_patients_have_slices_of_their_own(copied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = source(copied, None), source(copied, None, window=[0, 500])
    first.setup()
    value = first.train_data[0].image.mean()
    second.setup()
    assert second.train_data[0].image.mean() > 1.5 * value
    assert first.train_data[0].image.mean() == value
    patients = [PredictScans(copied / f"ill/q{number}.nii.gz", WINDOW) for number in range(2)]
    assert not torch.equal(patients[0][0].image, patients[1][0].image)
    assert [len(patient) for patient in patients] == [SLICES, SLICES]


def test_folders_behind_links_are_read(copied, tmp_path):
    (copied / "healthy/deep").rename(tmp_path / "elsewhere")
    (copied / "healthy/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/round").symlink_to(copied / "healthy")
    found = names(converted(source(copied, tmp_path / "out")))
    assert sum(name.startswith("normal/") for name in found) == NORMAL * SLICES


def test_series_of_single_files_are_patients(tmp_path):
    ct = {"RescaleSlope": 1, "RescaleIntercept": -1024}  # a header that a mask has from its scan
    for number in range(4):
        for index in range(4):
            values, mask = volume(4 * number + index, lesion=True)
            write_dicom(tmp_path / f"healthy/p{number}/IM{index}", values[..., 0].T)
            write_dicom(tmp_path / f"ill/q{number}/IM{index}", values[..., index].T)
            write_dicom(tmp_path / f"drawn/q{number}/IM{index}", mask[..., index].astype(np.int16).T, **ct)
    data = source(tmp_path, tmp_path / "out")
    data.setup()
    found = names(data.root)
    assert sum(name.startswith("abnormal/") for name in found) == 4 * len(MARKED)
    assert sum(name.startswith("normal_test/abnormal/") for name in found) == 4 * (4 - len(MARKED))
    parts = [part.samples.image_path for part in (data.train_data, data.val_data, data.test_data)]
    patients = [{Path(path).parent.name for path in part} for part in parts]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 8
    shutil.rmtree(tmp_path / "drawn/q1")
    shutil.copytree(tmp_path / "healthy/p0", tmp_path / "drawn/q1")
    for index in range(4):
        write_dicom(tmp_path / f"drawn/q1/IM{index}", np.zeros((SIZE, SIZE), np.int16))
    with pytest.raises(ValueError, match=r"Masks mark nothing of \['q1'\]"):
        source(tmp_path, tmp_path / "out").prepare_data()


def test_a_full_disk_leaves_the_slices_that_were_there(hospital, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    converted(source(hospital, tmp_path))
    slices = names(tmp_path)
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match=r" was not written \(No space left on device\), and what was there is kept"):
        converted(source(hospital, tmp_path, window=[0, 500]))
    assert names(tmp_path) == slices


def test_8_bit_masks_follow_the_rule_of_8_bit_masks(tmp_path):
    values = volume(1, lesion=False)[0][..., 0].astype(np.uint16)
    marks = np.eye(SIZE, dtype=np.uint8) * 255
    for folder, content in (("healthy", values), ("ill", values), ("drawn", marks)):
        (tmp_path / folder).mkdir()
        Image.fromarray(content).save(tmp_path / folder / "a.png")
    out = converted(source(tmp_path, tmp_path / "out"))
    assert np.array_equal(Image.open(out / "mask/a.png"), marks)
    Image.fromarray(np.eye(SIZE, dtype=np.uint8)).save(tmp_path / "drawn/a.png")
    with pytest.raises(ValueError, match=r"has grey values such as \[1\], of 1 up to 127 that"):
        source(tmp_path, tmp_path / "out").prepare_data()


def test_prediction_has_a_map_and_an_image_for_every_slice(hospital, tmp_path, tiny_config):
    assert len(PredictScans(hospital / "ill/q0.nii.gz", WINDOW, tmp_path / "out")) == SLICES
    dataset = PredictScans(hospital / "ill", WINDOW, tmp_path / "out")
    assert len(dataset) == SLICES * ABNORMAL
    model = Mvfa(str(tiny_config), pretrained=None, image_size=56, few_shot_weight=0)
    quiet = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
    engine = Engine(default_root_dir=tmp_path / "run", callbacks=[SaveMaps()], **quiet)
    batches = engine.predict(model, dataset=dataset)
    assert sum(len(batch.anomaly_map) for batch in batches) == len(dataset)
    shown = names(next((tmp_path / "run").rglob("images")))
    assert [Path(name).name for name in shown] == [path.name for path in dataset.image_filenames]
    maps = next((tmp_path / "run").rglob("maps"))
    assert names(maps) == [f"scans/q{number}.nii.gz" for number in range(ABNORMAL)]
    whole = torch.from_numpy(read_scan(maps / "scans/q0.nii.gz").slices.copy())
    expected = torch.cat([batch.anomaly_map for batch in batches])[:SLICES, None]
    scaled = torch.nn.functional.interpolate(expected, (SIZE, SIZE), mode="bilinear")[:, 0]
    torch.testing.assert_close(whole, scaled, atol=1e-5, rtol=0)
    assert origin_of(dataset.image_filenames[-1]) == (hospital / f"ill/q{ABNORMAL - 1}.nii.gz", SLICES - 1)
    assert origin_of(hospital / "ill/q0.nii.gz") is None


def test_files_of_dicom_without_pixels_are_left_out_with_a_warning(tmp_path, caplog):
    for index in range(2):
        write_dicom(tmp_path / f"healthy/{index}.dcm", np.full((8, 8), index, np.int16))
    report = dcmread(tmp_path / "healthy/0.dcm")
    for name in ("Rows", "Columns", "PixelData"):
        del report[name]
    for name in ("report.dcm", "DICOMDIR"):
        report.save_as(tmp_path / "healthy" / name)
    target = scans.convert({"normal": tmp_path / "healthy"}, tmp_path / "pictures", (0, 1))
    assert [path.name for path in sorted(target.rglob("*.png"))] == ["0.png", "1.png"]
    assert "2 DICOM files without pixels" in caplog.text
    assert "DICOMDIR" in caplog.text


def test_a_series_of_single_files_shares_its_percentiles(tmp_path):
    for patient, scale in (("p0", 1), ("p1", 10)):
        for index in range(3):
            values = np.full((4, 4), scale * index, np.int16)
            write_dicom(tmp_path / "healthy" / patient / f"{index}.dcm", values)
    target = scans.convert({"normal": tmp_path / "healthy"}, tmp_path / "pictures", ("0%", "100%"))
    shown = {
        f"{path.parent.name}/{path.stem}": int(np.asarray(Image.open(path)).max()) for path in target.rglob("*.png")
    }
    assert shown == {
        f"{patient}/{index}": value for patient in ("p0", "p1") for index, value in enumerate((0, 128, 255))
    }
