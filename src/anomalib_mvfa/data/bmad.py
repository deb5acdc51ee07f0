"""BMAD (Bao et al., 2023): six medical data sets, in anomalib's and in the published folder layout."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from anomalib.data import BMAD
from anomalib.data.utils import LabelName, TestSplitMode, ValSplitMode
from filelock import FileLock
from pandas import DataFrame

from ..io import explain_failed_write
from .dataset import SampleDataset
from .few_shot import FewShot
from .leave_one_out import LeaveOneOut
from .reading import by_name, check_mask_names, find_images

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
MASK_FOLDERS = ("label", "anomaly_mask")
LABEL_FOLDERS = {"good": LabelName.NORMAL, "Ungood": LabelName.ABNORMAL}
"""Folders in a split, and the label of their images."""


class Category(NamedTuple):
    """A data set of BMAD: its class name for prompts, whether it has masks, and its modality."""

    class_name: str
    has_masks: bool
    modality: str


CATEGORIES = {
    "Brain": Category("Brain", has_masks=True, modality="MRI"),
    "Liver": Category("Liver", has_masks=True, modality="CT"),
    "Retina_RESC": Category("retinal OCT", has_masks=True, modality="OCT"),
    "Retina_OCT2017": Category("retinal OCT", has_masks=False, modality="OCT"),
    "Chest": Category("Chest X-ray film", has_masks=False, modality="X-ray"),
    "Histopathology": Category("histopathological image", has_masks=False, modality="histology"),
}


def check_category(name: str) -> None:
    """Raise ValueError for a name that is no category of BMAD."""
    if name not in CATEGORIES:
        msg = f"BMAD has no category {name!r}. Choose from: {', '.join(CATEGORIES)}."
        raise ValueError(msg)


def category_folder(root: str | Path, category: str) -> Path:
    """Return the folder of a category, ``root/Brain`` or ``root/Brain_AD``; FileNotFoundError if there is neither."""
    folders = [(name, Path(root, f"{name}{suffix}")) for name in CATEGORIES for suffix in ("_AD", "")]
    there = {name: folder for name, folder in folders if folder.is_dir()}
    if category not in there:
        msg = (
            f"root={str(root)!r} holds neither {category} nor {category}_AD; categories found there: "
            f"{', '.join(there) or 'none'}. Give the folder that contains {category}, or choose other categories."
        )
        raise FileNotFoundError(msg)
    return there[category]


def find_samples(root: str | Path, category: str, split: str) -> DataFrame:
    """Return anomalib's samples table of a split: ``train``, ``valid`` or ``test``.

    Reads ``<split>/good`` and ``<split>/Ungood``, with or without a folder ``img`` inside, and masks in a folder
    ``label`` or ``anomaly_mask`` beside, under the image's name up to the suffix; ValueError where these do not match,
    and FileNotFoundError where there is no image.
    """
    folder = category_folder(root, category) / split
    has_masks = CATEGORIES[category].has_masks
    if odd := sorted(path.name for path in _visible(folder) if path.is_dir() and path.name not in LABEL_FOLDERS):
        msg = f"{folder} has a folder {odd[0]!r}; its folders must be called good and Ungood. Rename or remove it."
        raise ValueError(msg)
    rows = []
    for name, label in LABEL_FOLDERS.items():
        within, beside = _images(folder / name / "img"), _images(folder / name)
        if within and beside:
            msg = f"{folder / name} has images both in img/ and beside it, such as {beside[0].name}. Put all in img/."
            raise ValueError(msg)
        images = within or beside
        masks: dict[str, Path] = {}
        if has_masks and label == LabelName.ABNORMAL and images:
            places = [parent / place for place in MASK_FOLDERS for parent in (folder / name, folder / name / "img")]
            masks = by_name([mask for place in places for mask in _images(place)], lambda path: path.stem)
            names = by_name(images, lambda path: path.stem)
            rule = "A mask lies in label or anomaly_mask under its image's name."
            check_mask_names(str(folder / name), names, masks, rule)
        rows += [(str(image), name, int(label), str(masks.get(image.stem, "")), split) for image in images]
    if not rows:
        msg = f"{folder} has no images in good/ or Ungood/ ({', '.join(sorted(IMAGE_SUFFIXES))}, any case)."
        raise FileNotFoundError(msg)
    samples = pd.DataFrame(rows, columns=["image_path", "label", "label_index", "mask_path", "split"])
    samples.attrs["task"] = "segmentation" if has_masks else "classification"
    return samples


def _visible(folder: Path) -> list[Path]:
    """Return what is in a folder and not hidden, nothing if there is no folder."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []


def _images(folder: Path) -> list[Path]:
    return find_images(folder, _visible(folder), lambda path: path.suffix.lower() in IMAGE_SUFFIXES)


