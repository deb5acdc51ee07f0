"""Scans in datamodules and in prediction: converted to 8-bit PNG files, which all of anomalib reads, writes and shows.

.. code-block:: text

    PICTURES/scans.json          the window and the files that the pictures were made with
    PICTURES/<folder>/...        a picture for every file, or for every slice of a file: <name>_slice<number>.png

The name of a file tells slices of one volume from others: all slices of a name are one group.
"""

import copy
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
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

from ..files import room_for
from .reading import MASK_THRESHOLD, read_mask
from .scan_files import PILLOW_SUFFIXES, Bound, Scan, Window, checked_window, is_scan, pictures, read_scan, stem_of
from .support import set_aside

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

RECORD = "scans.json"
GROUPS = r"([^/]+?)(?:_slice\d+)?\.png$"
"""A picture's group: all slices of one file."""


class Scans(Folder):
    """Folders of scans (DICOM, NIfTI, PNG or TIFF of any depth), which an intensity window turns into 8-bit pictures.

    A file of several slices becomes as many pictures. Slices of an abnormal file are abnormal where its mask marks
    something, and normal elsewhere. The pictures are converted on first use, and anew when a file or the window has
    changed. Data are split by whole files; without ``normal_test_dir``, the share ``test_split_ratio`` of the normal
    ones is tested.

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
        pictures: Folder of the pictures, ``./datasets/<name>_8bit`` by default.
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
        self.pictures = Path(pictures or Path("datasets", f"{name}_8bit")).expanduser()
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
                "scans is less than one. Give normal_test_dir, or more normal scans."
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
        pictures: Folder of the pictures; what else it holds of an earlier prediction is replaced.
        transform: Anomalib's transform of images.

    Raises:
        FileNotFoundError: There is no scan.
        ValueError: A scan cannot be read or has no window.
    """

    def __init__(
        self,
        path: str | Path,
        window: Sequence[Bound] | None = None,
        pictures: str | Path = "results/pictures",
        transform: Transform | None = None,
    ) -> None:
        target = Path(pictures).expanduser()
        convert({"scans": Path(path).expanduser()}, target, checked_window(window))
        super().__init__(target / "scans", transform)


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
        ValueError: A scan cannot be read or has no window, or masks do not match.
    """
    files = {kind: _scans_in(folder) for kind, folder in sources.items()}
    record = {"window": window, "files": {kind: _states(paths) for kind, paths in files.items()}}
    record = json.loads(json.dumps(record))  # as it is read
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (target.with_name(f".{target.name}.{state}") for state in ("partial", "old"))
    with FileLock(target.with_name(f".{target.name}.lock")):
        for left in (partial, old):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        if (target / RECORD).is_file():
            if _read_record(target) == record:
                return
        elif target.exists() and any(target.iterdir()):
            msg = f"pictures={str(target)!r} holds other files. Name a new folder for the pictures."
            raise FileExistsError(msg)
        try:
            with room_for(target):
                _convert(files, sources, partial, window)
                (partial / RECORD).write_text(json.dumps(record), "utf-8")
            if target.exists():  # not removed where it is: a kill would leave part of it, with or without the record
                target.replace(old)
            partial.replace(target)
        finally:
            for left in (partial, old):
                shutil.rmtree(left, ignore_errors=True)


def _read_record(target: Path) -> Any:  # noqa: ANN401  # whatever a file holds
    try:
        return json.loads((target / RECORD).read_text("utf-8"))
    except ValueError:
        return None


def _scans_in(folder: Path) -> list[Path]:
    """Return the scans in a folder, at any depth, or the one that it is itself."""
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        msg = f"{folder} does not exist. Give the folder of the scans."
        raise FileNotFoundError(msg)
    visible = (path for path in sorted(folder.rglob("*")) if not _is_hidden(path.relative_to(folder)))
    files = [path for path in visible if not path.is_dir()]
    found = [path for path in files if is_scan(path)]
    if not found:
        msg = f"{folder} holds no scan: no DICOM, NIfTI, PNG, TIFF or JPEG file. Give the folder of the scans."
        raise FileNotFoundError(msg)
    known = set(found)
    if left := [path.name for path in files if path not in known]:
        logger.warning("%s: %d files are no scans by their names and left out: %s.", folder, len(left), left[:5])
    return found


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


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
            for index, image in enumerate(images):
                file = Path(f"{name}_slice{index:03d}.png" if len(images) > 1 else f"{name}.png")
                if marks is None:
                    _save(image, target / kind / file)
                elif len(images) > 1 and not marks[index].any():
                    _save(image, target / "normal_test" / kind / file)
                else:
                    _save(image, target / kind / file)
                    _save(Image.fromarray(marks[index].astype(np.uint8) * 255), target / "mask" / file)


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
    mask = read_scan(path)
    if mask.is_8_bit and path.suffix.lower() in PILLOW_SUFFIXES:
        height, width = scan.slices.shape[1:3]
        marks = np.asarray(read_mask(path, (width, height)))[None] > MASK_THRESHOLD
    else:
        marks = mask.slices > 0
    if marks.shape != scan.slices.shape[:3] or mask.orientation != scan.orientation:
        own, other = ((*one.shape[:3], at) for one, at in ((marks, mask.orientation), (scan.slices, scan.orientation)))
        msg = (
            f"Mask {path} is {own} in slices, height, width and orientation, its scan {scan_path} {other}. They must "
            "agree."
        )
        raise ValueError(msg)
    if len(marks) > 1 and not marks.any():
        msg = f"Mask {path} marks nothing, and its scan is in the folder of abnormal ones. Correct one of them."
        raise ValueError(msg)
    return marks


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
