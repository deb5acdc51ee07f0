"""Anomalib's ``Folder`` with files found and paired by their names, in folders of any name."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
from anomalib.data import Folder
from anomalib.data.utils import LabelName, Split
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..arguments import optional_text
from .dataset import SampleDataset
from .reading import by_name, check_mask_names, files_below, find_images

PARTS = {"normal": Split.TRAIN, "abnormal": Split.TEST, "normal_test": Split.TEST}
RULE = "A mask has its image's name, with the same addition (such as _mask) or none for all."


class NamedFolder(Folder):
    """What anomalib's ``Folder`` is in our protocols; hidden files are left out.

    An abnormal image may have no mask: the protocols refuse that or allow it.

    Raises:
        FileNotFoundError: A folder does not exist or holds no image.
        ValueError: Two files have one name, or a mask has no image.
    """

    def _setup(self, _stage: str | None = None) -> None:
        samples = self._find_samples()
        self.train_data, self.test_data = (
            SampleDataset(samples[samples.split == s.value]) for s in (Split.TRAIN, Split.TEST)
        )

    def _find_samples(self) -> pd.DataFrame:
        """Return anomalib's samples table of all images."""
        rows: list[tuple[str, str, int, str, str]] = []
        masks = self._find(self.mask_dir)
        for part, split in PARTS.items():
            found = self._find(getattr(self, f"{part}_dir"))
            label = LabelName.ABNORMAL if part == "abnormal" else LabelName.NORMAL
            paired = pair(found, masks) if label == LabelName.ABNORMAL and masks else {}
            paths = [path for images in found for path in images.values()]
            rows += [(str(path), part, int(label), str(paired.get(path, "")), split.value) for path in paths]
        samples = pd.DataFrame(rows, columns=["image_path", "label", "label_index", "mask_path", "split"])
        samples.attrs["task"] = "segmentation" if samples.mask_path.any() else "classification"
        return samples

    def _find(self, folders: str | Path | Sequence[str | Path] | None) -> list[dict[str, Path]]:
        """Return the images of each folder by their paths in it without suffixes."""
        suffixes = tuple(suffix.lower() for suffix in self.extensions or IMG_EXTENSIONS)
        found = []
        if folders is None or isinstance(folders, str | Path):
            folders = [name for name in [optional_text(folders)] if name]
        for name in folders:
            folder = Path(self.root or "", name).resolve()
            images = find_images(folder, files_below(folder), lambda path: path.name.lower().endswith(suffixes))
            if not images:
                msg = f"{folder} does not exist or holds no image ({', '.join(suffixes)}). Correct the folder's name."
                raise FileNotFoundError(msg)
            found.append(by_name(images, lambda path: path.relative_to(folder).with_suffix("").as_posix()))  # noqa: B023
        return found


def pair(images: list[dict[str, Path]], masks: list[dict[str, Path]]) -> dict[Path, Path]:
    """Return the masks of images by the images; ValueError where a mask has none or an image has two.

    Folders of masks are those of the images one by one, or one for all.
    """
    if len(images) != len(masks):
        images, masks = [_merge(images)], [_merge(masks)]
    paired: dict[Path, Path] = {}
    for ours, drawn in zip(images, masks, strict=True):
        before, after = _addition(ours, drawn)
        names = {path: name.removeprefix(before).removesuffix(after) for name, path in drawn.items()}
        own = by_name(drawn.values(), names.__getitem__)
        if set(own) - set(ours):
            check_mask_names("the abnormal images", ours, own, RULE)
        paired |= {ours[name]: path for name, path in own.items()}
    return paired


def _merge(folders: list[dict[str, Path]]) -> dict[str, Path]:
    names = {path: name for folder in folders for name, path in folder.items()}
    return by_name(names, names.__getitem__)


def _addition(images: Iterable[str], masks: Iterable[str]) -> tuple[str, str]:
    """Return what most masks' names have before and after an image's name."""
    known, counts = set(images), Counter[tuple[str, str]]()
    for name in masks:
        ends = [(i, j) for i in range(len(name)) for j in range(i + 1, len(name) + 1) if name[i:j] in known]
        counts.update((name[:i], name[j:]) for i, j in ends)
    return max(counts, key=lambda ends: (counts[ends], -len("".join(ends))), default=("", ""))
