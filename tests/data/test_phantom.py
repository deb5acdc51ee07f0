"""The phantom is repeatable, well laid out, and has lesions that one must look for."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_mvfa.data import BrainPhantom, Phantom, phantom
from anomalib_mvfa.data.phantom import draw_slice, write_phantom


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.array(image)


def _pair(key: int, lesions: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw the same head with and without lesions."""
    image, mask = draw_slice(np.random.default_rng(key), 128, lesions)
    healthy, nothing = draw_slice(np.random.default_rng(key), 128, 0)
    assert not nothing.any()
    return image.astype(float), healthy.astype(float), mask


def _dilate(mask: np.ndarray, steps: int) -> np.ndarray:
    for _ in range(steps):
        mask = mask | np.roll(mask, 1, 0) | np.roll(mask, -1, 0) | np.roll(mask, 1, 1) | np.roll(mask, -1, 1)
    return mask


@pytest.fixture(scope="module")
def brain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the default data set."""
    root = tmp_path_factory.mktemp("phantom")
    write_phantom(root)
    assert [path.name for path in root.iterdir()] == ["Brain"]
    return root / "Brain"


def test_slice_is_a_function_of_the_generator() -> None:
    image, mask = draw_slice(np.random.default_rng(7), 128, 2)
    again, mask_again = draw_slice(np.random.default_rng(7), 128, 2)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(mask, mask_again)
    assert (image.dtype, image.shape, mask.dtype, mask.shape) == (np.uint8, (128, 128), np.bool_, (128, 128))
    assert (image != draw_slice(np.random.default_rng(8), 128, 2)[0]).any()


@pytest.mark.parametrize("size", [32, 45, 64])
def test_every_lesion_leaves_a_mask(size: int) -> None:
    """Small slices are drawn as well."""
    for key in range(30):
        image, mask = draw_slice(np.random.default_rng(key), size, 1)
        assert image.shape == mask.shape == (size, size)
        assert mask.any()


def test_lesions_are_bright_and_local() -> None:
    """A lesion is brighter than its surroundings and leaves the rest of the slice as it was."""
    for key in range(10):
        image, healthy, mask = _pair(key)
        ring = _dilate(mask, 6) & ~_dilate(mask, 3)
        assert image[mask].mean() > image[ring].mean() + 25
        far = ~_dilate(mask, 6)
        np.testing.assert_allclose(image[far], healthy[far], atol=1)
        assert 0.001 < mask.mean() < 0.06


def test_lesions_are_inside_the_skull() -> None:
    """From each side of the image one meets the bright scalp and then the dark skull before a lesion."""
    for key in range(10):
        _, healthy, mask = _pair(key, lesions=3)
        for turns in range(4):
            view, lesion = np.rot90(healthy, turns), np.rot90(mask, turns)
            scalp = np.maximum.accumulate(view > 70, axis=0)
            skull = np.maximum.accumulate(scalp & (view < 40), axis=0)
            assert skull[lesion].all()


def test_layout(brain: Path) -> None:
    """Folders, names and values are those that the BMAD reader expects."""
    counts = {str(path.parent.relative_to(brain).as_posix()): 0 for path in brain.rglob("*.png")}
    for path in brain.rglob("*.png"):
        counts[path.parent.relative_to(brain).as_posix()] += 1
    assert counts == {
        "train/good/img": 16,
        **{f"valid/{folder}": 16 for folder in ("good/img", "Ungood/img", "Ungood/label")},
        **{f"test/{folder}": 24 for folder in ("good/img", "Ungood/img", "Ungood/label")},
    }
    for split in ("valid", "test"):
        for path in (brain / split / "Ungood" / "img").iterdir():
            image, mask = _read(path), _read(brain / split / "Ungood" / "label" / path.name)
            assert image.shape == mask.shape == (128, 128)
            assert set(np.unique(mask)) == {0, 255}


def test_images_are_distinct(brain: Path) -> None:
    """No head occurs twice, within a split or across splits."""
    images = [_read(path).tobytes() for path in brain.rglob("img/*.png")]
    assert len(set(images)) == len(images) == 96


def test_brightness_does_not_separate(brain: Path) -> None:
    """The mean intensity of an image says little about whether it has a lesion."""
    normal, abnormal = (
        np.array([_read(path).mean() for path in (brain / "test" / kind / "img").iterdir()])
        for kind in ("good", "Ungood")
    )
    auroc = (abnormal[:, None] > normal).mean()
    assert 0.25 < auroc < 0.75


def test_images_depend_on_seed_but_not_on_counts(brain: Path, tmp_path: Path) -> None:
    """A larger data set starts with the images of a smaller one."""
    write_phantom(tmp_path / "new" / "small", train=2, valid=0, test=1)
    write_phantom(tmp_path / "other", seed=1, train=1, valid=0, test=0)
    small = tmp_path / "new" / "small" / "Brain"
    paths = sorted(path.relative_to(small) for path in small.rglob("*.png"))
    assert len(paths) == 5
    for path in paths:
        np.testing.assert_array_equal(_read(small / path), _read(brain / path))
    first = Path("train", "good", "img", "000.png")
    assert (_read(tmp_path / "other" / "Brain" / first) != _read(brain / first)).any()


def test_existing_data_stay(tmp_path: Path) -> None:
    """A folder that is there already is not touched."""
    (tmp_path / "Brain").mkdir()
    write_phantom(tmp_path)
    assert not list((tmp_path / "Brain").iterdir())


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a partial data set nor scratch files survive."""
    calls = []

    def interrupted(rng: np.random.Generator, size: int, lesions: int) -> tuple[np.ndarray, np.ndarray]:
        calls.append(lesions)
        if len(calls) == 3:
            raise KeyboardInterrupt
        assert not (tmp_path / "Brain").exists()
        return draw_slice(rng, size, lesions)

    monkeypatch.setattr(phantom, "draw_slice", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path, size=32)
    assert not list(tmp_path.iterdir())


def test_concurrent_writes_both_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower of two writers keeps what the faster one wrote."""
    counts = {"train": 1, "valid": 1, "test": 1}

    def overtaken(rng: np.random.Generator, size: int, lesions: int) -> tuple[np.ndarray, np.ndarray]:
        monkeypatch.setattr(phantom, "draw_slice", draw_slice)
        write_phantom(tmp_path, size=32, **counts)
        return draw_slice(rng, size, lesions)

    monkeypatch.setattr(phantom, "draw_slice", overtaken)
    write_phantom(tmp_path, size=32, **counts)
    assert [path.name for path in tmp_path.iterdir()] == ["Brain"]
    assert len(list((tmp_path / "Brain").rglob("*.png"))) == 7


def test_the_former_name_warns(tmp_path: Path) -> None:
    """It draws what the new name does."""
    with pytest.warns(DeprecationWarning, match="Phantom is now called BrainPhantom"):
        former = Phantom(tmp_path, size=32, seed=3)
    assert isinstance(former, BrainPhantom)
    assert (former.name, former.root) == ("Phantom", tmp_path / "size32-seed3")
