"""Reads images and masks as the published code does, as 8-bit RGB and grey; what that would distort is refused."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

MASK_THRESHOLD = 127
"""Of 8-bit mask values; above is abnormal."""
_TOO_DEEP = (
    "{} has more than 8 bits a channel, and only its origin tells which intensity window to show. Convert it to 8 bits "
    "with that window, or read it by Scans or, to predict, PredictScans, which do."
)


def read_image(path: str | Path) -> Image.Image:
    """Read an image file as 8-bit RGB.

    Raises:
        ValueError: The file is no readable image, or has more than 8 bits a channel.
    """
    return _load(path, "RGB")


def read_mask(path: str | Path, size: tuple[int, int]) -> Image.Image:
    """Read a mask file as 8-bit grey.

    Args:
        path: The file.
        size: Width and height of the image that the mask belongs to.

    Raises:
        ValueError: The file is no readable image, of another size, or marks something, but by too low values.
    """
    mask = _load(path, "L")
    if mask.size != size:
        msg = f"Mask {path} is {mask.width}x{mask.height} pixels, its image {size[0]}x{size[1]}. They must agree."
        raise ValueError(msg)
    highest = int(np.asarray(mask).max())
    if 0 < highest <= MASK_THRESHOLD:
        msg = (
            f"Mask {path} has values up to {highest}, and only those above {MASK_THRESHOLD} count as abnormal. Write "
            "masks with 0 and 255."
        )
        raise ValueError(msg)
    return mask


def is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether an image that has been opened, and not read yet, has more than 8 bits a channel."""
    # Pillow reads 16-bit RGB as RGB, by the upper byte; only the raw mode, in `tile` until it is read, tells.
    return image.mode in {"I", "F"} or ";16" in f"{image.mode} {image.tile}"


def refuse_deep(paths: Iterable[str]) -> None:
    """Raise ValueError for images of more than 8 bits, whose values readers other than ours cut off at 255."""
    for path in paths:
        with suppress(OSError), Image.open(path) as image:  # what is unreadable is not for us to refuse
            if is_deep(image):
                raise ValueError(_TOO_DEEP.format(path))


def _load(path: str | Path, mode: str) -> Image.Image:
    """Read a file in a mode, upright if its EXIF data say how it was held."""
    try:
        with Image.open(path) as image:
            deep = is_deep(image)
            pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a camera's photo and its previews
            converted = ImageOps.exif_transpose(image).convert(mode)
    except Image.DecompressionBombError as error:
        msg = f"{path} is too large an image ({error}). Scale it down or cut it into tiles."
        raise ValueError(msg) from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError ... on broken files
        msg = f"{path} cannot be read as an image ({error}). Restore the file or take it out of the data set."
        raise ValueError(msg) from error
    if deep:
        raise ValueError(_TOO_DEEP.format(path))
    if pages > 1:
        msg = (
            f"{path} has {pages} pages, of which one would be read. Save them as files of their own, or read them by "
            "Scans or, to predict, PredictScans, which do."
        )
        raise ValueError(msg)
    return converted
