"""Reads scans in the formats of scanners (DICOM, NIfTI, and PNG or TIFF of any depth), and shows them in 8 bits.

Axes: N slices, H height, W width.
"""

import gzip
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, ImageSequence
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION

from ..io import atomic_write
from .reading import is_high_bit_depth

Bound = float | str
Window = tuple[Bound, Bound]
"""What becomes black and what becomes white: values in the file's units, or percentiles of a scan ("1%")."""

NIFTI_SUFFIXES = (".nii.gz", ".nii")
PILLOW_SUFFIXES = (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".tif", ".tiff", ".webp")
SUFFIXES = (*NIFTI_SUFFIXES, ".dcm", ".dicom", ".ima", *PILLOW_SUFFIXES)


@dataclass
class Scan:
    """The slices of a file: grey values ``(N, H, W)``, or 8-bit RGB ``(N, H, W, 3)``."""

    slices: np.ndarray
    window: tuple[float, float] | None = None  # the file's own, in the units of the slices
    is_8_bit: bool = False  # to be shown as it is
    inverted: bool = False  # high values are to be shown dark (DICOM's MONOCHROME1)
    orientation: str | None = None  # NIfTI's, of the axes on disk, such as "LAS"
    affine: np.ndarray | None = None  # NIfTI's, (4, 4), from voxels on disk to millimetres


def is_scan(path: Path) -> bool:
    """Whether a file is a scan by its name; DICOM files without a suffix are known by their first bytes."""
    if path.name.lower().endswith(SUFFIXES):
        return True
    if not path.is_file() or not (path.suffix == "" or path.suffix[1:].isdigit()):  # identifiers are numbers and dots
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def stem_of(path: Path) -> str:
    """Return a scan's name without its suffix, which may be ``.nii.gz``."""
    suffix = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")
    return path.name[: len(path.name) - len(suffix)]


def read_scan(path: Path, as_mask: bool = False) -> Scan:
    """Read a file.

    DICOM is read in the units of its modality (Hounsfield units of CT), or as it is stored if it is a mask; 8-bit PNG
    and the like in colour, or as grey if it is a mask. NIfTI is cut into axial slices, from the feet up, as
    radiologists look at them: the front of the body on top, and the patient's right side on the left.

    Raises:
        ValueError: It cannot be read, has values that are not finite, or is of a kind that is not supported.
        ModuleNotFoundError: A package that reads the format is not installed.
    """
    name = path.name.lower()
    try:
        if name.endswith(NIFTI_SUFFIXES):
            scan = _read_nifti(path)
        else:
            scan = (_read_pillow if name.endswith(PILLOW_SUFFIXES) else _read_dicom)(path, as_mask)
    except ModuleNotFoundError as error:
        msg = f"{path} needs a further package, {error.name}: pip install 'anomalib-mvfa[scans]'."
        raise ModuleNotFoundError(msg, name=error.name) from error
    except Exception as error:  # whatever a reader raises on a broken file
        msg = f"{path} cannot be read as a scan ({error}). Restore the file or take it out of the data set."
        raise ValueError(msg) from error
    if scan.slices.ndim == 4 and not scan.is_8_bit:
        msg = f"{path} has colours of more than 8 bits. Convert them to 8 bits."
        raise ValueError(msg)
    if not np.isfinite(scan.slices).all():
        msg = f"{path} has values that are not finite. Replace them, for instance by the background's value."
        raise ValueError(msg)
    return scan


def values_of(window: Window, values: np.ndarray) -> tuple[float, float]:
    """Return the ends of a window as values: percentiles are of all ``values`` together."""
    low, high = (float(np.percentile(values, float(end[:-1])) if isinstance(end, str) else end) for end in window)
    return low, high


