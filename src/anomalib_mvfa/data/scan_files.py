"""Reads scans as they come from a scanner: DICOM, NIfTI, and PNG or TIFF of any depth; and shows a window of them.

Axes: N slices, H height, W width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from .reading import is_deep

Bound = float | str
Window = tuple[Bound, Bound]
"""What becomes black and what becomes white: values in the file's units, or percentiles of a file ("1%")."""

DICOM_SUFFIXES = {".dcm", ".dicom", ".ima"}
NIFTI_SUFFIXES = (".nii", ".nii.gz")
PILLOW_SUFFIXES = {".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".tif", ".tiff", ".webp"}
PHOTOMETRIC = 262
"""TIFF's tag of what 0 looks like: 0, white."""
EXTRA = "It needs a further package: pip install 'anomalib-mvfa[scans]'."


@dataclass
class Scan:
    """The slices of a file.

    Args:
        slices: Grey values ``(N, H, W)``, or 8-bit RGB ``(N, H, W, 3)``.
        window: The file's own window, if it has one; in the units of the slices.
        is_8_bit: Whether the values are to be shown as they are.
        inverted: Whether high values are to be shown dark (DICOM's MONOCHROME1).
        orientation: Of the axes on disk, as NIfTI names them, such as "LAS"; None for other files.
        grid: NIfTI's affine ``(4, 4)``, from voxels on disk to millimetres.
    """

    slices: np.ndarray
    window: tuple[float, float] | None = None
    is_8_bit: bool = False
    inverted: bool = False
    orientation: str | None = None
    grid: np.ndarray | None = None


def is_scan(path: Path) -> bool:
    """Whether a file is a scan by its name; DICOM files without a suffix are known by their first bytes."""
    suffix = path.suffix.lower()
    if suffix in PILLOW_SUFFIXES | DICOM_SUFFIXES or path.name.lower().endswith(NIFTI_SUFFIXES):
        return True
    if suffix and not suffix[1:].isdigit():  # scanners name files by identifiers, numbers with dots between
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def stem_of(path: Path) -> str:
    """Return a scan's name without its suffix, which may be ``.nii.gz``."""
    name = path.name
    for suffix in (*reversed(NIFTI_SUFFIXES), path.suffix if is_suffix(path.suffix) else ""):
        if suffix and name.lower().endswith(suffix.lower()):
            return name[: -len(suffix)]
    return name


def is_suffix(suffix: str) -> bool:
    """Whether the end of a name is one of the suffixes of scans, and no part of a scanner's identifier."""
    return suffix.lower() in PILLOW_SUFFIXES | DICOM_SUFFIXES


def read_scan(path: Path, as_mask: bool = False) -> Scan:
    """Read a file.

    DICOM is read in the units of its modality (Hounsfield units of CT). NIfTI is cut into axial slices, from the feet
    up, as radiologists look at them: the front of the body on top, and the patient's right side on the left.

    Args:
        path: The file.
        as_mask: Whether to read values as they are stored, without the units of a modality that a header may have.

    Raises:
        ValueError: It cannot be read, has values that are not finite, or is of a kind that is not supported.
        ModuleNotFoundError: A package that reads the format is not installed.
    """
    try:
        if path.name.lower().endswith(NIFTI_SUFFIXES):
            scan = _read_nifti(path)
        elif path.suffix.lower() in PILLOW_SUFFIXES:
            scan = _read_pillow(path)
        else:
            scan = _read_dicom(path, as_mask)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # whatever a reader raises on a broken file
        msg = f"{path} cannot be read as a scan ({error}). Restore the file or take it out of the data set."
        raise ValueError(msg) from error
    if not np.isfinite(scan.slices).all():
        msg = f"{path} has values that are not finite. Replace them, for instance by the background's value."
        raise ValueError(msg)
    return scan


def pictures(scan: Scan, window: Window | None, path: Path) -> list[Image.Image]:
    """Return a scan's slices as 8-bit pictures.

    Args:
        scan: The scan. What has 8 bits is shown as it is, whatever the window.
        window: See :data:`Window`; percentiles are of all slices together. By default, the file's own window.
        path: The file, for errors.

    Raises:
        ValueError: There is no window.
    """
    values = scan.slices
    if not scan.is_8_bit:
        bounds = scan.window if window is None else [_bound(end, values) for end in window]
        if bounds is None:
            msg = (
                f"{path} has more than 8 bits a pixel and no intensity window of its own. Say which values become "
                "black and which white: window=[-150, 250], in the file's units; or window=[1%, 99%], percentiles of "
                "a file."
            )
            raise ValueError(msg)
        low, high = bounds
        values = _windowed(values, low, high, path)
    return [Image.fromarray(255 - plane if scan.inverted else plane) for plane in values]


def checked_window(window: Sequence[Bound] | None) -> Window | None:
    """Return a window whose ends are numbers, or percentages as text.

    Raises:
        ValueError: It is none.
    """
    if window is None:
        return None
    try:
        low, high = map(_checked_bound, window)
        rises = isinstance(low, str) != isinstance(high, str) or _number(low) < _number(high)
    except (TypeError, ValueError):
        rises = False
    if not rises:
        msg = (
            f"window={window!r} must be two ends, the lower one first: values such as [-150, 250], or percentiles such "
            "as [1%, 99%]."
        )
        raise ValueError(msg)
    return low, high


def _checked_bound(end: Bound) -> Bound:
    number = _number(end)
    if not math.isfinite(number) or (_is_percentile(end) and not 0 <= number <= 100):
        raise ValueError
    return f"{number:g}%" if _is_percentile(end) else number


def _is_percentile(end: Bound) -> bool:
    return isinstance(end, str) and end.strip().endswith("%")


def _number(end: Bound) -> float:
    return float(end.strip().removesuffix("%") if isinstance(end, str) else end)


def _bound(end: Bound, values: np.ndarray) -> float:
    return float(np.percentile(values, _number(end))) if _is_percentile(end) else _number(end)


def _windowed(values: np.ndarray, low: float, high: float, path: Path) -> np.ndarray:
    """Return 8-bit values; where both ends are the same, what is above is white."""
    if high < low:
        msg = f"{path}: the window is from {low:g} to {high:g} in this file. Give the lower end first."
        raise ValueError(msg)
    if high == low:
        return np.where(values > low, 255, 0).astype(np.uint8)
    return np.round(255 * np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)).astype(np.uint8)


