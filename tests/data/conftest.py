"""Data sets of other forms, made of the slices of `phantom_root`, and the real images where they are."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from PIL import Image

from anomalib_mvfa.data.phantom import write_phantom


@pytest.fixture(scope="session")
def write_category() -> Callable[..., Path]:
    """Return a function that writes a category of BMAD, in anomalib's layout or in the published one."""

    def write(root, name, seed=0, *, published=False, with_masks=True, suffix=".png", counts=(2, 3, 4)):
        scratch = root / f"scratch-{name}"
        train, valid, test = counts
        write_phantom(scratch, seed=seed, size=32, train=train, valid=valid, test=test)
        folder = root / (f"{name}_AD" if published else name)
        (scratch / "Brain").rename(folder)
        scratch.rmdir()
        for mask_folder in folder.rglob("label"):
            if not with_masks:
                shutil.rmtree(mask_folder)
            elif published:
                mask_folder.rename(mask_folder.with_name("anomaly_mask"))
        if published:
            shutil.rmtree(folder / "train")
        for path in [path for path in folder.rglob("*.png") if path.suffix != suffix and path.parent.name == "img"]:
            with Image.open(path) as image:
                image.save(path.with_suffix(suffix))
            path.unlink()
        return folder

    return write


@pytest.fixture(scope="session")
def bmad_template(tmp_path_factory, write_category) -> Path:
    """Return what `bmad_root` copies."""
    root = tmp_path_factory.mktemp("bmad_template")
    write_category(root, "Brain", 0)
    write_category(root, "Retina_RESC", 1, published=True)
    write_category(root, "Retina_OCT2017", 2, published=True, with_masks=False, suffix=".jpeg")
    write_category(root, "Chest", 3, with_masks=False, suffix=".JPG")
    return root


@pytest.fixture
def bmad_root(tmp_path, bmad_template) -> Path:
    """Return a root, to do with as one likes, with four categories: both layouts, with and without masks, two OCT."""
    return Path(shutil.copytree(bmad_template, tmp_path / "bmad"))


def _slices(root: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Normal slices to train on; labelled normal ones; labelled abnormal ones, whose masks lie beside."""
    brain = root / "Brain"
    kinds = ("train/good", "[vt][ae][ls]*/good", "[vt][ae][ls]*/Ungood")
    return tuple(sorted(brain.glob(f"{kind}/img/*.png")) for kind in kinds)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _mask(path: Path) -> Path:
    return path.parent.parent / "label" / path.name


def _write_mvtec(root: Path, slices: tuple[list[Path], list[Path], list[Path]]) -> None:
    train, normal, abnormal = slices
    for i, path in enumerate(train):
        _copy(path, root / "train" / "good" / f"{i:03d}.png")
    for i, path in enumerate(normal):
        _copy(path, root / "test" / "good" / f"{i:03d}.png")
    for i, path in enumerate(abnormal):  # the same names in both folders, as in the real data
        _copy(path, root / "test" / f"bad{i % 2}" / f"{i // 2:03d}.png")
        _copy(_mask(path), root / "ground_truth" / f"bad{i % 2}" / f"{i // 2:03d}_mask.png")


@pytest.fixture(scope="session")
def mvtec_root(tmp_path_factory) -> Path:
    """Return a root of MVTec AD's form with the category metal_nut: 10 normal and 10 abnormal test images."""
    root = tmp_path_factory.mktemp("mvtec")
    write_phantom(root / "slices", seed=1, size=64, train=4, valid=6, test=4)  # no images of the other data sets
    _write_mvtec(root / "metal_nut", _slices(root / "slices"))
    return root


@pytest.fixture(scope="session")
def visa_root(tmp_path_factory, phantom_root) -> Path:
    """Return a root of VisA's form with the category candle."""
    root = tmp_path_factory.mktemp("visa")
    _write_mvtec(root / "visa_pytorch" / "candle", _slices(phantom_root))
    return root


@pytest.fixture(scope="session")
def own_root(tmp_path_factory, phantom_root) -> Path:
    """Return somebody's own folders: train, normal, abnormal and mask, in names of 5 patients with both kinds."""
    root = tmp_path_factory.mktemp("own")
    train, normal, abnormal = _slices(phantom_root)
    for i, path in enumerate(train):
        _copy(path, root / "train" / f"p9_{i}.png")
    for kind, paths in (("normal", normal), ("abnormal", abnormal)):
        for i, path in enumerate(paths):
            _copy(path, root / kind / f"p{i // 2}_{kind[0]}{i}.png")
    for i, path in enumerate(abnormal):
        _copy(_mask(path), root / "mask" / f"p{i // 2}_a{i}.png")
    return root


@pytest.fixture
def own_folder(own_root) -> dict:
    """Return the mapping of a Folder datamodule over `own_root`."""
    init_args = {"name": "own", "root": str(own_root), "normal_dir": "train", "abnormal_dir": "abnormal"}
    init_args |= {"normal_test_dir": "normal", "mask_dir": "mask"}
    return {"class_path": "Folder", "init_args": init_args}


@pytest.fixture(scope="session")
def bmad_mini() -> Path:
    """Return the folder of real images: BMAD_MINI, or shared/data/bmad_mini beside the checkout."""
    default = Path(__file__).parents[3] / "shared" / "data" / "bmad_mini"
    folder = Path(os.environ.get("BMAD_MINI", default))
    if not folder.is_dir():
        pytest.skip("BMAD_MINI names no folder of real images")
    return folder


@pytest.fixture
def contents() -> Callable[[Iterable[str]], set[str]]:
    """Return a function from files to the hashes of what is in them."""
    return lambda paths: {hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}
