"""A seeded toy data set of drawn brain slices with lesions, to try the software without a download; not for results."""

import tempfile
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from ..io import explain_failed_write
from .bmad import LABEL_FOLDERS, BMADOneClass


def _field(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """Return a smooth random field ``(size, size)`` of about unit variance, from a coarse grid of noise."""
    coarse = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def draw_slice(rng: np.random.Generator, size: int, lesions: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw an axial slice, 8-bit grey ``(size, size)``, and the mask of its bright lesions, which are drawn last."""
    fine = 2 * size  # drawn at twice the size and reduced, for soft edges
    y, x = np.mgrid[-1 : 1 : fine * 1j, -1 : 1 : fine * 1j] + 0.02 * np.stack([_field(rng, 6, fine) for _ in "yx"])
    radius = np.hypot(x / rng.uniform(0.72, 0.8), y / rng.uniform(0.86, 0.94))  # 1 at the skin
    folds, depth = np.abs(_field(rng, 24, fine)), radius + 0.05 * _field(rng, 16, fine)
    ventricles = np.hypot((np.abs(x) - 0.1) / rng.uniform(0.04, 0.08), y / rng.uniform(0.2, 0.3)) < 1
    white, fluid = depth < 0.66, ((depth > 0.6) & (folds < 0.15)) | ventricles
    levels = [0, rng.uniform(0.55, 0.9), 0.05, 0.08, rng.uniform(0.35, 0.41)]
    head = np.select([radius > 1, radius > 0.93, radius > 0.84, fluid, white], levels, rng.uniform(0.51, 0.57))
    shade = 1 + 0.07 * _field(rng, 3, fine) + 0.05 * _field(rng, 32, fine)
    gain, noise = rng.uniform(0.85, 1.15), rng.normal(scale=rng.uniform(0.012, 0.025), size=(2, size, size))

    lesion = np.zeros((fine, fine), bool)
    for _ in range(lesions):
        row, column = rng.choice(np.argwhere((depth < 0.6) & ~ventricles))
        distance = np.hypot(x - x[row, column], y - y[row, column]) * np.exp(0.2 * _field(rng, 8, fine))
        lesion |= (distance < rng.uniform(0.07, 0.15)) & (radius < 0.84)
    head = gain * shade * np.where(lesion, rng.uniform(0.64, 0.82), head)
    reduced = [np.asarray(Image.fromarray(plane.astype(np.float32)).reduce(2)) for plane in (head, lesion)]
    image = np.hypot(reduced[0] + noise[0], noise[1])  # magnitude images have Rician noise
    return (255 * image).clip(0, 255).round().astype(np.uint8), reduced[1] > 0.5


def write_phantom(root: Path, seed: int = 0, size: int = 128, train: int = 16, valid: int = 16, test: int = 24) -> None:
    """Write a data set in the layout of BMAD to ``root / "Brain"``, complete or not at all, unless that exists.

    There are ``train`` normal images, and ``valid`` and ``test`` normal and as many abnormal ones, of ``size`` pixels a
    side. Each depends on the seed and its place, not on their number. A killed run leaves at most a hidden folder.
    """
    target = root / "Brain"
    if target.exists():
        return
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".Brain-", dir=root) as scratch, explain_failed_write(target):
        for split, (part, count) in enumerate({"train": train, "valid": valid, "test": test}.items()):
            for label, name in enumerate(LABEL_FOLDERS if part != "train" else ["good"]):
                folders = [Path(scratch, "Brain", part, name, kind) for kind in ("img", "label")[: 1 + label]]
                for folder in folders:
                    folder.mkdir(parents=True)
                for index in range(count):
                    rng = np.random.default_rng([seed, split, label, index])
                    image, mask = draw_slice(rng, size, lesions=label * (1 + index % 3))
                    for folder, plane in zip(folders, (image, np.uint8(255) * mask), strict=False):
                        Image.fromarray(plane).save(folder / f"{index:03d}.png")
        try:
            Path(scratch, "Brain").rename(target)
        except OSError:
            if not target.exists():  # else another process was faster, with the same images
                raise


class BrainPhantom(BMADOneClass):
    """Brain slices that are drawn on first use, in BMAD's layout: to try the software without a data set.

    Args:
        root: Folder that is to hold the images.
        size: Height and width of the images in pixels.
        seed: Seed of all images.
        kwargs: Further arguments of anomalib's ``BMAD``: batch sizes, workers, augmentations and splits.
    """

    def __init__(self, root: Path | str = "./datasets/Phantom", size: int = 128, seed: int = 0, **kwargs) -> None:  # noqa: ANN003
        super().__init__(Path(root) / f"size{size}-seed{seed}", "Brain", seed=seed, **kwargs)
        self.size = size

    @property
    def name(self) -> str:
        """Name of the data set, under which results are filed."""
        return "Phantom"

    def prepare_data(self) -> None:
        """Draw the images, unless they are there."""
        write_phantom(self.root, self.seed or 0, self.size)


class Phantom(BrainPhantom):
    """The former name of :class:`BrainPhantom`."""

    def __init__(self, *args, **kwargs) -> None:  # noqa: ANN002, ANN003
        warnings.warn("Phantom is now called BrainPhantom; use that name.", DeprecationWarning, stacklevel=2)
        super().__init__(*args, **kwargs)