class BMADOneClass(BMAD):
    """BMAD's own protocol: all normal training images, for methods that learn from them alone.

    Takes the arguments of anomalib's ``BMAD``; reads both folder layouts and all categories, those without masks too.

    Raises:
        ValueError: There is no such category in BMAD.
        FileNotFoundError: The root exists but does not hold the category.
    """

    needs_train = True  # whether training images are read; the folders that MVFA's authors published have none

    def __init__(self, *args, **kwargs) -> None:  # noqa: ANN002, ANN003  # anomalib's
        super().__init__(*args, **kwargs)
        check_category(self.category)

    @property
    def name(self) -> str:
        """Name of the data set, under which results are filed."""
        return "BMAD"

    @property
    def class_name(self) -> str:
        """Class name of the category, for prompts."""
        return CATEGORIES[self.category].class_name

    def prepare_data(self) -> None:
        """Download BMAD if the root is absent or empty.

        Raises:
            FileNotFoundError: The root holds something else.
            RuntimeError: The download failed.
        """
        if self._is_there():
            return
        lock = self.root.with_name(f".{self.root.name}.lock")
        with explain_failed_write(self.root):
            self.root.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                if not self._is_there():  # another process may have downloaded it meanwhile
                    self._download()
                lock.unlink(missing_ok=True)  # whoever still waits for it will find the data

    def _is_there(self) -> bool:
        """Whether the root holds the category; FileNotFoundError if it holds something else."""
        if not self.root.is_dir() or not any(self.root.iterdir()):
            return False
        category_folder(self.root, self.category)
        return True

    def _download(self) -> None:
        root = self.root
        # Downloaded beside it and then renamed, so that an interrupted run leaves no part of a data set.
        self.root = root.with_name(f".{root.name}.partial")
        try:
            shutil.rmtree(self.root, ignore_errors=True)
            super().prepare_data()
            if root.is_dir():
                root.rmdir()
            self.root.replace(root)
        except Exception as error:  # whatever the transport raises
            msg = (
                f"root={str(root)!r} is absent or empty, and BMAD could not be downloaded to it ({error}). Run once "
                f"with a network, or give the folder that contains {self.category}."
            )
            raise RuntimeError(msg) from error
        finally:
            shutil.rmtree(self.root, ignore_errors=True)
            self.root = root

    def _setup(self, _stage: str | None = None) -> None:
        if self.needs_train:
            self.train_data = self._read_split("train")
        if self.val_split_mode == ValSplitMode.FROM_DIR:
            self.val_data = self._read_split("valid")
        self.test_data = self._read_split("test")

    def _read_split(self, split: str) -> SampleDataset:
        return SampleDataset(find_samples(self.root, self.category, split), self.class_name)

    def _create_test_split(self) -> None:
        """Leave BMAD's own test images as they are: no training image takes the place of missing normal ones."""
        if self.test_split_mode != TestSplitMode.FROM_DIR:
            super()._create_test_split()


class BMADFewShot(FewShot):
    """K normal and K abnormal images of a BMAD category's ``valid`` folder, in 11 views (paper, Table 1).

    Args:
        root: Folder that contains the category's folder; BMAD is downloaded there if it does not exist.
        category: "Brain", "Liver", "Retina_RESC", "Retina_OCT2017", "Chest" or "Histopathology".
        kwargs: Arguments of :class:`~anomalib_mvfa.data.few_shot.FewShot` other than the source.
    """

    def __init__(self, root: Path | str = "./datasets/BMAD", category: str = "Brain", **kwargs) -> None:  # noqa: ANN003
        super().__init__(BMADOneClass(root, category), **kwargs)


class BMADLeaveOneOut(LeaveOneOut):
    """Learn from the labelled test images of the other BMAD categories, and test on one (paper, Table 2).

    Args:
        root: Folder that contains the categories' folders; BMAD is downloaded there if it does not exist.
        category: The category that is held out.
        train_categories: Categories to learn from; all others by default.
        exclude_modality: Leave categories of the same modality out as well. The published numbers do not: either
            retinal OCT set is tested by a model that has learnt from the other.
        kwargs: Arguments of :class:`~anomalib_mvfa.data.leave_one_out.LeaveOneOut` other than these two.

    Raises:
        ValueError: A category is unknown, or is held out and learnt from at once, or none is left to learn from.
    """

    def __init__(
        self,
        root: Path | str = "./datasets/BMAD",
        category: str = "Brain",
        train_categories: Sequence[str] | None = None,
        exclude_modality: bool = False,
        **kwargs,  # noqa: ANN003
    ) -> None:
        chosen = list(train_categories) if train_categories is not None else [c for c in CATEGORIES if c != category]
        for name in (category, *chosen):
            check_category(name)
        if exclude_modality:
            modality = CATEGORIES[category].modality
            chosen = [name for name in chosen if CATEGORIES[name].modality != modality]
        if category in chosen or not chosen:
            msg = f"train_categories={chosen} must name at least one category, and not category={category!r} itself."
            raise ValueError(msg)
        super().__init__([BMADOneClass(root, name) for name in (category, *chosen)], category, **kwargs)
