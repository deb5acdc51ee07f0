"""Items of images and masks: resized by Pillow as 8-bit images, as in the published code, then scaled to [0, 1].

Axes: H height, W width.
"""

import copy
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataset, ImageBatch, ImageItem
from anomalib.data.utils import LabelName
from pandas import DataFrame, Series
from PIL import Image
from torchvision.transforms.v2 import Resize, Transform
from torchvision.transforms.v2.functional import to_dtype, to_image
from torchvision.tv_tensors import Mask

from ..contract import class_name_of
from .augmentation import VIEWS, view
from .reading import MASK_THRESHOLD, read_image, read_mask, refuse_high_bit_depth


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
        row = self.samples.iloc[index]
        if self.reader is None:
            item = self._read(row)
        else:
            refuse_high_bit_depth(row.image_path)
            self.reader.augmentations = self.augmentations
            item = cast("ImageItem", self.reader[index])
        item.class_name = self.class_name  # type: ignore[attr-defined]  # no field of anomalib's
        return item

    @property
    def collate_fn(self) -> Callable[[list[ImageItem]], ImageBatch]:
        """Collate items, all of one class name, into a batch that carries it."""
        return collate

    def _read(self, row: Series) -> ImageItem:
        image, mask = read_image(row.image_path), None
        is_abnormal, augment = row.label_index == LabelName.ABNORMAL, self.augmentations
        if self.task == TaskType.SEGMENTATION and row.label_index != LabelName.UNKNOWN:
            mask = read_mask(row.mask_path, image.size) if is_abnormal else Image.new("L", image.size)
        if isinstance(augment, Resize):
            image, augment = augment(image), None
            mask = mask.resize(image.size, Image.Resampling.NEAREST) if mask else None
        tensor = to_dtype(to_image(image), torch.float32, scale=True)
        gt_mask = Mask(torch.from_numpy(np.asarray(mask) > MASK_THRESHOLD).to(torch.uint8)) if mask else None
        if augment is not None:
            tensor, gt_mask = augment(tensor, gt_mask)
        return ImageItem(
            image=tensor,
            gt_mask=gt_mask,
            gt_label=None if row.label_index == LabelName.UNKNOWN else torch.tensor(int(row.label_index)),
            image_path=str(row.image_path),
            mask_path=str(row.mask_path) if mask and is_abnormal else None,
        )


class SupportViewDataset(SampleDataset):
    """All views of the support images, view by view: first every image itself, then every image turned, and so on."""

    def __init__(self, support: SampleDataset) -> None:
        super().__init__(support.samples, support.class_name, support.augmentations, support.reader)
        self._items: dict[tuple[int, Transform | None], ImageItem] = {}

    def __len__(self) -> int:
        """Return how many views there are."""
        return VIEWS * len(self.samples)

    def __getitem__(self, index: int) -> ImageItem:
        """Return an item whose image ``(3, H, W)`` and mask ``(H, W)`` are views."""
        which, row = divmod(index, len(self.samples))
        key = row, self.augmentations  # which are applied before the view is taken
        item = self._items.get(key) or super().__getitem__(row)
        if self.augmentations is None or isinstance(self.augmentations, Resize):
            self._items[key] = item  # the same in every epoch
        seen = copy.copy(item)
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
