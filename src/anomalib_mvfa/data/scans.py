"""Scans in datamodules and in prediction: converted to 8-bit PNG files, which all of anomalib reads, writes and shows.

.. code-block:: text

    PICTURES/scans.json          the window and the files that the pictures were made with, and the pictures' names
    PICTURES/<folder>/...        a picture for every file, or for every slice of a file: <name>_slice<number>.png

All slices of a file are one group, and so are the files of one slice in a folder of their own: those of a DICOM series.
"""

import copy
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anomalib.data import Folder, PredictDataset
from anomalib.data.utils import LabelName, Split, ValSplitMode
from filelock import FileLock
from PIL import Image
from rich.progress import track
from torchvision.transforms.v2 import Transform

from ..io import explain_full_disk
from .reading import MASK_THRESHOLD, read_mask
from .scan_files import PILLOW_SUFFIXES, Bound, Scan, Window, checked_window, is_scan, pictures, read_scan, stem_of
from .support import set_aside

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

RECORD = "scans.json"
MADE_BY = "anomalib_mvfa.Scans"
"""Tells our records from others' files of that name."""
GROUPS = r".*/(?:normal_test|abnormal|normal)/(.+(?=_slice\d+\.png$)|.+(?=/[^/]+\.png$)|[^/]+(?=\.png$))"
"""A picture's group: the file, or the folder that a file of one slice is in."""


class Scans(Folder):
    """Folders of scans (DICOM, NIfTI, PNG or TIFF of any depth), which an intensity window turns into 8-bit pictures.

    A file of several slices becomes as many pictures. Slices of an abnormal file are abnormal where its mask marks
    something, and normal elsewhere. The pictures are converted on first use, and anew when a file or the window has
    changed. Data are split by whole files, and files of one slice by the folders that they are in, if they are in any;
    without ``normal_test_dir``, the share ``test_split_ratio`` of the normal ones is tested.

    Args:
        name: Name of the data set, under which results are filed.
        normal_dir: Folder of normal scans.
        root: Folder that the others are in.
        abnormal_dir: Folder of abnormal scans.
        normal_test_dir: Folder of normal scans to test on.
        mask_dir: Folder of masks, in any of these formats, above 0 where abnormal; named like their scans.
        window: What becomes black and what white, of files of more than 8 bits: two values in the file's units
            (Hounsfield units of CT), or two percentiles of a file, such as ``["1%", "99%"]``. By default, the window
            that a DICOM file has itself.
        pictures: Folder of the pictures, by default one below ``./datasets/<name>_8bit``, which is that of these
            folders and this window alone. A folder that you name is for one run at a time: its pictures are replaced
            when a run has other scans or another window.
        kwargs: Further arguments of anomalib's ``Folder``: batch sizes, workers, augmentations and splits.

    Attributes:
        group_by: What tells slices of one file from others, for protocols that keep groups apart.

    Raises:
        ValueError: The window is none.
    """

    group_by = GROUPS

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
        self.folders = {kind: Path(root or ".", folder).expanduser() for kind, folder in given.items() if folder}
        self.window = checked_window(window)
        own = Path("datasets", f"{name}_8bit", _digest(self.folders, self.window))
        self.pictures = Path(pictures or own).expanduser()
        super().__init__(
            name,
            normal_dir="normal",
            root=self.pictures,
            abnormal_dir="abnormal" if abnormal_dir else None,
            mask_dir="mask" if mask_dir else None,
            **kwargs,
        )

    def prepare_data(self) -> None:
        """Convert the scans, unless that has been done.

        Raises:
            FileNotFoundError: A folder does not exist or holds no scan.
            ValueError: A scan cannot be read or has no window, or masks do not match.
        """
        convert(self.folders, self.pictures, self.window)

    def _setup(self, _stage: str | None = None) -> None:
        self.prepare_data()  # which a trainer would have called, and others may not have
        self.normal_test_dir = "normal_test" if (self.pictures / "normal_test").is_dir() else None
        super()._setup(_stage)
        if "normal_test" not in self.folders:
            learnt = self.train_data.samples
            self.train_data.samples, tested = set_aside(learnt, self.test_split_ratio, self.seed or 0, self.group_by)
            tested = pd.concat([self.test_data.samples, tested.assign(split=Split.TEST.value)])
            tested.attrs = dict(self.test_data.samples.attrs)
            self.test_data.samples = tested
        if not (self.test_data.samples.label_index == LabelName.NORMAL).any():
            msg = (
                f"{self.name} has no normal image to test on: test_split_ratio={self.test_split_ratio} of its normal "
                "scans is less than one (files of one slice in a folder of their own count as one). Give "
                "normal_test_dir, or more normal scans."
            )
            raise ValueError(msg)

    def _create_val_split(self) -> None:
        """Split by whole files, where anomalib would split by slices."""
        if self.val_split_mode != ValSplitMode.FROM_TEST:
            super()._create_val_split()
            return
        self.val_data = copy.deepcopy(self.test_data)
        self.test_data.samples, self.val_data.samples = set_aside(
            self.test_data.samples, self.val_split_ratio, self.seed or 0, self.group_by
        )


