"""Every format of scans: the values that were written, through the window that was asked for."""

import sys

import nibabel
import numpy as np
import pytest
from PIL import Image

from anomalib_mvfa.data.scan_files import check_window, is_scan, read_scan, stem_of, to_8_bit, write_like_nifti
from scan_recipe import write_dicom, write_nifti, write_rgb_16_bit

HOUNSFIELD = np.array([[-1024, -150], [0, 50], [250, 3000]], np.int16)
"""(3, 2)"""
SOFT_TISSUE = [[0, 0], [96, 128], [255, 255]]
"""The same from -150 to 250, by hand: 255 * 150 / 400 = 95.6 and 255 * 200 / 400 = 127.5."""
VOLUME = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
"""Of 2 columns from left to right, 3 rows from back to front, 4 slices from the feet up."""
LOWEST = [[16, 4], [20, 8]]


def shown(path, window=None):
    return [np.asarray(picture).tolist() for picture in to_8_bit(read_scan(path), check_window(window), path)]


# ---------------------------------------------------------------------------------------------------------------- DICOM


def test_dicom_is_shown_by_a_window_in_hounsfield_units(tmp_path):
    stored = (HOUNSFIELD + 1024).astype(np.uint16)
    path = write_dicom(tmp_path / "a.dcm", stored, RescaleSlope=1, RescaleIntercept=-1024)
    assert shown(path, [-150, 250]) == [SOFT_TISSUE]


def test_dicom_is_shown_by_its_own_window(tmp_path):
    """DICOM's linear window is a value narrower than its width, and half of one lower than its centre."""
    path = write_dicom(tmp_path / "a.dcm", HOUNSFIELD, WindowCenter=[50.5, 9], WindowWidth=[401, 9])
    assert shown(path) == [SOFT_TISSUE]
    exact = write_dicom(tmp_path / "b.dcm", HOUNSFIELD, WindowCenter=50, WindowWidth=400, VOILUTFunction="LINEAR_EXACT")
    assert shown(exact) == [SOFT_TISSUE]
    assert shown(exact, [-1024, 3000]) != [SOFT_TISSUE]  # what is asked for wins
    step = write_dicom(tmp_path / "c.dcm", HOUNSFIELD, WindowCenter=50.5, WindowWidth=1)
    assert shown(step) == [[[0, 0], [0, 0], [255, 255]]]


def test_dicom_film_that_is_stored_inverted_is_not_shown_so(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", HOUNSFIELD, PhotometricInterpretation="MONOCHROME1")
    assert shown(path, [-150, 250]) == [(255 - np.array(SOFT_TISSUE)).tolist()]


@pytest.mark.parametrize(("function", "width"), [(None, None), ("SIGMOID", 1), (None, 0), (None, -400)])
def test_dicom_without_a_linear_window_asks_for_one(tmp_path, function, width):
    elements = {"VOILUTFunction": function, "WindowCenter": 50, "WindowWidth": width}
    given = {name: value for name, value in elements.items() if value is not None}
    path = write_dicom(tmp_path / "a.dcm", HOUNSFIELD, **given)
    with pytest.raises(ValueError, match=r"a\.dcm has .* no intensity window .*=\[-150, 250\], .* window=\[1%, 99%"):
        shown(path)


def test_elements_that_were_emptied_are_absent_and_masks_read_as_they_are_stored(tmp_path):
    names = ("WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept")
    path = write_dicom(tmp_path / "a.dcm", HOUNSFIELD, **dict.fromkeys(names))
    assert shown(path, [-150, 250]) == [SOFT_TISSUE]
    path = write_dicom(tmp_path / "a.dcm", HOUNSFIELD, RescaleSlope=1, RescaleIntercept=-1024)
    assert read_scan(path, as_mask=True).slices[0].tolist() == HOUNSFIELD.tolist()


def test_dicom_of_few_bits_needs_a_window(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.array([[0, 15]], np.uint8), BitsStored=4, HighBit=3)
    assert shown(path, [0, 15]) == [[[0, 255]]]
    with pytest.raises(ValueError, match="no intensity window"):
        shown(path)


def test_8_bit_dicom_is_shown_as_it_is(tmp_path):
    grey = np.array([[0, 7], [200, 255]], np.uint8)
    colours = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert shown(write_dicom(tmp_path / "grey.dcm", grey), [1, 2]) == [grey.tolist()]
    assert shown(write_dicom(tmp_path / "colour.dcm", colours)) == [colours.tolist()]


def test_frames_are_slices(tmp_path):
    frames = np.stack([HOUNSFIELD, HOUNSFIELD[::-1]])
    assert shown(write_dicom(tmp_path / "a.dcm", frames), [-150, 250]) == [SOFT_TISSUE, SOFT_TISSUE[::-1]]


def test_frames_with_units_of_their_own_are_refused(tmp_path):
    from pydicom import Dataset

    group = Dataset()
    group.PixelValueTransformationSequence = [Dataset()]
    path = write_dicom(tmp_path / "a.dcm", HOUNSFIELD, PerFrameFunctionalGroupsSequence=[group])
    with pytest.raises(ValueError, match=r"a\.dcm cannot be read as a scan \(its frames have units of their own;"):
        read_scan(path)


# ---------------------------------------------------------------------------------------------------------------- NIfTI


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".NII"])
def test_nifti_is_cut_into_axial_slices_as_radiologists_look_at_them(tmp_path, suffix):
    """Row by row from the front, and in each from the patient's right, at column 1, to the left."""
    slices = read_scan(write_nifti(tmp_path / f"a{suffix}", VOLUME)).slices
    assert slices.shape == (4, 3, 2)
    assert slices[0].tolist() == [[VOLUME[1, 2, 0], VOLUME[0, 2, 0]], [20 - 4, 4], [12, 0]]
    assert slices[3].tolist() == (slices[0] + 3).tolist()


