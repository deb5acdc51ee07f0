"""BMAD (Bao et al., 2023): six medical data sets, in anomalib's and in the published folder layout."""

import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from anomalib.data import BMAD
from anomalib.data.utils import LabelName, TestSplitMode, ValSplitMode
from pandas import DataFrame
from torchvision.transforms.v2 import Transform

from .dataset import SampleDataset
from .protocols import FewShot, LeaveOneOut

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
MASK_FOLDERS = ("label", "anomaly_mask")
KINDS = {"good": LabelName.NORMAL, "Ungood": LabelName.ABNORMAL}
"""Folders in a split."""


@dataclass(frozen=True)
class Category:
    """A data set of BMAD: its noun for prompts, whether it has masks, and the modality that it shares with others."""

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


def check_categories(*names: str) -> None:
    """Raise ValueError for a name that is no category of BMAD."""
    unknown = [name for name in names if name not in CATEGORIES]
    if unknown:
        msg = f"BMAD has no category {', '.join(map(repr, unknown))}. Choose from: {', '.join(CATEGORIES)}."
        raise ValueError(msg)


def category_folder(root: str | Path, category: str) -> Path:
    """Return the folder of a category, ``root/Brain`` or ``root/Brain_AD``.

    Raises:
        ValueError: There is no such category in BMAD.
        FileNotFoundError: It is not under the root.
    """
    check_categories(category)
    folders = [(name, Path(root, f"{name}{suffix}")) for name in CATEGORIES for suffix in ("_AD", "")]
    there = {name: folder for name, folder in folders if folder.is_dir()}
    if category not in there:
        msg = (
            f"root={str(root)!r} holds neither {category} nor {category}_AD; categories found there: "
            f"{', '.join(there) or 'none'}. Give the folder that contains {category}, or name categories that are "
            "there (category, train_categories)."
        )
        raise FileNotFoundError(msg)
    return there[category]


def find_samples(root: str | Path, category: str, split: str) -> DataFrame:
    """Return anomalib's samples table of a split: ``train``, ``valid`` or ``test``.

    Reads ``<split>/good`` and ``<split>/Ungood``, with or without a folder ``img`` inside, and masks in a folder
    ``label`` or ``anomaly_mask`` beside, under the image's name up to the suffix.

    Raises:
        FileNotFoundError: The category is not there, or the split has no image.
        ValueError: A mask is missing or belongs to no image, or a folder has another name.
    """
    folder = category_folder(root, category) / split
    there = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    if odd := sorted(name for name in there if name not in KINDS and not name.startswith(".")):
        msg = (
            f"{folder} has a folder {odd[0]!r}; its folders must be called {' and '.join(KINDS)}. Rename or remove it."
        )
        raise ValueError(msg)
    rows = []
    for kind, label in KINDS.items():
        within, beside = _images(folder / kind / "img"), _images(folder / kind)
        if within and beside:
            msg = f"{folder / kind} has images both in img/ and beside it, such as {beside[0].name}. Put all in img/."
            raise ValueError(msg)
        images = within or beside
        masks: dict[str, Path] = {}
        if CATEGORIES[category].has_masks and label == LabelName.ABNORMAL and images:
            masks = _match_masks(folder / kind, images)
        rows += [
            {
                "image_path": str(image),
                "label": kind,
                "label_index": int(label),
                "mask_path": str(masks.get(image.stem, "")),
                "split": split,
            }
            for image in images
        ]
    if not rows:
        msg = f"{folder} has no images in good/ or Ungood/ ({', '.join(sorted(IMAGE_SUFFIXES))}, any case)."
        raise FileNotFoundError(msg)
    samples = pd.DataFrame(rows)
    samples.attrs["task"] = "segmentation" if CATEGORIES[category].has_masks else "classification"
    return samples


def _images(folder: Path) -> list[Path]:
    """Return the images in a folder; hidden files and folders are none, and other files are named in the log."""
    there = folder.iterdir() if folder.is_dir() else ()
    found = sorted(path for path in there if not path.name.startswith("."))
    images = [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES]
    if spoilt := [path for path in images if not path.is_file()]:
        msg = f"{spoilt[0]} is no file: a folder, or a link to nothing. Restore it or take it out of the data set."
        raise ValueError(msg)
    if left := [path.name for path in found if path.suffix.lower() not in IMAGE_SUFFIXES and not path.is_dir()]:
        logger.warning("%s: %d files are no images by their names and left out: %s.", folder, len(left), left[:5])
    return images


