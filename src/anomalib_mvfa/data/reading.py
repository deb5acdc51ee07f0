"""Reads images and masks as the published code does, as 8-bit RGB and grey, and refuses what that would distort."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

MASK_THRESHOLD = 127
"""Of 8-bit mask values, those above are abnormal."""


def read_image(path: str | Path) -> Image.Image:
    """Read an image file as 8-bit RGB, upright if its EXIF data say how it was held.

    Give the result, not the path, to anomalib's inferencers, which read files in another way.

    Raises:
        ValueError: The file is no readable image, is too large, has several pages, or more than 8 bits a channel.
    """
    return _read(path, lambda image: image.convert("RGB"))


def _read(path: str | Path, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    _check_file(Path(path))
    try:
        with Image.open(path) as image:
            is_high = is_high_bit_depth(image)
            pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a camera's photo and its previews
            converted = convert(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        msg = f"{path} is too large an image ({error}). Scale it down or cut it into tiles."
        raise ValueError(msg) from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError ... on broken files
        msg = f"{path} cannot be read as an image ({error}). Restore the file or take it out of the data set."
        raise ValueError(msg) from error
    _check_bit_depth(path, is_high)
    if pages > 1:
        msg = (
            f"{path} has {pages} pages, of which one would be read. Save each as a file, or use Scans or PredictScans."
        )
        raise ValueError(msg)
    return converted


def read_mask(path: str | Path, size: tuple[int, int]) -> Image.Image:
    """Read the mask of an abnormal image as 8-bit grey; what is transparent is black.

    Raises:
        ValueError: :func:`read_image` raises it, the mask has not its image's size ``(W, H)``, marks nothing, or marks
            something by values that would not count.
    """
    mask = _read(path, _flatten)
    if mask.size != size:
        msg = f"Mask {path} is {mask.width}x{mask.height} pixels, its image {size[0]}x{size[1]}. They must agree."
        raise ValueError(msg)
    values = np.asarray(mask)
    check_mask_values(path, values)
    if not values.any():
        msg = f"Mask {path} marks nothing, and its image is abnormal. Correct the mask, or move the image."
        raise ValueError(msg)
    return mask


def _flatten(image: Image.Image) -> Image.Image:
    if "transparency" in image.info or image.mode in {"LA", "PA", "RGBA"}:  # the paint may be in the alpha alone
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return image.convert("L")


def check_mask_values(path: str | Path, values: np.ndarray) -> None:
    """Raise ValueError for a mask that marks something by 8-bit values too low to count."""
    if (low := np.unique(values[(values > 0) & (values <= MASK_THRESHOLD)])).size:
        msg = (
            f"Mask {path} has grey values such as {low[-3:].tolist()}, of {low.size} up to {MASK_THRESHOLD} that would "
            "not count. Write masks with 0 and 255, and not as JPEG, which blurs."
        )
        raise ValueError(msg)


def is_visible(path: Path, paths: Sequence[Path]) -> bool:
    """Whether neither a file nor a folder of it below all the paths' common one is hidden."""
    common = os.path.commonpath([path.parent for path in paths])
    return not any(part.startswith(".") for part in path.relative_to(common).parts)


def files_below(folder: Path) -> Iterator[Path]:
    """Return the files in a folder that are not hidden, at any depth, also behind links."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [name for name in folders if not name.startswith(".") and real not in seen]
        if real not in seen:  # links may lead around in a circle
            yield from (Path(parent, name) for name in names if not name.startswith("."))
        seen.add(real)


def find_images(folder: Path, paths: Iterable[Path], is_image: Callable[[Path], bool]) -> list[Path]:
    """Return the images among the paths in a folder, sorted, which must be files; the log names what is left out."""
    found = sorted(paths)
    images = [path for path in found if is_image(path)]
    for path in images:
        _check_file(path)
    if left := [path.name for path in found if not path.is_dir() and not is_image(path)]:
        logger.warning("%s: %d files are no images by their names and left out: %s.", folder, len(left), left[:5])
    return images


def _check_file(path: Path) -> None:
    if not path.is_file():
        msg = f"{path} is no file: a folder, or a link to nothing. Restore it or take it out of the data set."
        raise ValueError(msg)


def by_name(paths: Iterable[Path], name_of: Callable[[Path], str]) -> dict[str, Path]:
    """Return files by their names without suffixes; ValueError if two have the same."""
    named: dict[str, Path] = {}
    for path in paths:
        if (other := named.setdefault(name_of(path), path)) != path:
            msg = f"{other} and {path} have the same name, but for the suffix. Rename or remove one."
            raise ValueError(msg)
    return named


def check_mask_names(where: str, images: Iterable[str], masks: Iterable[str], rule: str) -> None:
    """Raise ValueError, which says the rule, where the names of images and masks differ."""
    missing, spare = sorted(set(images) - set(masks)), sorted(set(masks) - set(images))
    if missing or spare:
        msg = (
            f"Masks of {where} do not match the images: {len(missing)} images have no mask {missing[:5]}, "
            f"{len(spare)} masks have no image {spare[:5]}. {rule}"
        )
        raise ValueError(msg)


def is_high_bit_depth(image: ImageFile.ImageFile) -> bool:
    """Whether an image that has been opened, and not read yet, has more than 8 bits a channel."""
    # Pillow reads 16-bit RGB as RGB, by the upper byte; only the raw mode, in `tile` until it is read, tells.
    return image.mode in {"I", "F"} or ";16" in f"{image.mode} {image.tile}"


@cache
def refuse_high_bit_depth(path: str) -> None:
    """Raise ValueError for an image of more than 8 bits, whose values readers other than ours cut off at 255."""
    with suppress(OSError), Image.open(path) as image:  # what Pillow cannot read is not for us to refuse
        _check_bit_depth(path, is_high_bit_depth(image))


def _check_bit_depth(path: str | Path, is_high: bool) -> None:
    if is_high:
        msg = (
            f"{path} has more than 8 bits a channel, and only its origin tells which intensity window to show. Convert "
            "it to 8 bits with that window, or use Scans or PredictScans, which do."
        )
        raise ValueError(msg)
