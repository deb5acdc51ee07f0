"""Scans in datamodules and in prediction, converted to 8-bit PNG files, which all of anomalib reads, writes and shows.

.. code-block:: text

    PICTURES/<digest>/scans.json       file and number of each slice, written last; the digest is of files and window
    PICTURES/<digest>/<folder>/...     one file per scan, or per slice of a scan: <name>_slice<number>.png

All slices of a file are one group, and so are the files of one slice in a folder of their own: those of a DICOM series.
"""

import copy
import hashlib
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd
from anomalib.data import PredictDataset
from anomalib.data.utils import LabelName, Split, ValSplitMode
from filelock import FileLock
from PIL import Image

from ..arguments import optional_text
from ..io import explain_failed_write
from ..progress import progress
from .folder import NamedFolder
from .reading import MASK_THRESHOLD, by_name, check_mask_names, check_mask_values, files_below, find_images
from .scan_files import (
    PILLOW_SUFFIXES,
    Bound,
    Scan,
    Window,
    check_window,
    holds_pixels,
    is_scan,
    read_scan,
    stem_of,
    to_8_bit,
    values_of,
)
from .support import hold_out

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

RECORD = "scans.json"


class Scans(NamedFolder):
    """Folders of scans (DICOM, NIfTI, PNG or TIFF of any depth), which an intensity window turns into 8-bit slices.

    Slices of an abnormal file are abnormal where its mask marks something, and normal elsewhere. Data are split by
    whole files, and files of one slice by the folders that they are in, if they are in any; without
    ``normal_test_dir``, the share ``test_split_ratio`` of the normal ones is tested.

    Args:
        name: Name of the data set, under which results are filed.
        normal_dir: Folder of normal scans.
        root: Folder that the others are in.
        abnormal_dir: Folder of abnormal scans.
        normal_test_dir: Folder of normal scans to test on.
        mask_dir: Folder of masks, in any of these formats, above 0 where abnormal; named like their scans.
        window: What becomes black and what white, of files of more than 8 bits: two values in the file's units
            (Hounsfield units of CT), or two percentiles of a file, or of all files of one slice in a folder, such as
            ``["1%", "99%"]``. By default, the window that a DICOM file has itself.
        pictures: Folder of the 8-bit slices, by default ``./datasets/<name>_8bit``. Below it, changed scans and other
            windows have slices in a folder of their own; old ones may be removed at will.
        kwargs: Further arguments of anomalib's ``Folder``: batch sizes, workers, augmentations and splits.

    Raises:
        ValueError: The window is none.
    """

    # Of a slice: the file, or the folder that a file of one slice is in.
    group_by = r".*/(?:normal_test|abnormal|normal)/(.+(?=_slice\d+\.png$)|.+(?=/[^/]+\.png$)|[^/]+(?=\.png$))"

    def __init__(
        self,
        name: str,
        normal_dir: str | Path,
        root: str | Path | None = None,
        abnormal_dir: str | Path | None = None,
        normal_test_dir: str | Path | None = None,
        mask_dir: str | Path | None = None,
        window: Sequence[Bound] | None = None,
        pictures: str | Path | None = None,
        **kwargs,  # noqa: ANN003  # of Folder
    ) -> None:
        given = {"normal": normal_dir, "abnormal": abnormal_dir, "normal_test": normal_test_dir, "mask": mask_dir}
        named = {kind: optional_text(folder) for kind, folder in given.items()}
        self.folders = {kind: Path(root or ".", folder).expanduser() for kind, folder in named.items() if folder}
        self.window = check_window(window)
        self.pictures = Path(pictures or Path("datasets", f"{name}_8bit")).expanduser()
        kwargs |= {f"{kind}_dir": kind for kind in self.folders if kind != "normal_test"}
        super().__init__(name, **kwargs)

    def prepare_data(self) -> None:
        """Convert the scans, unless that has been done; see :func:`convert` for errors."""
        convert(self.folders, self.pictures, self.window)

    def _setup(self, _stage: str | None = None) -> None:
        self.root = convert(self.folders, self.pictures, self.window)
        self.normal_test_dir = "normal_test" if (self.root / "normal_test").is_dir() else None
        super()._setup(_stage)
        test = self.test_data.samples
        if "normal_test" not in self.folders:
            self.train_data.samples, normal = self._hold_out(self.train_data.samples, self.test_split_ratio)
            self.test_data.samples = pd.concat([test, normal.assign(split=Split.TEST.value)])
            self.test_data.samples.attrs = dict(test.attrs)
        if not (self.test_data.samples.label_index == LabelName.NORMAL).any():
            msg = (
                f"{self.name} has no normal image to test on: test_split_ratio={self.test_split_ratio} of its normal "
                "scans (files, or folders of files of one slice) is less than one. Give normal_test_dir, or more scans."
            )
            raise ValueError(msg)

    def _create_val_split(self) -> None:
        """Split by whole files, where anomalib would split by slices."""
        if self.val_split_mode != ValSplitMode.FROM_TEST:
            super()._create_val_split()
            return
        self.val_data = copy.deepcopy(self.test_data)
        self.test_data.samples, self.val_data.samples = self._hold_out(self.test_data.samples, self.val_split_ratio)

    def _hold_out(self, samples: pd.DataFrame, share: float) -> tuple[pd.DataFrame, pd.DataFrame]:
        return hold_out(samples, share, self.seed or 0, self.group_by)


