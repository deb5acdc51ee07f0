"""A seeded toy data set: axial, FLAIR-like brain slices with and without white-matter lesions.

It lets the tests, the examples and a first try of the model run without a download. It is no substitute for patients:
good numbers on it say that the code works, not that the method does.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..io import explain_full_disk
from .bmad import KINDS, BMADOneClass

Field: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]
Knot: TypeAlias = tuple[float, float, float]  # x, y and radius

_SPLITS = ("train", "valid", "test")


def _step(distance: Field, width: float) -> Field:
    """Soft edge: 0 well below a distance of zero, 1 well above it."""
    return 0.5 + 0.5 * np.tanh(2.0 * distance / width)


def _waves(rng: np.random.Generator, x: Field, y: Field, low: float, high: float, count: int = 12) -> Field:
    """Smooth random field of about unit variance, made of plane waves with frequencies between low and high."""
    total = np.zeros_like(x)
    for _ in range(count):
        k, angle, phase = rng.uniform(low, high), rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
        total += np.cos(k * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    return total * float(np.sqrt(2.0 / count))


def _harmonics(rng: np.random.Generator, theta: Field, orders: range) -> Field:
    """Random periodic function of the angle, whose higher orders are weaker."""
    total = np.zeros_like(theta)
    for order in orders:
        total += rng.normal() / order * np.cos(order * theta + rng.uniform(0, 2 * np.pi))
    return total


def _tube(x: Field, y: Field, a: Knot, b: Knot) -> Field:
    """Signed distance (negative inside) to a tube whose radius goes from that of a to that of b."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    t = np.clip(((x - a[0]) * dx + (y - a[1]) * dy) / (dx * dx + dy * dy), 0.0, 1.0)
    return np.hypot(x - a[0] - t * dx, y - a[1] - t * dy) - (a[2] + t * (b[2] - a[2]))


def _union(*distances: Field) -> Field:
    """Distance to the nearest of several shapes."""
    nearest: Field = np.minimum.reduce(distances)
    return nearest


def _fluid_distance(rng: np.random.Generator, x: Field, y: Field, theta: Field, depth: Field, pixel: float) -> Field:
    """Distance to the nearest fluid outside the brain; the cortex is the ribbon that follows it."""
    # Sulci are the zero lines of a field that oscillates along the surface and drifts with depth; dividing by the
    # gradient turns its values into distances, so that the ribbon has the same thickness everywhere.
    field = 1.3 * _waves(rng, x, y, 14, 26)
    for order in rng.choice(np.arange(10, 24), size=6, replace=False):
        field += np.cos(order * theta + rng.uniform(-9, 9) * depth + rng.uniform(0, 2 * np.pi))
    rows, columns = np.gradient(field, pixel)
    lateral = np.abs(field) / (np.hypot(rows, columns) + 1.0)
    floor = 0.12 + 0.16 * _harmonics(rng, theta, range(4, 14))
    sulci = np.hypot(lateral, np.maximum(depth - floor, 0.0))
    x, y = x + 0.012 * _waves(rng, x, y, 8, 16), y + 0.012 * _waves(rng, x, y, 8, 16)
    fissure = np.hypot(x, np.maximum(np.minimum(y + 0.36, 0.44 - y), 0.0))  # interrupted by the corpus callosum
    side = np.abs(x)
    sylvian = _tube(side, y, (0.64, 0.08, 0.006), (0.43, -0.03, 0.010))
    front_insula = _tube(side, y, (0.43, -0.03, 0.008), (0.36, -0.17, 0.0))
    back_insula = _tube(side, y, (0.43, -0.03, 0.008), (0.40, 0.12, 0.0))
    return _union(depth, sulci, fissure, sylvian, front_insula, back_insula)


def _ventricle_distance(rng: np.random.Generator, x: Field, y: Field) -> Field:
    """Signed distance to the ventricles: on each side a frontal horn and an atrium, and between them the third."""
    size, side = rng.uniform(-0.006, 0.018), np.abs(x)
    return _union(
        _tube(side, y, (0.035, -0.05, 0.008 + size / 2), (0.065, -0.19, 0.026 + size)),
        _tube(side, y, (0.065, -0.19, 0.026 + size), (0.130, -0.29, 0.018 + size)),
        _tube(side, y, (0.140, 0.18, 0.012 + size), (0.200, 0.27, 0.036 + size)),
        _tube(side, y, (0.200, 0.27, 0.036 + size), (0.185, 0.42, 0.006 + size)),
        _tube(side, y, (0.0, 0.02, 0.009 + size / 3), (0.0, 0.14, 0.009 + size / 3)),
    )