class PredictScans(PredictDataset):
    """Scans to predict on: see :class:`Scans`.

    Args:
        path: A scan, or a folder of scans.
        window: See :class:`Scans`.
        pictures: Folder of the pictures, see :class:`Scans`; by default one below ``./results/pictures``.
        transform: Anomalib's transform of images.

    Raises:
        FileNotFoundError: There is no scan.
        ValueError: A scan cannot be read or has no window.
    """

    def __init__(
        self,
        path: str | Path,
        window: Sequence[Bound] | None = None,
        pictures: str | Path | None = None,
        transform: Transform | None = None,
    ) -> None:
        sources, bounds = {"scans": Path(path).expanduser()}, checked_window(window)
        target = Path(pictures or Path("results", "pictures", _digest(sources, bounds))).expanduser()
        convert(sources, target, bounds)
        super().__init__(target / "scans", transform)


def _digest(sources: Mapping[str, Path], window: Window | None) -> str:
    """Return a name for the pictures of scans in a window."""
    asked = [window, {kind: str(folder.resolve()) for kind, folder in sources.items()}]
    return hashlib.sha256(json.dumps(asked).encode("utf-8", "surrogateescape")).hexdigest()[:12]


def convert(sources: Mapping[str, Path], target: Path, window: Window | None) -> None:
    """Convert scans to pictures, unless the target holds them already; it never holds a part of them.

    Args:
        sources: Folders of scans by the names of their pictures' folders: "mask" is one of masks of those in
            "abnormal", whose normal slices go to "normal_test".
        target: Folder of the pictures; one that holds other things than pictures made here is left alone.
        window: See :data:`~anomalib_mvfa.data.scan_files.Window`.

    Raises:
        FileNotFoundError: A folder does not exist or holds no scan.
        FileExistsError: The target holds other things.
        ValueError: A scan cannot be read or has no window, masks do not match, or a folder is inside another.
    """
    target = target.resolve()  # it may be a link to another disk
    _check_apart({**sources, "pictures": target})
    files = {kind: _scans_in(folder) for kind, folder in sources.items()}
    asked = {"made_by": MADE_BY, "window": window, "files": {kind: _states(paths) for kind, paths in files.items()}}
    asked = json.loads(json.dumps(asked))  # as it is read
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (target.with_name(f".{target.name}.{state}") for state in ("partial", "old"))
    with FileLock(target.with_name(f".{target.name}.lock")):
        for left in (partial, old):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        record, there = _read_record(target), _names_in(target)
        ours = {RECORD, *record["pictures"]} if record else set()
        if target.is_file() or set(there) - ours:
            msg = f"pictures={str(target)!r} holds other files, or is one. Name a new folder for the pictures."
            raise FileExistsError(msg)
        if record == {**asked, "pictures": [name for name in there if name != RECORD]}:
            return
        try:
            with explain_full_disk(target):
                _convert(files, sources, partial, window)
                record = {**asked, "pictures": _names_in(partial)}
                (partial / RECORD).write_text(json.dumps(record), "utf-8")
            if target.exists():  # not removed where it is: a kill would leave part of it, with or without the record
                target.replace(old)
            partial.replace(target)
        finally:
            for left in (partial, old):
                shutil.rmtree(left, ignore_errors=True)


def _check_apart(folders: Mapping[str, Path]) -> None:
    """Raise ValueError for a folder that is, or is inside, another: its images would have two labels."""
    for (kind, folder), (other, outer) in permutations(folders.items(), 2):
        if folder.resolve().is_relative_to(outer.resolve()):
            msg = (
                f"The folder of {kind} ({folder}) is, or is inside, that of {other} ({outer}). Give each a folder of "
                "its own."
            )
            raise ValueError(msg)