@pytest.mark.parametrize("flip", [(0, 1), (0, 1, 2)])
def test_nifti_stored_another_way_looks_the_same(tmp_path, flip):
    affine = np.diag([-1.0 if axis in flip else 1.0 for axis in range(3)] + [1.0])
    expected = read_scan(write_nifti(tmp_path / "a.nii", VOLUME))
    turned = read_scan(write_nifti(tmp_path / "b.nii", np.flip(VOLUME, flip), affine))
    assert np.array_equal(turned.slices, expected.slices)
    moved = affine[:, [1, 2, 0, 3]]
    moved = read_scan(write_nifti(tmp_path / "c.nii", np.flip(VOLUME, flip).transpose(1, 2, 0), moved))
    assert np.array_equal(moved.slices, expected.slices)
    assert (expected.orientation, moved.orientation != turned.orientation) == ("RAS", True)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1), (2, 3, 4, 1)])
def test_nifti_of_other_shapes(tmp_path, shape):
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    assert read_scan(write_nifti(tmp_path / "a.nii", values)).slices.shape == ((4 if 4 in shape else 1), 3, 2)


def test_percentiles_are_of_the_whole_volume(tmp_path):
    path = write_nifti(tmp_path / "a.nii", np.arange(101, dtype=np.float32).reshape(1, 1, 101))
    values = np.ravel(shown(path, ["10%", "90%"]))
    assert values.tolist() == np.round(255 * np.clip((np.arange(101) - 10) / 80, 0, 1)).tolist()
    assert np.ravel(shown(path, [10, "90%"])).tolist() == values.tolist()


@pytest.mark.parametrize("bad", [np.zeros((2, 2, 2, 3)), np.zeros((2, 2, 2), np.complex64)], ids=["4D", "complex"])
def test_nifti_that_is_no_volume_is_refused(tmp_path, bad):
    with pytest.raises(ValueError, match=r"a\.nii cannot be read as a scan \(its shape is .*one volume of grey values"):
        read_scan(write_nifti(tmp_path / "a.nii", bad))


def test_values_that_are_not_finite_are_refused(tmp_path):
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match=r"a\.nii has values that are not finite\. Replace them"):
            read_scan(write_nifti(tmp_path / "a.nii", np.full((2, 2, 2), value, np.float32)))


# --------------------------------------------------------------------------------------------------------- PNG and TIFF


def test_files_of_high_bit_depth(tmp_path):
    for name in ("a.png", "a.tif", "a.pgm"):
        Image.fromarray(np.array([[0, 1000], [33267, 65535]], np.uint16)).save(tmp_path / name)
        assert shown(tmp_path / name, [0, 65535]) == [[[0, 4], [129, 255]]]
    for kind in (np.float32, np.int32):
        Image.fromarray(HOUNSFIELD.astype(kind)).save(tmp_path / "a.tif")
        assert shown(tmp_path / "a.tif", [-150, 250]) == [SOFT_TISSUE]