def _read_pillow(path: Path) -> Scan:
    with Image.open(path) as image:
        deep = is_deep(image)
        if deep and len(image.getbands()) > 1:
            msg = "colours of more than 8 bits are not supported; convert them to 8 bits"
            raise ValueError(msg)
        frames = []
        for frame in [image] if image.format == "MPO" else ImageSequence.Iterator(image):  # with previews of a camera
            if is_deep(frame) != deep:
                msg = "it has pages of 8 bits and of more; one depth is expected"
                raise ValueError(msg)
            upright = ImageOps.exif_transpose(frame)
            frames.append(np.asarray(upright if deep else upright.convert("RGB")))
        white_is_zero = deep and image.format == "TIFF" and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0
    return Scan(np.stack(frames), is_8_bit=not deep, inverted=white_is_zero)


def _read_nifti(path: Path) -> Scan:
    try:
        import nibabel
    except ModuleNotFoundError as error:
        msg = f"{path} is a NIfTI file. {EXTRA}"
        raise ModuleNotFoundError(msg) from error
    image: Any = nibabel.load(path)
    values = np.asanyarray(image.dataobj)
    shape = values.shape + (1,) * (3 - values.ndim)
    if set(shape[3:]) - {1} or values.dtype.kind not in "biuf":
        msg = f"its shape is {values.shape}, of {values.dtype}; one volume of grey values is expected"
        raise ValueError(msg)
    values = values.reshape(shape[:3])
    axes = nibabel.orientations.io_orientation(image.affine)
    values = nibabel.orientations.apply_orientation(values, axes)  # from left to right, back to front, feet to head
    code = "".join(nibabel.orientations.aff2axcodes(image.affine))
    if not values.size:
        msg = f"its shape is {values.shape}; it has no slice"
        raise ValueError(msg)
    return Scan(values[::-1, ::-1].transpose(2, 1, 0), orientation=code, grid=np.asarray(image.affine))


def _read_dicom(path: Path, as_mask: bool) -> Scan:
    try:
        from pydicom import dcmread
        from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array
    except ModuleNotFoundError as error:
        msg = f"{path} is a DICOM file. {EXTRA}"
        raise ModuleNotFoundError(msg) from error
    file = dcmread(path)
    for name in ("WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept"):
        if name in file and file[name].is_empty:  # as software leaves them that takes out what names a patient
            del file[name]
    groups = [*file.get("SharedFunctionalGroupsSequence", []), *file.get("PerFrameFunctionalGroupsSequence", [])]
    if any("PixelValueTransformationSequence" in group for group in groups):
        msg = "its frames have units of their own; write them as single files, or as NIfTI"
        raise ValueError(msg)
    stored = pixel_array(file)
    stored = stored if int(file.get("NumberOfFrames") or 1) > 1 else stored[None]
    if file.PhotometricInterpretation == "PALETTE COLOR":
        stored = apply_color_lut(stored, file)
        return Scan((stored >> 8 * (stored.itemsize - 1)).astype(np.uint8), is_8_bit=True)
    if stored.ndim == 4:
        if stored.dtype != np.uint8:
            msg = "colours of more than 8 bits are not supported; convert them to 8 bits"
            raise ValueError(msg)
        return Scan(stored, is_8_bit=True)
    is_8_bit = stored.dtype == np.uint8 and file.BitsStored == 8 and "WindowWidth" not in file
    return Scan(
        slices=stored if is_8_bit or as_mask else apply_modality_lut(stored, file),
        window=_own_window(file),
        is_8_bit=is_8_bit,
        inverted=file.PhotometricInterpretation == "MONOCHROME1",
    )


def _own_window(file: Any) -> tuple[float, float] | None:  # noqa: ANN401  # pydicom's data set
    """Return the ends of a DICOM file's first window (DICOM PS3.3, C.11.2.1.2), None if it has none that is linear."""
    function = file.get("VOILUTFunction", "LINEAR")
    if "WindowCenter" not in file or "WindowWidth" not in file or function not in {"LINEAR", "LINEAR_EXACT"}:
        return None
    centre, width = (float(np.atleast_1d(file[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
    if width < (1 if function == "LINEAR" else 0):
        return None
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    return centre - width / 2, centre + width / 2
