"""Items of images and masks: resized by Pillow as 8-bit images, as in the published code, then scaled to [0, 1].

Axes: H height, W width.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataset, ImageBatch, ImageItem, PredictDataset
from anomalib.data.utils import LabelName
from pandas import DataFrame
from PIL import Image
from torchvision.transforms.v2 import Resize, Transform
from torchvision.transforms.v2.functional import to_dtype, to_image
from torchvision.tv_tensors import Mask

from ..contract import class_name_of
from .augmentation import VIEWS, view
from .reading import MASK_THRESHOLD, is_visible, read_image, read_mask, refuse_high_bit_depth


class SampleDataset(AnomalibDataset):
    """Images of a samples table, with the class name that prompts call them by.

    Args:
        samples: Anomalib's table: ``image_path``, ``mask_path``, ``label_index``, ``split``, and the task in ``attrs``.
        class_name: The class name, carried by every item and batch.
        augmentations: Anomalib's augmentations. A mere resize is done by Pillow on the 8-bit image, as in the
            published code.
        reader: Dataset of the same samples in a form of its own, which reads item i in place of this class.
    """

    def __init__(
        self,
        samples: DataFrame,
        class_name: str | None = None,
        augmentations: Transform | None = None,
        reader: AnomalibDataset | None = None,
    ) -> None:
        super().__init__(augmentations)
        self.samples = samples
        self.class_name = class_name
        self.reader = reader

    @classmethod
    def of(cls, dataset: AnomalibDataset, samples: DataFrame, class_name: str | None = None) -> "SampleDataset":
        """Return some samples of another dataset, read by that dataset if it reads in a form of its own."""
        samples = samples.reset_index(drop=True)
        samples.attrs = dict(dataset.samples.attrs)
        class_name = class_name or getattr(dataset, "class_name", None)
        reader = dataset.reader if isinstance(dataset, SampleDataset) else dataset
        if reader is None or type(reader).__getitem__ is AnomalibDataset.__getitem__:
            return cls(samples, class_name, dataset.augmentations)
        reader = copy.copy(reader)
        reader.samples = samples
        return cls(samples, class_name, dataset.augmentations, reader)

    def __getitem__(self, index: int) -> ImageItem:
        """Return an item: image ``(3, H, W)`` in [0, 1], mask ``(H, W)`` where the data set has masks, and label."""
        if self.reader is None:
            item = read_item(self, index)
        else:
            refuse_high_bit_depth(self.samples.image_path.iloc[index])
            self.reader.augmentations = self.augmentations
            item = cast("ImageItem", self.reader[index])
        item.class_name = self.class_name  # type: ignore[attr-defined]  # no field of anomalib's
        return item

    @property
    def collate_fn(self) -> Callable[[list[ImageItem]], ImageBatch]:
        """Collate items, all of one class name, into a batch that carries it."""
        return collate

    def kinds(self) -> list[np.ndarray]:
        """Return the indices of items with and without a mask, of which no batch must hold both; empty ones left out.

        All items are of one kind unless masks are missing.
        """
        missing = np.resize(lacks_mask(self.samples), len(self))
        return [kind for kind in (np.flatnonzero(~missing), np.flatnonzero(missing)) if len(kind)]


def lacks_mask(samples: DataFrame) -> np.ndarray:
    """Return whether each sample is an abnormal image without a mask among images with masks, bool ``(N)``."""
    is_abnormal = (samples.label_index == LabelName.ABNORMAL).to_numpy(bool)
    with_masks = samples.attrs.get("task") == TaskType.SEGMENTATION
    return is_abnormal & (samples.mask_path.fillna("") == "").to_numpy(bool) if with_masks else is_abnormal & False


def read_item(dataset: AnomalibDataset, index: int) -> ImageItem:
    """Read item i of a dataset: image ``(3, H, W)`` in [0, 1], mask ``(H, W)`` where there is one, and label."""
    row, augment = dataset.samples.iloc[index], dataset.augmentations
    image, mask = read_image(row.image_path), None
    if dataset.task == TaskType.SEGMENTATION and row.label_index == LabelName.NORMAL:
        mask = Image.new("L", image.size)
    elif dataset.task == TaskType.SEGMENTATION and row.label_index == LabelName.ABNORMAL and row.mask_path:
        mask = read_mask(row.mask_path, image.size)
    if isinstance(augment, Resize):
        image, augment = augment(image), None
        mask = mask.resize(image.size, Image.Resampling.NEAREST) if mask else None
    tensor = _to_tensor(image)
    gt_mask = Mask(torch.from_numpy(np.asarray(mask) > MASK_THRESHOLD).to(torch.uint8)) if mask else None
    if augment is not None:
        tensor, gt_mask = augment(tensor, gt_mask)
    return ImageItem(
        image=tensor,
        gt_mask=gt_mask,
        gt_label=None if row.label_index == LabelName.UNKNOWN else torch.tensor(int(row.label_index)),
        image_path=str(row.image_path),
        mask_path=str(row.mask_path) if mask and row.label_index == LabelName.ABNORMAL else None,
    )


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return to_dtype(to_image(image), torch.float32, scale=True)


def read_strictly(dataset: Any) -> None:  # noqa: ANN401  # any dataset
    """Let loaders read a dataset of anomalib's as :func:`read_item` does; others read as they do.

    Nothing of anomalib is changed: torch's loaders ask an object that has ``__getitems__`` for a whole batch.
    """
    kind, read = getattr(type(dataset), "__getitem__", None), None
    if kind is AnomalibDataset.__getitem__:
        read = partial(read_item, dataset)
    elif kind is PredictDataset.__getitem__:
        paths = dataset.image_filenames
        dataset.image_filenames = [path for path in paths if is_visible(path, paths)] or paths
        read = partial(_read_to_predict, dataset)
    if read is not None:
        dataset.__getitems__ = partial(_read_all, read)


def _read_all(read: Callable[[int], ImageItem], indices: list[int]) -> list[ImageItem]:
    return [read(index) for index in indices]


def read_items(dataset: Any, rows: Sequence[int]) -> list[ImageItem]:  # noqa: ANN401  # any dataset
    """Return items of a dataset, read as loaders read them."""
    return dataset.__getitems__(rows) if hasattr(dataset, "__getitems__") else [dataset[row] for row in rows]


def _read_to_predict(dataset: PredictDataset, index: int) -> ImageItem:
    path = dataset.image_filenames[index]
    image = _to_tensor(read_image(path))
    return ImageItem(image=dataset.transform(image) if dataset.transform else image, image_path=str(path))


class SupportViewDataset(SampleDataset):
    """All views of the support images, view by view: first every image itself, then every image turned, and so on."""

    VIEWS = VIEWS

    def __init__(self, support: SampleDataset) -> None:
        super().__init__(support.samples, support.class_name, support.augmentations, support.reader)
        self._items: dict[tuple[int, Transform | None], ImageItem] = {}

    def __len__(self) -> int:
        """Return how many views there are."""
        return self.VIEWS * len(self.samples)

    def __getitem__(self, index: int) -> ImageItem:
        """Return an item whose image ``(3, H, W)`` and mask ``(H, W)`` are views; IndexError if there is none."""
        if not 0 <= index < len(self):
            msg = f"View {index} does not exist; there are {len(self)}, from 0."
            raise IndexError(msg)
        return self._view(self._read(index % len(self.samples)), index)

    def _read(self, row: int) -> ImageItem:
        """Return the item of an image, to which augmentations are applied before any view is taken."""
        key = row, self.augmentations
        item = self._items.get(key) or super().__getitem__(row)
        if self.augmentations is None or isinstance(self.augmentations, Resize):
            self._items[key] = item  # the same in every epoch
        return item

    def _view(self, item: ImageItem, index: int) -> ImageItem:
        which, seen = index // len(self.samples), copy.copy(item)
        seen.image = view(cast("torch.Tensor", item.image), which)
        if item.gt_mask is not None:
            seen.gt_mask = Mask(view(item.gt_mask[None].float(), which)[0] > 0.5)
        return seen


class ConcatDataset(AnomalibDataset):
    """Several datasets, of which a batch sampler takes one batch at a time from one of them."""

    def __init__(self, parts: list[SampleDataset]) -> None:
        self.parts = parts
        super().__init__()

    @property
    def augmentations(self) -> Transform | None:
        """Anomalib's augmentations, the same for every part."""
        return self.parts[0].augmentations

    @augmentations.setter
    def augmentations(self, augmentations: Transform | None) -> None:
        for part in self.parts:
            part.augmentations = augmentations

    @property  # type: ignore[misc]  # not to be set
    def samples(self) -> DataFrame:
        """All samples, part by part."""
        samples = pd.concat([part.samples for part in self.parts], ignore_index=True)
        with_masks = TaskType.SEGMENTATION in {part.task for part in self.parts}
        samples.attrs = {"task": (TaskType.SEGMENTATION if with_masks else TaskType.CLASSIFICATION).value}
        return samples

    def __len__(self) -> int:
        """Return the number of images."""
        return sum(map(len, self.parts))

    def kinds(self) -> list[np.ndarray]:
        """Return the indices of the items that may share a batch: by part, with or without masks."""
        firsts = np.cumsum([0, *map(len, self.parts)])
        return [first + kind for first, part in zip(firsts, self.parts, strict=False) for kind in part.kinds()]

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401  # an item, or the items of a list of indices
        """Return the item of an index, or the items of a list of indices."""
        if isinstance(index, list):
            return [self[i] for i in index]
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError

    collate_fn = SampleDataset.collate_fn


def collate(items: list[ImageItem]) -> ImageBatch:
    """Collate items into a batch that carries their class name; ValueError if they have several."""
    names = {class_name_of(item) for item in items}
    if len(names) > 1:
        msg = f"A batch mixes the class names {sorted(map(str, names))}; its images must come from one data set."
        raise ValueError(msg)
    batch = cast("ImageBatch", ImageBatch.collate(items))
    batch.class_name, batch.is_8_bit = names.pop(), True  # type: ignore[attr-defined]  # no fields of anomalib's
    return batch