class PredictScans(PredictDataset):
    """Scans to predict on, converted as by :class:`Scans`.

    Args:
        path: A scan, or a folder of scans.
        window: Window as of Scans.
        pictures: Folder of the 8-bit slices as of Scans.
    """

    def __init__(
        self, path: str | Path, window: Sequence[Bound] | None = None, pictures: str | Path = "./results/pictures"
    ) -> None:
        target = convert({"scans": Path(path).expanduser()}, Path(pictures).expanduser(), check_window(window))
        super().__init__(target / "scans")


def convert(sources: Mapping[str, Path], pictures: Path, window: Window | None) -> Path:
    """Convert scans to 8-bit slices below ``pictures``, unless that has been done, and return their folder.

    It is never incomplete. Sources are folders of scans by the names of their slices' folders; "mask" has masks of the
    scans in "abnormal", whose normal slices go to "normal_test".

    Raises:
        FileNotFoundError: A folder does not exist or holds no scan.
        ValueError: A scan cannot be read or has no window, masks do not match, or a folder is inside another.
    """
    for (kind, folder), (other, outer) in permutations({**sources, "pictures": pictures}.items(), 2):
        if folder.resolve().is_relative_to(outer.resolve()):  # its images would have two labels
            msg = f"The folder of {kind} ({folder}) is, or is inside, that of {other} ({outer}). Give each its own."
            raise ValueError(msg)
    scans = {kind: _find_scans(folder) for kind, folder in sources.items()}
    states = {
        kind: [(p.resolve(), p.stat().st_size, p.stat().st_mtime_ns) for p in scans[kind].values()] for kind in scans
    }
    digest = hashlib.sha256(repr([window, states]).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    target, partial = pictures / digest, pictures / f".{digest}.partial"
    pictures.mkdir(parents=True, exist_ok=True)
    with FileLock(pictures / f".{digest}.lock"):
        record = target / RECORD
        if record.is_file() and sorted(_read_record(record)) == _list(target):
            return target
        for left in (partial, target):  # by a run that was killed, or with slices that have been removed
            shutil.rmtree(left, ignore_errors=True)
        scans = {kind: _with_pixels(paths) for kind, paths in scans.items()}
        try:
            with explain_failed_write(target):
                origins = _write_slices(scans, partial, window)
                (partial / RECORD).write_text(json.dumps(origins), "utf-8")
            partial.replace(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def origin_of(path: Path) -> tuple[Path, int] | None:
    """Return the scan that a file is a slice of, and which slice it is from 0; None if it is no slice."""
    for folder in path.parents:
        if (folder / RECORD).is_file():
            source, index = _read_record(folder / RECORD).get(str(path.relative_to(folder)), (None, 0))
            return (Path(source), index) if source else None
    return None


def _read_record(path: Path) -> dict[str, tuple[str, int]]:
    """Return scan and number of each slice by the slice's path in the record's folder; nothing if it is damaged."""
    return _parse_record(path.read_bytes())


@lru_cache(maxsize=4)
def _parse_record(content: bytes) -> dict[str, tuple[str, int]]:
    with suppress(ValueError):
        record = json.loads(content)
        if isinstance(record, dict):
            return record
    return {}


def _list(folder: Path) -> list[str]:
    """Return the paths of a folder's slices in it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def _find_scans(folder: Path) -> dict[str, Path]:
    """Return the scans in a folder, or the one that it is itself, by their paths in it without suffixes."""
    found = [folder] if folder.is_file() else find_images(folder, files_below(folder), is_scan)
    base = folder.parent if folder.is_file() else folder
    if not found:
        msg = f"{folder} does not exist or holds no scan (DICOM, NIfTI, PNG, TIFF, JPEG). Give the folder of the scans."
        raise FileNotFoundError(msg)
    return by_name(found, lambda path: str(path.relative_to(base).with_name(stem_of(path))))


def _with_pixels(paths: Mapping[str, Path]) -> dict[str, Path]:
    """Leave out DICOM files without pixels, with a warning."""
    kept = {name: path for name, path in paths.items() if holds_pixels(path)}
    if left := sorted(str(path) for name, path in paths.items() if name not in kept):
        logger.warning("%d DICOM files without pixels (directories, reports) are left out: %s", len(left), left[:5])
    return kept


def _windows_of_series(paths: Mapping[str, Path], window: Window | None) -> dict[str, Window]:
    """Return the window of each folder whose files have one slice each, where it is given in percentiles.

    Percentiles of a series are those of all its files, as those of a volume are of all its slices.
    """
    folders: dict[str, list[Path]] = defaultdict(list)
    for name, path in paths.items():
        folders[str(Path(name).parent)].append(path)
    found: dict[str, Window] = {}
    for folder, files in folders.items() if window is not None and isinstance(window[0], str) else ():
        if folder != "." and len(files) > 1:
            slices = [scan.slices for scan in map(read_scan, files) if not scan.is_8_bit]
            if window is not None and slices and all(len(one) == 1 for one in slices):
                found[folder] = values_of(window, np.concatenate([one.flatten() for one in slices]))
    return found


def _write_slices(
    scans: Mapping[str, Mapping[str, Path]], target: Path, window: Window | None
) -> dict[str, tuple[str, int]]:
    """Write the 8-bit slices of scans and masks, each kind to its folder, and return their record; see `convert`."""
    origins: dict[str, tuple[str, int]] = {}
    masks = scans.get("mask")
    if masks is not None:
        check_mask_names("the abnormal scans", scans.get("abnormal", {}), masks, "A mask has its scan's name.")
    marked: dict[str, bool] = defaultdict(bool)  # by group
    for kind, paths in scans.items():
        windows = _windows_of_series(paths, window) if kind != "mask" else {}
        for name, path in progress(list(paths.items()), f"Converting {kind} scans") if kind != "mask" else ():
            scan = read_scan(path)
            images, marks = to_8_bit(scan, windows.get(str(Path(name).parent), window), path), None
            if kind == "abnormal" and masks is not None:
                marks = _read_marks(masks[name], scan, path)
                folder = str(Path(name).parent)
                marked[folder if len(images) == 1 and folder != "." else name] |= bool(marks.any())
            elif kind == "abnormal" and len(images) > 1:
                msg = f"{path} has {len(images)} slices, and only a mask tells which are abnormal. Give mask_dir."
                raise ValueError(msg)
            for index, image in enumerate(images):
                file = f"{name}_slice{index:03d}.png" if len(images) > 1 else f"{name}.png"
                is_moved = marks is not None and not marks[index].any()
                written = {Path("normal_test" if is_moved else "", kind, file): (image, path)}
                if marks is not None and masks is not None and not is_moved:
                    written[Path("mask", file)] = Image.fromarray(marks[index].astype(np.uint8) * 255), masks[name]
                for slice_file, (picture, source) in written.items():
                    _save(picture, target / slice_file)
                    origins[str(slice_file)] = str(source.resolve()), index
    if empty := [group for group, is_marked in marked.items() if not is_marked]:
        msg = f"Masks mark nothing of {empty[:5]}, in the folder of abnormal scans. Correct them or move the scans."
        raise ValueError(msg)
    return origins


def _read_marks(path: Path, scan: Scan, scan_path: Path) -> np.ndarray:
    """Return where a mask marks a scan, bool ``(N, H, W)``."""
    mask = read_scan(path, as_mask=True)
    is_picture = mask.is_8_bit and path.name.lower().endswith(PILLOW_SUFFIXES)
    if is_picture:
        check_mask_values(path, mask.slices)
    marks = mask.slices > (MASK_THRESHOLD if is_picture else 0)
    own, other = marks.shape, scan.slices.shape[:3]
    is_same = (own, mask.orientation) == (other, scan.orientation)
    if mask.affine is not None and scan.affine is not None:
        is_same &= np.allclose(mask.affine, scan.affine, rtol=1e-3, atol=0.1)
    if not is_same:
        msg = (
            f"Mask {path} and its scan {scan_path} are not on the same grid. Slices, height and width: {own}, {other}; "
            f"orientation: {mask.orientation}, {scan.orientation}; affine: {mask.affine}, {scan.affine}. Resample it."
        )
        raise ValueError(msg)
    return marks


def _save(image: Image.Image, path: Path) -> None:
    if path.exists():
        msg = f"Two scans have the slice {path.name}: one file is named like a slice of another. Rename it."
        raise ValueError(msg)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
