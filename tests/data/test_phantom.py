"""The phantom is repeatable, well laid out, and has lesions that one must look for."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_mvfa.data import BrainPhantom, Phantom, phantom
from anomalib_mvfa.data.phantom import draw_slice, write_phantom


def read(path):
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.array(image)


def draw(key, size=128, lesions=1):
    return draw_slice(np.random.default_rng(key), size, lesions)


def dilate(mask, steps):
    for _ in range(steps):
        mask = mask | np.roll(mask, 1, 0) | np.roll(mask, -1, 0) | np.roll(mask, 1, 1) | np.roll(mask, -1, 1)
    return mask


@pytest.fixture(scope="module")
def brain(tmp_path_factory):
    """The default data set, but for its size."""
    root = tmp_path_factory.mktemp("phantom")
    write_phantom(root, size=64)
    assert [path.name for path in root.iterdir()] == ["Brain"]
    return root / "Brain"


def test_slice_is_a_function_of_the_generator():
    (image, mask), (again, mask_again) = draw(7), draw(7)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(mask, mask_again)
    assert (image.dtype, image.shape, mask.dtype, mask.shape) == (np.uint8, (128, 128), np.bool_, (128, 128))
    assert (image != draw(8)[0]).any()


@pytest.mark.parametrize("size", [32, 45])
def test_every_lesion_leaves_a_mask_in_small_slices_too(size):
    for image, mask in (draw(key, size) for key in range(20)):
        assert image.shape == mask.shape == (size, size)
        assert mask.any()


def test_lesions_are_bright_and_local_and_inside_the_skull():
    for key in range(10):
        (image, mask), (healthy, nothing) = draw(key), draw(key, lesions=0)
        image, healthy = image.astype(float), healthy.astype(float)
        assert not nothing.any()
        assert image[mask].mean() > image[dilate(mask, 6) & ~dilate(mask, 3)].mean() + 25
        np.testing.assert_allclose(image[~dilate(mask, 6)], healthy[~dilate(mask, 6)], atol=1)
        assert 0.001 < mask.mean() < 0.06
        for turns in range(4):  # from each side one meets the bright scalp and then the dark skull before a lesion
            seen, lesion = np.rot90(healthy, turns), np.rot90(mask, turns)
            scalp = np.maximum.accumulate(seen > 70, axis=0)
            assert np.maximum.accumulate(scalp & (seen < 40), axis=0)[lesion].all()


def test_layout(brain):
    counts = Counter(path.parent.relative_to(brain).as_posix() for path in brain.rglob("*.png"))
    folders = ("good/img", "Ungood/img", "Ungood/label")
    assert counts == {"train/good/img": 16} | {
        f"{split}/{folder}": count for split, count in (("valid", 16), ("test", 24)) for folder in folders
    }
    for path in brain.glob("*/Ungood/img/*"):
        image, mask = read(path), read(path.parents[1] / "label" / path.name)
        assert image.shape == mask.shape == (64, 64)
        assert set(np.unique(mask)) == {0, 255}


def test_images_are_distinct_and_brightness_does_not_separate_them(brain):
    assert len({read(path).tobytes() for path in brain.rglob("img/*.png")}) == 96
    normal, abnormal = (
        np.array([read(path).mean() for path in brain.glob(f"test/{kind}/img/*")]) for kind in ("good", "Ungood")
    )
    assert 0.25 < (abnormal[:, None] > normal).mean() < 0.75


def test_images_depend_on_seed_but_not_on_counts(brain, tmp_path):
    write_phantom(tmp_path / "new/small", size=64, train=2, valid=0, test=1)
    write_phantom(tmp_path / "other", seed=1, size=64, train=1, valid=0, test=0)
    small = tmp_path / "new/small/Brain"
    paths = sorted(path.relative_to(small) for path in small.rglob("*.png"))
    assert len(paths) == 5
    for path in paths:
        np.testing.assert_array_equal(read(small / path), read(brain / path))
    first = "train/good/img/000.png"
    assert (read(tmp_path / "other/Brain" / first) != read(brain / first)).any()


def test_existing_data_stay(tmp_path):
    (tmp_path / "Brain").mkdir()
    write_phantom(tmp_path)
    assert not list((tmp_path / "Brain").iterdir())


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def interrupted(rng, size, lesions):
        calls.append(lesions)
        assert not (tmp_path / "Brain").exists()
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw_slice(rng, size, lesions)

    monkeypatch.setattr(phantom, "draw_slice", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path, size=32)
    assert not list(tmp_path.iterdir())


def test_the_slower_of_two_writers_keeps_what_the_faster_wrote(tmp_path, monkeypatch):
    counts = {"size": 32, "train": 1, "valid": 1, "test": 1}

    def overtaken(rng, size, lesions):
        monkeypatch.setattr(phantom, "draw_slice", draw_slice)
        write_phantom(tmp_path, **counts)
        return draw_slice(rng, size, lesions)

    monkeypatch.setattr(phantom, "draw_slice", overtaken)
    write_phantom(tmp_path, **counts)
    assert [path.name for path in tmp_path.iterdir()] == ["Brain"]
    assert len(list((tmp_path / "Brain").rglob("*.png"))) == 7


def test_the_former_name_warns():
    with pytest.warns(DeprecationWarning, match="Phantom is now called BrainPhantom"):
        former = Phantom("datasets", size=32, seed=3)
    assert isinstance(former, BrainPhantom)
    assert (former.name, former.root) == ("Phantom", Path("datasets/size32-seed3"))
