"""What the protocols share: the datamodules that they split, and loaders in an order of their own."""

import logging
from collections.abc import Mapping
from typing import Any

from anomalib.data import AnomalibDataModule, AnomalibDataset, Folder, get_datamodule
from anomalib.data.utils import ValSplitMode
from pandas import DataFrame
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Transform

from ..arguments import check_bounds
from ..contract import ProtocolDefaults, class_name_of_data
from .dataset import SupportViewDataset, lacks_mask
from .folder import NamedFolder
from .samplers import eval_loader, train_loader
from .support import hold_out

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

Source = AnomalibDataModule | dict[str, Any]
"""A datamodule, or anomalib's mapping of one: ``class_path`` and ``init_args``."""


class SplitDataModule(AnomalibDataModule):
    """A datamodule that splits the images of other datamodules, its sources, by a protocol.

    Args:
        train_batch_size: Images in a training batch; by default what the model's authors train with, if that is known,
            else `BATCH_SIZE`.
        eval_batch_size: Images in a validation or test batch.
        num_workers: Processes that load images.
        train_augmentations: Augmentations of training images; in few-shot, before the views are taken.
        val_augmentations: Augmentations of validation images.
        test_augmentations: Augmentations of test images.
        augmentations: Augmentations where none of the three above are given.
        seed: Seed of draws, and of the order of training.
        partial_masks: Whether abnormal images may lack masks, where others have them. These train and score images
            alone, and are left out of pixel metrics.

    Attributes:
        protocol: Settings that the protocol implies for the model.
        sources: The sources; the first one is tested.
    """

    protocol: ProtocolDefaults
    sources: list[AnomalibDataModule]
    seed: int
    BATCH_SIZE = 1

    def __init__(
        self,
        train_batch_size: int | None,
        eval_batch_size: int = 32,
        num_workers: int = 8,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        seed: int = 0,
        partial_masks: bool = False,
    ) -> None:
        check_bounds("train_batch_size", 1 if train_batch_size is None else train_batch_size, 1)
        check_bounds("eval_batch_size", eval_batch_size, 1)
        check_bounds("seed", seed, 0)
        super().__init__(
            train_batch_size,  # type: ignore[arg-type]  # the property below replaces None
            eval_batch_size,
            num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            seed=seed,
        )
        self.partial_masks = partial_masks

    @property
    def name(self) -> str:
        """Name of the tested source, under which results are filed."""
        return self.sources[0].name

    @property
    def class_name(self) -> str | None:
        """The tested source's class name for prompts, by default its category."""
        return class_name_of_data(self.sources[0])

    @property
    def train_batch_size(self) -> int:
        """Images in a training batch: as given, else the model's, else `BATCH_SIZE`."""
        return self._train_batch_size or getattr(self._model, "BATCH_SIZE", None) or self.BATCH_SIZE

    @train_batch_size.setter
    def train_batch_size(self, value: int | None) -> None:
        self._train_batch_size = value

    def prepare_data(self) -> None:
        """Download the sources' data if they do so."""
        for source in self.sources:
            source.prepare_data()

    def _create_test_split(self) -> None:
        """Split nothing: the protocol has."""

    _create_val_split = _create_test_split

    def train_dataloader(self) -> DataLoader:
        """Return a loader of training images, reshuffled every epoch."""
        # The support is small and its images are kept in memory, which workers would not share.
        num_workers = self.num_workers if getattr(self, "support", None) is None else 0
        data, views_of = self.train_data, getattr(self._model, "training_views", None)
        if views_of and isinstance(data, SupportViewDataset):
            data = views_of(data)
        return train_loader(data, self.train_batch_size, self.seed, num_workers)

    @property
    def _model(self) -> Any:  # noqa: ANN401  # any model, None outside of a run
        return getattr(self.trainer, "lightning_module", None)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return a loader that shows every validation image once, or none when there is no image."""
        return eval_loader(self.val_data, self.eval_batch_size, self.num_workers) if len(self.val_data) else []

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return a loader that shows every test image once, or none, as the log then says, when there is no image."""
        if len(self.test_data):
            return eval_loader(self.test_data, self.eval_batch_size, self.num_workers)
        logger.info("There is no test: %s has no image left for it. The model is ready to predict.", self.name)
        return []


def resolve_source(source: Source) -> AnomalibDataModule:
    """Return a datamodule, built from its mapping if it is given as one; ValueError if it is neither."""
    if isinstance(source, Mapping) and "class_path" in source:
        source = get_datamodule(dict(source))
    if isinstance(source, AnomalibDataModule):
        source = getattr(source, "as_source", source)
        if type(source) is Folder:
            source.__class__ = NamedFolder  # with the same arguments
        return source
    msg = f"source={source!r} must be an anomalib datamodule, or a mapping with class_path and init_args."
    raise ValueError(msg)


def set_up_source(
    source: AnomalibDataModule, seed: int, partial_masks: bool, with_train: bool = False
) -> AnomalibDataset | None:
    """Set a source up, and return its validation images; None if all its labelled images are test images.

    The seed is for its splits where it has none; ``with_train`` says whether its training images are needed.
    ValueError if abnormal images lack masks, and these may not be partial.
    """
    if hasattr(source, "needs_train"):
        source.needs_train = with_train
    if source.val_split_mode in {ValSplitMode.SAME_AS_TEST, ValSplitMode.FROM_TEST}:
        source.val_split_mode = ValSplitMode.NONE
    if source.seed is None:
        source.seed = seed  # else every process would split by itself
    source.setup()
    own = None if source.val_split_mode == ValSplitMode.NONE else source.val_data
    tables = [data.samples for data in (source.test_data, own) if data is not None]
    lacking = [path for table in tables for path in table.image_path[lacks_mask(table)]]
    if lacking and not (partial_masks or getattr(source, "partial_masks", False)):
        msg = (
            f"{len(lacking)} abnormal images of {source.name} have no mask: {lacking[:5]}. Add masks, or set "
            "partial_masks=true: such images then train and score images alone, and no pixel metric counts them."
        )
        raise ValueError(msg)
    return own


def hold_out_validation(
    source: AnomalibDataModule, samples: DataFrame, seed: int, group_by: str | None
) -> tuple[DataFrame, DataFrame]:
    """Split test images of a source into those that stay and, by its ``val_split_ratio``, those that validate."""
    message = "%s has no validation images of its own: %.0f %% of its test images become such, drawn with seed %d."
    if not getattr(source, "undivided", False):  # else they have a table of what goes where
        logger.info(message, source.category or source.name, 100 * source.val_split_ratio, seed)
    return hold_out(samples, source.val_split_ratio, seed, group_by)