def _match_masks(folder: Path, images: list[Path]) -> dict[str, Path]:
    found = [mask for name in MASK_FOLDERS for parent in (folder, folder / "img") for mask in _images(parent / name)]
    masks = {mask.stem: mask for mask in found}
    stems = {image.stem for image in images}
    if len(masks) < len(found) or len(stems) < len(images):
        twice = sorted(name for name, count in Counter(path.stem for path in (*found, *images)).items() if count > 2)
        msg = f"{folder} has several images or masks of one name up to the suffix: {twice[:5]}. Rename or remove them."
        raise ValueError(msg)
    missing, spare = sorted(stems - set(masks)), sorted(set(masks) - stems)
    if missing or spare:
        msg = (
            f"Masks of {folder} do not match its images: {len(missing)} images have no mask {missing[:5]}, "
            f"{len(spare)} masks have no image {spare[:5]}. A mask lies in {' or '.join(MASK_FOLDERS)} under its "
            "image's name."
        )
        raise ValueError(msg)
    return masks


class BMADDataset(SampleDataset):
    """Images of one split of a BMAD category.

    Args:
        root: Folder that contains the category's folder.
        category: Name of a category.
        split: "train", "valid" or "test".
        augmentations: Anomalib's augmentations.
    """

    def __init__(
        self,
        root: Path | str,
        category: str,
        split: str,
        augmentations: Transform | None = None,
    ) -> None:
        samples = find_samples(root, category, split)
        super().__init__(samples, CATEGORIES[category].class_name, augmentations)
        self.category = category


class BMADOneClass(BMAD):
    """BMAD's own protocol: all normal training images, for methods that learn from them alone.

    Takes the arguments of anomalib's ``BMAD``; reads both folder layouts and all categories, those without masks too.

    Attributes:
        class_name: Noun of the category.
        needs_train: Whether training images are read; the folders that MVFA's authors published have none.

    Raises:
        ValueError: There is no such category in BMAD.
        FileNotFoundError: The root exists but does not hold the category.
    """

    needs_train = True

    def __init__(self, *args, **kwargs) -> None:  # noqa: ANN002, ANN003  # anomalib's
        super().__init__(*args, **kwargs)
        check_categories(self.category)

    @property
    def name(self) -> str:
        """Name of the data set, under which results are filed."""
        return "BMAD"

    @property
    def class_name(self) -> str:
        """Noun of the category, for prompts."""
        return CATEGORIES[self.category].class_name

    def prepare_data(self) -> None:
        """Download BMAD if the root is absent or empty.

        Raises:
            FileNotFoundError: The root holds something else.
            RuntimeError: The download failed.
        """
        if self.root.is_dir() and any(self.root.iterdir()):
            category_folder(self.root, self.category)
            return
        # Downloaded beside and then renamed, so that a run cut short leaves no half of a data set.
        root, self.root = self.root, self.root.with_name(f".{self.root.name}.partial")
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
            self.train_data = BMADDataset(self.root, self.category, "train")
        if self.val_split_mode == ValSplitMode.FROM_DIR:
            self.val_data = BMADDataset(self.root, self.category, "valid")
        self.test_data = BMADDataset(self.root, self.category, "test")

    def _create_test_split(self) -> None:
        """Leave BMAD's own test images as they are: no training image need take the place of a missing kind."""
        if self.test_split_mode != TestSplitMode.FROM_DIR:
            super()._create_test_split()


class BMADFewShot(FewShot):
    """K normal and K abnormal images of a BMAD category's ``valid`` folder, in 11 views (paper, Table 1).

    Args:
        root: Folder that contains the category's folder; BMAD is downloaded there if it does not exist.
        category: "Brain", "Liver", "Retina_RESC", "Retina_OCT2017", "Chest" or "Histopathology".
        kwargs: Arguments of :class:`~anomalib_mvfa.data.protocols.FewShot` other than the source.
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
        kwargs: Arguments of :class:`~anomalib_mvfa.data.protocols.LeaveOneOut` other than sources and held_out.

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
        check_categories(category, *chosen)
        if exclude_modality:
            modality = CATEGORIES[category].modality
            chosen = [name for name in chosen if CATEGORIES[name].modality != modality]
        if category in chosen or not chosen:
            msg = f"train_categories={chosen} must name at least one category, and not category={category!r} itself."
            raise ValueError(msg)
        super().__init__([BMADOneClass(root, name) for name in (category, *chosen)], category, **kwargs)