def test_pages_are_slices(tmp_path):
    pages = [Image.fromarray(np.full((2, 2), value, np.uint16)) for value in (0, 50, 100)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert [picture[0][0] for picture in shown(tmp_path / "a.tif", [0, 100])] == [0, 128, 255]


def test_pages_of_several_depths_and_16_bit_colours_are_refused(tmp_path):
    first, second = Image.fromarray(np.full((2, 2), 9, np.uint8)), Image.fromarray(np.full((2, 2), 3000, np.uint16))
    for name, pages in (("a.tif", (first, second)), ("b.tif", (second, first))):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        with pytest.raises(ValueError, match=rf"{name} cannot be read .*pages of 8 bits and of more"):
            read_scan(tmp_path / name)
    write_rgb_16_bit(tmp_path / "a.png")
    write_dicom(tmp_path / "a.dcm", np.zeros((2, 2, 3), np.uint16))
    for name in ("a.png", "a.dcm"):
        with pytest.raises(ValueError, match=rf"{name} has colours of more than 8 bits\. Convert"):
            read_scan(tmp_path / name)


def test_tiff_of_high_bit_depth_whose_0_is_white(tmp_path):
    Image.fromarray(np.array([[0, 1000]], np.uint16)).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert shown(tmp_path / "a.tif", [0, 1000]) == [[[255, 0]]]
    Image.fromarray(np.full((2, 2), 77, np.uint16)).save(tmp_path / "b.png")
    assert not np.any(shown(tmp_path / "b.png", ["1%", "99%"]))  # one value is black


def test_a_window_whose_ends_meet_or_turn_round_in_a_file(tmp_path):
    values = np.zeros((4, 4, 2), np.int16)
    values[0, 0] = 100, 200
    path = write_nifti(tmp_path / "a.nii", values)
    assert [np.max(picture) for picture in shown(path, ["1%", "60%"])] == [255, 255]  # what is above is white
    with pytest.raises(ValueError, match=r"a\.nii: the window is from 500 to .* in this file\. Give the lower end"):
        shown(path, [500, "99%"])


# --------------------------------------------------------------------------------------------------- Names and packages


@pytest.mark.parametrize(
    ("name", "stem"),
    [("a.dcm", "a"), ("a.nii.gz", "a"), ("a.b.PNG", "a.b"), ("IM001", "IM001"), ("1.2.840.7", "1.2.840.7")],
)
def test_names(tmp_path, name, stem):
    write_dicom(tmp_path / name, HOUNSFIELD)
    assert is_scan(tmp_path / name)
    assert stem_of(tmp_path / name) == stem


def test_other_files_are_no_scans(tmp_path):
    for name in ("notes.txt", "LICENSE", "DICOMDIR.json"):
        (tmp_path / name).write_text("text")
        assert not is_scan(tmp_path / name)


@pytest.mark.parametrize("name", ["a.dcm", "a.nii.gz", "a.nii", "a.png", "a.tif"])
def test_broken_files_are_named(tmp_path, name):
    for content in (b"", b"text", b"\x89PNG\r\n\x1a\n"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} cannot be read as a scan \(.*Restore the file or take it out"):
            read_scan(tmp_path / name)


@pytest.mark.parametrize(("name", "package"), [("a.dcm", "pydicom"), ("a.nii", "nibabel")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    (tmp_path / name).touch()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{name} needs a further package, {package}: pip install 'anom"):
        read_scan(tmp_path / name)


@pytest.mark.parametrize(
    "window",
    [[1], [2, 1], [0, 0], ["99%", "1%"], ["0%", "101%"], ["-1%", 5], [0, float("nan")], ["low", "high"], 5, [None, 1]],
)
def test_windows_that_are_none(window):
    with pytest.raises(ValueError, match=r"window=.* must be two ends, the lower one first: values such as"):
        check_window(window)


def test_windows():
    assert check_window(None) is None
    assert check_window([-150, 250]) == (-150.0, 250.0)
    assert check_window(("1%", "99.5 %")) == ("1%", "99.5%")
    assert check_window(["0", "5"]) == (0.0, 5.0)


@pytest.mark.parametrize(
    ("slope", "intercept", "window", "expected"),
    [(-1, 255, (0, 100), [255, 255, 0]), (4, -1024, (-1024, -624), [0, 255, 255])],
)
def test_8_bits_in_units_of_their_own_are_shown_in_these_units(tmp_path, slope, intercept, window, expected):
    values = np.array([[0, 100, 255]], np.uint8)
    path = write_dicom(tmp_path / "a.dcm", values, RescaleSlope=slope, RescaleIntercept=intercept)
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.slices[0], values.astype(float) * slope + intercept)
    np.testing.assert_array_equal(to_8_bit(scan, None, path)[0], values if slope > 0 else 255 - values)
    np.testing.assert_array_equal(to_8_bit(scan, window, path)[0], [expected])
    np.testing.assert_array_equal(read_scan(path, as_mask=True).slices[0], values)


def test_files_without_preamble_are_read(tmp_path):
    values = np.arange(6, dtype=np.int16).reshape(2, 3)
    path = write_dicom(tmp_path / "a.dcm", values, RescaleSlope=2, RescaleIntercept=-1)
    path.write_bytes(path.read_bytes()[132:])
    np.testing.assert_array_equal(read_scan(path).slices, [2 * values - 1])
    path.write_bytes(b"no picture at all" * 20)
    with pytest.raises(ValueError, match=r"a\.dcm cannot be read as a scan .*neither DICOM's preamble nor"):
        read_scan(path)


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1), (-1, -1, 1)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_slices_are_written_in_the_geometry_of_their_scan(tmp_path, signs, order):
    """Whatever the axes on disk, here of 2, 3 and 4 voxels of 2, 3 and 4 mm."""
    affine = np.zeros((4, 4))
    affine[order, range(3)] = np.multiply(signs, (2, 3, 4))
    affine[:, 3] = [5, 6, 7, 1]
    scan = write_nifti(tmp_path / "scan.nii.gz", VOLUME, affine)
    slices = read_scan(scan).slices.astype(np.float32)
    assert write_like_nifti(slices, scan, tmp_path / "map.nii.gz")
    found = nibabel.load(tmp_path / "map.nii.gz")
    assert np.array_equal(found.affine, affine)
    assert np.array_equal(found.get_fdata(), VOLUME)
    assert not write_like_nifti(slices[1:], scan, tmp_path / "part.nii.gz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.nii.gz", "scan.nii.gz"]