def _lesion(rng: np.random.Generator, x: Field, y: Field, white: Mask, ventricle: Field, softness: float) -> Field:
    """Opacity of one lesion: a star-shaped outline around a point of the white matter."""
    extent = 0.08 + 0.14 * rng.random() ** 1.5  # small ones are more common
    white = white & (ventricle > 0.5 * extent)  # farther off for larger ones, which else would swallow a ventricle
    near = white & (ventricle < extent)
    candidates = np.flatnonzero(near if rng.random() < 0.4 and near.any() else white)
    row, column = np.unravel_index(rng.choice(candidates), white.shape)
    dx, dy = x - x[row, column], y - y[row, column]
    theta = np.arctan2(dy, dx)
    outline = extent * np.exp(0.22 * _harmonics(rng, theta, range(2, 9)))
    return _step(outline - np.hypot(dx, dy), softness)


def draw_slice(rng: np.random.Generator, size: int, lesions: int) -> tuple[NDArray[np.uint8], Mask]:
    """Draw one axial slice, the forehead up.

    Lesions are drawn last: from equal generators, slices with and without them show the same head and noise.

    Args:
        rng: Source of all variation.
        size: Height and width in pixels.
        lesions: How many lesions to draw; they may touch each other.

    Returns:
        The grey image, of shape (size, size), and the mask of the lesions.
    """
    pixel = 2.0 / size
    edge = max(1.5 * pixel, 0.02)  # no sharper than the pixels, nor than tissue looks at any resolution
    grid = (np.arange(size) + 0.5) * pixel - 1.0
    v, u = np.meshgrid(grid, grid, indexing="ij")
    # Pose, then a gentle warp, which also makes the two hemispheres differ.
    angle, scale = np.deg2rad(rng.uniform(-8, 8)), rng.uniform(0.94, 1.06)
    u0, v0 = (u - rng.uniform(-0.05, 0.05)) / scale, (v - rng.uniform(-0.05, 0.05)) / scale
    x, y = u0 * np.cos(angle) + v0 * np.sin(angle), v0 * np.cos(angle) - u0 * np.sin(angle)
    x, y = x + 0.014 * _waves(rng, x, y, 2, 7), y + 0.014 * _waves(rng, x, y, 2, 7)

    theta, radius = np.arctan2(y, x), np.hypot(x, y)
    width, height = rng.uniform(0.66, 0.72), rng.uniform(0.82, 0.87)
    outline = (np.abs(np.cos(theta) / width) ** 2.2 + np.abs(np.sin(theta) / height) ** 2.2) ** (-1 / 2.2)
    outline *= 1.0 + 0.03 * np.sin(theta) + 0.012 * _harmonics(rng, theta, range(2, 7))  # wider at the back
    inside = outline - radius
    scalp = 0.045 + 0.012 * _harmonics(rng, theta, range(1, 5))
    skull = scalp + rng.uniform(0.055, 0.075)
    depth = inside - skull - 0.012

    fluid = _fluid_distance(rng, x, y, theta, depth, pixel)
    ventricle = _ventricle_distance(rng, x, y) + 0.007 * _waves(rng, x, y, 8, 20)
    side = np.abs(x)
    nuclei = _union(
        _tube(side, y, (0.165, -0.21, 0.035), (0.155, -0.09, 0.022)),  # caudate
        _tube(side, y, (0.265, -0.14, 0.030), (0.300, 0.06, 0.036)),  # putamen
        _tube(side, y, (0.085, 0.04, 0.045), (0.125, 0.12, 0.062)),  # thalamus
    )
    nuclei += 0.008 * _waves(rng, x, y, 8, 20)
    ribbon = rng.uniform(0.040, 0.052)
    cortex = np.maximum(_step(ribbon - fluid, edge), 0.8 * _step(-nuclei, 1.5 * edge))
    csf = np.maximum(_step(rng.uniform(0.004, 0.009) - fluid, edge), _step(-ventricle, edge))
    brain = _step(depth, edge)

    white_level, grey_level = rng.uniform(0.35, 0.41), rng.uniform(0.51, 0.57)
    tissue = white_level + (grey_level - white_level) * cortex
    tissue += 0.05 * np.exp(-np.maximum(ventricle, 0.0) / 0.03)  # the thin bright rim that healthy ventricles have
    tissue *= 1.0 + 0.035 * _waves(rng, x, y, 12, 45, count=24)
    fat = rng.uniform(0.55, 0.95) * (1.0 + 0.12 * _waves(rng, x, y, 4, 12))
    marrow = rng.uniform(0.05, 0.22) * np.exp(-(((inside - (scalp + skull) / 2) / 0.014) ** 2))
    bias = 1.0 + 0.07 * _waves(rng, u, v, 0.5, 2.0, count=4)
    gain, gamma, noise = rng.uniform(0.85, 1.15), rng.uniform(0.85, 1.15), rng.uniform(0.012, 0.025)
    real, imaginary = rng.normal(scale=noise, size=(2, size, size))

    alpha = np.zeros_like(x)
    white = (fluid > ribbon) & (depth > 0.15) & (nuclei > 0.0)
    for _ in range(lesions):
        alpha = np.maximum(alpha, _lesion(rng, x, y, white, ventricle, 1.6 * edge))
    alpha *= _step(depth - 0.02, edge)
    csf *= 1.0 - alpha  # swelling closes sulci and dents ventricles
    tissue += alpha * (rng.uniform(0.64, 0.86) - tissue) * (1.0 + 0.08 * _waves(rng, x, y, 8, 30))

    image = fat * _step(inside, edge) * _step(scalp - inside, edge)
    image += (0.04 + marrow) * _step(inside - scalp, edge) * (1.0 - brain)
    image += brain * (tissue * (1.0 - csf) + 0.07 * csf)
    image = gain * np.maximum(image * bias, 0.0) ** gamma
    image = np.hypot(image + real, imaginary)  # magnitude images have Rician noise
    return (255 * np.clip(image, 0.0, 1.0)).round().astype(np.uint8), alpha > 0.5