def _read_record(target: Path) -> dict[str, Any]:
    """Return our record of the pictures in a folder, empty if it is none."""
    try:
        record = json.loads((target / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and record.get("made_by") == MADE_BY else {}


def _names_in(folder: Path) -> list[str]:
    """Return the places of all files in a folder, of which there are none if it is none."""
    return sorted(str(path.relative_to(folder)) for path in _files_below(folder))


def _files_below(folder: Path) -> Iterator[Path]:
    """Return the files in a folder that are not hidden, at any depth, also behind links."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        state = os.stat(parent)  # noqa: PTH116
        folders[:] = [name for name in folders if not name.startswith(".")]
        if (key := (state.st_dev, state.st_ino)) in seen:  # links may lead around in a circle
            folders.clear()
            continue
        seen.add(key)
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _scans_in(folder: Path) -> list[Path]:
    """Return the scans in a folder, at any depth, or the one that it is itself."""
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        msg = f"{folder} does not exist. Give the folder of the scans."
        raise FileNotFoundError(msg)
    files = sorted(_files_below(folder))
    if odd := [path for path in files if path.exists() and not path.is_file()]:
        msg = f"{odd[0]} is no file. Take it out of the data set."
        raise ValueError(msg)
    found = [path for path in files if is_scan(path)]
    if not found:
        msg = f"{folder} holds no scan: no DICOM, NIfTI, PNG, TIFF or JPEG file. Give the folder of the scans."
        raise FileNotFoundError(msg)
    known = set(found)
    if left := [path.name for path in files if path not in known]:
        logger.warning("%s: %d files are no scans by their names and left out: %s.", folder, len(left), left[:5])
    return found


def _states(paths: list[Path]) -> list[tuple[str, int, int]]:
    """Return what changes when a file does."""
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def _by_name(paths: list[Path], folder: Path) -> dict[Path, Path]:
    """Return files by their places in a folder, without suffixes."""
    named: dict[Path, Path] = {}
    for path in paths:
        name = Path(stem_of(path)) if path == folder else path.relative_to(folder).with_name(stem_of(path))
        if name in named:
            msg = f"{path} and {named[name]} differ by their suffixes only. Rename one: their pictures need two names."
            raise ValueError(msg)
        named[name] = path
    return named


def _convert(
    files: Mapping[str, list[Path]],
    sources: Mapping[str, Path],
    target: Path,
    window: Window | None,
) -> None:
    named = {kind: _by_name(paths, sources[kind]) for kind, paths in files.items()}
    masks = named.pop("mask", None)
    if masks is not None:
        _check_names(named.get("abnormal", {}), masks, sources["mask"])
    marked: set[Path] = set()
    unmarked: dict[Path, Path] = {}
    for kind, paths in named.items():
        for name, path in track(paths.items(), f"Converting {kind} scans", transient=True):
            scan = read_scan(path)
            images = pictures(scan, window, path)
            marks = None
            if kind == "abnormal" and masks is not None:
                marks = _marks(masks[name], scan, path)
            elif kind == "abnormal" and len(images) > 1:
                msg = f"{path} has {len(images)} slices, and only a mask tells which are abnormal. Give mask_dir."
                raise ValueError(msg)
            is_part = len(images) > 1 or name.parent != Path()  # of a volume, or of a series in a folder of its own
            group = name.parent if is_part and len(images) == 1 else name
            if marks is not None and marks.any():
                marked.add(group)
            elif marks is not None:
                unmarked[group] = path
            for index, image in enumerate(images):
                file = Path(f"{name}_slice{index:03d}.png" if len(images) > 1 else f"{name}.png")
                if marks is None:
                    _save(image, target / kind / file)
                elif is_part and not marks[index].any():
                    _save(image, target / "normal_test" / kind / file)
                else:
                    _save(image, target / kind / file)
                    _save(Image.fromarray(marks[index].astype(np.uint8) * 255), target / "mask" / file)
    for group, path in unmarked.items():
        if group not in marked:
            msg = f"The mask of {path} marks nothing, and it is in the folder of abnormal scans. Correct one of them."
            raise ValueError(msg)


def _check_names(scans: Mapping[Path, Path], masks: Mapping[Path, Path], folder: Path) -> None:
    missing, spare = sorted(map(str, set(scans) - set(masks))), sorted(map(str, set(masks) - set(scans)))
    if missing or spare:
        msg = (
            f"Masks in {folder} do not match the abnormal scans: {len(missing)} scans have no mask {missing[:5]}, "
            f"{len(spare)} masks have no scan {spare[:5]}. A mask has its scan's name."
        )
        raise ValueError(msg)


def _marks(path: Path, scan: Scan, scan_path: Path) -> np.ndarray:
    """Return where a mask marks a scan ``(N, H, W)``."""
    mask = read_scan(path, as_mask=True)
    is_picture = mask.is_8_bit and path.suffix.lower() in PILLOW_SUFFIXES
    if is_picture and len(mask.slices) == 1:
        height, width = scan.slices.shape[1:3]
        marks = np.asarray(read_mask(path, (width, height)))[None] > MASK_THRESHOLD
    elif is_picture:
        marks = np.any(mask.slices > MASK_THRESHOLD, axis=-1)  # of pages, which are read as colours
    else:
        marks = mask.slices > 0
    if marks.ndim > 3:
        msg = f"Mask {path} has colours; grey values are expected."
        raise ValueError(msg)
    if marks.shape != scan.slices.shape[:3] or mask.orientation != scan.orientation:
        own, other = ((*one.shape[:3], at) for one, at in ((marks, mask.orientation), (scan.slices, scan.orientation)))
        msg = (
            f"Mask {path} is {own} in slices, height, width and orientation, its scan {scan_path} {other}. They must "
            "agree."
        )
        raise ValueError(msg)
    if mask.grid is not None and scan.grid is not None and not np.allclose(mask.grid, scan.grid, rtol=1e-3, atol=0.1):
        msg = (
            f"Mask {path} and its scan {scan_path} are not on the same grid: their affines are {mask.grid.tolist()} "
            f"and {scan.grid.tolist()}. Resample the mask."
        )
        raise ValueError(msg)
    return marks


def _save(image: Image.Image, path: Path) -> None:
    if path.exists():
        msg = f"Two scans have the picture {path.name}: one file is named like a slice of another. Rename it."
        raise ValueError(msg)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