def to_8_bit(scan: Scan, window: Window | None, path: Path) -> list[Image.Image]:
    """Return a scan's slices as 8-bit images, in a window or by default the file's own; 8-bit scans as they are.

    Percentiles are of all slices together. Where both ends of the window are the same, what is above is white.
    ValueError if there is no window, or its ends fall in this file.
    """
    values = scan.slices
    if not scan.is_8_bit:
        ends = window or scan.window
        if ends is None:
            msg = (
                f"{path} has more than 8 bits a pixel and no intensity window of its own. Say which values become "
                "black and which white: window=[-150, 250], in its units, or window=[1%, 99%], percentiles of a file."
            )
            raise ValueError(msg)
        low, high = values_of(ends, values)
        if high < low:
            msg = f"{path}: the window is from {low:g} to {high:g} in this file. Give the lower end first."
            raise ValueError(msg)
        share = np.clip((values.astype(np.float64) - low) / (high - low), 0, 1) if high > low else values > low
        values = np.round(255 * share).astype(np.uint8)
    return [Image.fromarray(255 - plane if scan.inverted else plane) for plane in values]


def check_window(window: Sequence[Bound] | None) -> Window | None:
    """Return a window whose ends are numbers, or percentages as text; ValueError for what is no window."""
    if window is None:
        return None
    try:
        low, high = map(_parse_bound, window)
        is_valid = type(low) is not type(high) or float(str(low).strip("%")) < float(str(high).strip("%"))
    except (TypeError, ValueError):
        is_valid = False
    if not is_valid:
        msg = (
            f"window={window!r} must be two ends, the lower one first: values such as [-150, 250], or percentiles such "
            "as [1%, 99%]."
        )
        raise ValueError(msg)
    return low, high


def _parse_bound(end: Bound) -> Bound:
    text = str(end).strip()
    number, is_percentile = float(text.removesuffix("%")), text.endswith("%")
    if not math.isfinite(number) or (is_percentile and not 0 <= number <= 100):
        raise ValueError
    return f"{number:g}%" if is_percentile else number