def _write_split(folder: Path, rng_key: tuple[int, int], size: int, normal: int, abnormal: int) -> None:
    """Write the normal and abnormal images of one split, and the masks of the latter."""
    for kind, (name, count) in enumerate(zip(KINDS, (normal, abnormal), strict=True)):
        if not count:
            continue
        images, masks = folder / name / "img", folder / name / "label"
        images.mkdir(parents=True)
        if kind:
            masks.mkdir()
        for index in range(count):
            rng = np.random.default_rng([*rng_key, kind, index])
            image, mask = draw_slice(rng, size, lesions=1 + index % 3 if kind else 0)
            Image.fromarray(image).save(images / f"{index:03d}.png")
            if kind:
                Image.fromarray(mask.astype(np.uint8) * 255).save(masks / f"{index:03d}.png")


def write_phantom(root: Path, seed: int = 0, size: int = 128, train: int = 16, valid: int = 16, test: int = 24) -> None:
    """Write a data set in the layout of BMAD under ``root / "Brain"``, unless that exists.

    Each image depends only on the seed, the size and its place in the data set, not on how many others there are. The
    data set appears in one piece, so a killed run leaves no partial one (at worst a hidden scratch folder), and
    concurrent runs do not disturb each other.

    Args:
        root: Folder that is to hold ``Brain``; it is made if needed.
        seed: Seed of all images.
        size: Height and width of the images.
        train: Number of normal images to train on.
        valid: Number of normal, and again of abnormal, images to validate on.
        test: Number of normal, and again of abnormal, images to test on.
    """
    target = root / "Brain"
    if target.exists():
        return
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".Brain-", dir=root) as scratch:
        built = Path(scratch) / "Brain"
        with explain_full_disk(target):
            for split, (normal, abnormal) in enumerate(((train, 0), (valid, valid), (test, test))):
                _write_split(built / _SPLITS[split], (seed, split), size, normal, abnormal)
        try:
            built.rename(target)
        except OSError:
            if not target.exists():  # otherwise another process was faster, with the same images
                raise


class Phantom(BMADOneClass):
    """Brain slices that are drawn on first use, in BMAD's layout: to try the software out without a data set.

    Args:
        root: Folder that is to hold the images.
        size: Height and width of the images in pixels.
        seed: Of all images.
        train_batch_size: Images in a training batch.
        eval_batch_size: Images in a validation or test batch.
        num_workers: Processes that load images.
    """

    seed: int

    def __init__(
        self,
        root: Path | str = "./datasets/Phantom",
        size: int = 128,
        seed: int = 0,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 8,
    ) -> None:
        super().__init__(
            root=Path(root) / f"size{size}-seed{seed}",
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.size = size

    @property
    def name(self) -> str:
        """Name of the data set, under which results are filed."""
        return "Phantom"

    def prepare_data(self) -> None:
        """Draw the images, unless they are there."""
        write_phantom(self.root, self.seed, self.size)