def _read_pillow(path: Path, as_mask: bool) -> Scan:
    with Image.open(path) as image:
        is_high, frames = is_high_bit_depth(image), []
        for frame in [image] if image.format == "MPO" else ImageSequence.Iterator(image):  # with previews of a camera
            if is_high_bit_depth(frame) != is_high:
                msg = "it has pages of 8 bits and of more; one depth is expected"
                raise ValueError(msg)
            upright = ImageOps.exif_transpose(frame)
            frames.append(np.asarray(upright if is_high else upright.convert("L" if as_mask else "RGB")))
        white_is_zero = is_high and getattr(image, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == 0  # of TIFF
    return Scan(np.stack(frames), is_8_bit=not is_high, inverted=white_is_zero)


def _read_nifti(path: Path) -> Scan:
    import nibabel

    image: Any = nibabel.load(path)
    values = np.asanyarray(image.dataobj)
    shape = values.shape + (1,) * (3 - values.ndim)
    if set(shape[3:]) - {1} or values.dtype.kind not in "biuf" or not values.size:
        msg = f"its shape is {values.shape}, of {values.dtype}; one volume of grey values is expected"
        raise ValueError(msg)
    volume = nibabel.spatialimages.SpatialImage(values.reshape(shape[:3]), image.affine)
    values = np.asanyarray(nibabel.as_closest_canonical(volume).dataobj)  # left to right, back to front, feet to head
    code = "".join(nibabel.aff2axcodes(image.affine))
    return Scan(values[::-1, ::-1].transpose(2, 1, 0), orientation=code, affine=np.asarray(image.affine))


def write_like_nifti(slices: np.ndarray, like: Path, path: Path) -> bool:
    """Write slices ``(N, H, W)``, in the form that :func:`read_scan` gives them, in the geometry of a NIfTI file.

    Args:
        slices: Values of the slices.
        like: The file that these slices are of.
        path: Where to.

    Returns:
        Whether these are all of its slices; nothing is written otherwise.
    """
    import nibabel
    from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

    image: Any = nibabel.load(like)
    volume = apply_orientation(
        slices.transpose(2, 1, 0)[::-1, ::-1], ornt_transform(axcodes2ornt("RAS"), io_orientation(image.affine))
    )
    if volume.shape != (*image.shape, 1)[:3]:
        return False
    found = nibabel.Nifti1Image(volume.astype(np.float32), image.affine)
    found.header.set_xyzt_units(*image.header.get_xyzt_units())
    with atomic_write(path) as partial:  # whose name does not end like a NIfTI file's
        partial.write_bytes(gzip.compress(found.to_bytes(), mtime=0))
    return True


def _read_dicom(path: Path, as_mask: bool) -> Scan:
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    file = _open_dicom(path)
    for name in ("WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept"):
        if name in file and file[name].is_empty:  # as software leaves them that takes out what names a patient
            del file[name]
    groups = [*file.get("SharedFunctionalGroupsSequence", []), *file.get("PerFrameFunctionalGroupsSequence", [])]
    if any("PixelValueTransformationSequence" in group for group in groups):
        msg = "its frames have units of their own; write them as single files, or as NIfTI"
        raise ValueError(msg)
    stored = pixel_array(file)
    if int(file.get("NumberOfFrames") or 1) == 1:
        stored = stored[None]
    if file.PhotometricInterpretation == "PALETTE COLOR":
        stored = apply_color_lut(stored, file)
        stored = (stored >> 8 * (stored.itemsize - 1)).astype(np.uint8)
    if stored.ndim == 4:
        return Scan(stored, is_8_bit=stored.dtype == np.uint8)
    few_bits = stored.dtype == np.uint8 and file.BitsStored == 8 and "WindowWidth" not in file
    values = stored if as_mask else apply_modality_lut(stored, file)
    is_8_bit = few_bits and np.array_equal(values, stored)
    # Values of 8 bits in units of their own are shown from the lowest to the highest that there can be.
    of_bits = np.sort(apply_modality_lut(np.array([0, 255], np.uint8), file)).tolist() if few_bits else None
    return Scan(
        slices=values,
        window=_own_window(file) or of_bits,
        is_8_bit=is_8_bit,
        inverted=file.PhotometricInterpretation == "MONOCHROME1",
    )


def holds_pixels(path: Path) -> bool:
    """Whether a scan has pixels, as DICOM's directories, presentation states and reports do not."""
    if path.name.lower().endswith((*NIFTI_SUFFIXES, *PILLOW_SUFFIXES)):
        return True
    try:
        return "Rows" in _open_dicom(path, specific_tags=["Rows"], stop_before_pixels=True)
    except Exception:  # noqa: BLE001  # no DICOM at all: an error when it is read
        return True


def _open_dicom(path: Path, **arguments: Any) -> Any:  # noqa: ANN401  # pydicom's
    """Open a DICOM file, also one that begins with its elements, as old software writes them."""
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    try:
        return dcmread(path, **arguments)
    except InvalidDicomError:
        file = dcmread(path, force=True, **arguments)
        if "Rows" not in file:
            msg = "it is no DICOM file: it has neither DICOM's preamble nor elements of an image"
            raise ValueError(msg) from None
        implicit, _ = file.original_encoding
        file.file_meta.setdefault("TransferSyntaxUID", ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian)
        return file


def _own_window(file: Any) -> tuple[float, float] | None:  # noqa: ANN401  # pydicom's data set
    """Return the ends of a DICOM file's first window (DICOM PS3.3, C.11.2.1.2), None if it has none that is linear."""
    narrower = {"LINEAR": 1, "LINEAR_EXACT": 0}.get(file.get("VOILUTFunction", "LINEAR"))
    if "WindowCenter" not in file or "WindowWidth" not in file or narrower is None:
        return None
    centre, width = (float(np.atleast_1d(file[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
    return None if width < narrower else (centre - width / 2, centre + width / 2 - narrower)
