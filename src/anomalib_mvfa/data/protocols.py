"""Protocols over any anomalib datamodule: which of its images train, validate and test."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from anomalib.data import AnomalibDataModule, AnomalibDataset, get_datamodule
from anomalib.data.utils import LabelName, TestSplitMode, ValSplitMode
from pandas import DataFrame
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Transform

from ..contract import FEW_SHOT, LEAVE_ONE_OUT, Protocol
from .dataset import ConcatDataset, SampleDataset, SupportViews
from .samplers import eval_loader, train_loader
from .support import KINDS, draw, group_of, pick, read_support_list, same_content

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

Source = AnomalibDataModule | dict[str, Any]
"""A datamodule, or anomalib's mapping of one: ``class_path`` and ``init_args``."""


class _Protocol(AnomalibDataModule):
    """What protocols share: they split by themselves, and load in an order of their own."""

    protocol: Protocol

    def __init__(
        self,
        train_batch_size: int,
        eval_batch_size: int,
        num_workers: int,
        seed: int,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
    ) -> None:
        super().__init__(
            train_batch_size=_at_least("train_batch_size", train_batch_size, 1),
            eval_batch_size=_at_least("eval_batch_size", eval_batch_size, 1),
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            test_split_mode=TestSplitMode.NONE,
            val_split_mode=ValSplitMode.NONE,
            seed=seed,
        )

    def _create_test_split(self) -> None:
        """Split nothing: the protocol has."""

    def _create_val_split(self) -> None:
        """Split nothing: the protocol has."""

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return a loader that shows every validation image once, or none when there is no image."""
        return eval_loader(self.val_data, self.eval_batch_size, self.num_workers) if len(self.val_data) else []

    def test_dataloader(self) -> DataLoader:
        """Return a loader that shows every test image once."""
        return eval_loader(self.test_data, self.eval_batch_size, self.num_workers)


class FewShot(_Protocol):
    """K normal and K abnormal labelled images of a data set (the support), in 11 views, to train on.

    The support is taken out of the source's validation images; test images stay as they are. A source without
    validation images of its own has a part of its test images (``val_split_ratio``, a half by default) set aside as
    such first, drawn from the seed.

    Args:
        source: Any anomalib datamodule, or a mapping with its ``class_path`` and ``init_args``.
        k_shot: K.
        abnormal_shots: Abnormal images, K by default; 0 gives methods that learn from normal images K of them, as they
            are.
        support_list: File that names the support, or folder with ``<category>/<K>-shot.txt``, in the published form;
            by default the support is drawn from the seed.
        group_by: Regular expression on image paths whose match (or first group) names a patient, say. No group is then
            in more than one of support, validation and test.
        train_batch_size: Views in a training batch; the published code trains with 1, and larger batches did worse.
        eval_batch_size: Images in a validation or test batch.
        num_workers: Processes that load validation and test images.
        train_augmentations: Applied to support images before the views are taken.
        val_augmentations: Applied to validation images.
        test_augmentations: Applied to test images.
        augmentations: Applied where none of the three above is given.
        seed: Of the draw, and of the order of training.

    Attributes:
        protocol: What it implies for the model.
        support: Views of the support images.
        class_name: The source's noun for prompts.

    Raises:
        ValueError: K is too small or too large, the list does not fit, or a support image appears in validation or
            test again.
    """

    protocol = FEW_SHOT

    def __init__(
        self,
        source: Source,
        k_shot: int = 4,
        abnormal_shots: int | None = None,
        support_list: Path | str | None = None,
        group_by: str | None = None,
        train_batch_size: int = 1,
        eval_batch_size: int = 32,
        num_workers: int = 8,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            train_batch_size,
            eval_batch_size,
            num_workers,
            seed,
            train_augmentations,
            val_augmentations,
            test_augmentations,
            augmentations,
        )
        self.source = _resolve(source)
        self.k_shot = _at_least("k_shot", k_shot, 1)
        self.abnormal_shots = _at_least("abnormal_shots", k_shot if abnormal_shots is None else abnormal_shots, 0)
        self.support_list = support_list
        self.group_by = group_by
        self.category = self.source.category
        self.support: SupportViews

    @property
    def name(self) -> str:
        """Name of the source, under which results are filed."""
        return self.source.name

    @property
    def class_name(self) -> str | None:
        """The source's noun for prompts, if it has one."""
        return getattr(self.source, "class_name", None)

    def prepare_data(self) -> None:
        """Download the source's data if it does so."""
        self.source.prepare_data()

    def train_dataloader(self) -> DataLoader:
        """Return a loader of support views, reshuffled every epoch; they are kept in memory, so it needs no workers."""
        return train_loader(self.train_data, self.train_batch_size, self.seed, num_workers=0)

    def _setup(self, _stage: str | None = None) -> None:
        _set_up_source(self.source, self.seed)
        pool, test = self.source.val_data.samples, self.source.test_data.samples
        support = self._choose(pool, test)
        chosen = set(support.image_path)
        support_groups = self._groups(support)
        taken = support_groups | self._groups(test)
        if self.group_by:
            rest = pool[[group_of(path, self.group_by) not in taken for path in pool.image_path]]
        else:
            rest = pool[~pool.image_path.isin(chosen)]
        if len(rest) < len(pool) - len(support):
            logger.info("%d validation images share a group with support or test and are left out.", len(pool) - len(support) - len(rest))

        self._check_disjoint(support, rest, test)
        dataset = self.source.val_data
        self.support = SupportViews(SampleDataset.of(dataset, support, self.class_name))
        # Methods that learn from normal images augment by themselves; the views are MVFA's augmentation.
        self.train_data = self.support if self.abnormal_shots else SampleDataset.of(dataset, support, self.class_name)
        self.val_data = SampleDataset.of(dataset, rest, self.class_name)
        self.test_data = SampleDataset.of(self.source.test_data, test, self.class_name)
        logger.info(
            "Support of %s: %s.",
            self.category or self.name,
            ", ".join(Path(path).name for path in support.image_path),
        )

    def _update_augmentations(self) -> None:
        super()._update_augmentations()
        self.support.augmentations = self.train_data.augmentations

    def _choose(self, pool: DataFrame, test: DataFrame) -> DataFrame:
        """Return the support: normal images, then abnormal ones."""
        counts = {LabelName.NORMAL: self.k_shot, LabelName.ABNORMAL: self.abnormal_shots}
        test_groups = self._groups(test)
        names = read_support_list(self.support_list, self.category, self.k_shot) if self.support_list else None
        chosen = []
        for kind, count in counts.items():
            if not count:
                continue
            word = KINDS[kind][0]
            of_kind = pool[pool.label_index == kind]
            if names is not None:
                picked = pick(of_kind, names[kind], count, f"support_list={str(self.support_list)!r} ({word})")
                clash = self._groups(picked) & test_groups if self.group_by else set()
                if clash:
                    msg = f"Support images of {sorted(clash)} belong to groups that are tested too (group_by={self.group_by!r})."
                    raise ValueError(msg)
                chosen.append(picked)
                continue
            free = of_kind
            if self.group_by:
                free = of_kind[[group_of(path, self.group_by) not in test_groups for path in of_kind.image_path]]
            if len(free) < count:
                msg = (
                    f"{'k_shot' if kind == LabelName.NORMAL else 'abnormal_shots'}={count}: only {len(free)} {word} "
                    f"validation images of {self.category or self.name} can be support. Choose at most {len(free)}."
                )
                raise ValueError(msg)
            chosen.append(draw(free, count, self.seed))
        return pd.concat(chosen, ignore_index=True)

    def _groups(self, samples: DataFrame) -> set[str]:
        return {group_of(path, self.group_by) for path in samples.image_path}

    def _check_disjoint(self, support: DataFrame, val: DataFrame, test: DataFrame) -> None:
        twins = same_content(support.image_path, [*val.image_path, *test.image_path])
        if twins:
            shown = "; ".join(f"{one} = {other}" for one, other in twins[:3])
            msg = (
                f"{len(twins)} support images appear in validation or test again, under the same or another name: {shown}. "
                "Remove the duplicates, or choose another seed or support_list."
            )
            raise ValueError(msg)


class LeaveOneOut(_Protocol):
    """Learn from the labelled test images of all sources but one, and test on that one, of which nothing is learnt.

    Every training batch comes from one source, with that source's noun and masks; validation shows the validation
    images of the training sources.

    Args:
        sources: Anomalib datamodules, or mappings with their ``class_path`` and ``init_args``.
        held_out: Category of the source that is tested; the first one's by default.
        train_batch_size: Images in a training batch.
        eval_batch_size: Images in a validation or test batch.
        num_workers: Processes that load images.
        train_augmentations: Applied to training images.
        val_augmentations: Applied to validation images.
        test_augmentations: Applied to test images.
        augmentations: Applied where none of the three above is given.
        seed: Of the order of training.

    Attributes:
        protocol: What it implies for the model.
        support: None: the held-out source has no known images.
        class_name: Noun of the held-out source.

    Raises:
        ValueError: There are fewer than two sources, or none is called ``held_out``.
    """

    protocol = LEAVE_ONE_OUT
    support = None

    def __init__(
        self,
        sources: Sequence[Source],
        held_out: str | None = None,
        train_batch_size: int = 16,
        eval_batch_size: int = 32,
        num_workers: int = 8,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            train_batch_size,
            eval_batch_size,
            num_workers,
            seed,
            train_augmentations,
            val_augmentations,
            test_augmentations,
            augmentations,
        )
        resolved = [_resolve(source) for source in sources]
        categories = [source.category or source.name for source in resolved]
        held_out = held_out or (categories[0] if categories else None)
        if len(resolved) < 2 or categories.count(held_out) != 1:
            msg = f"held_out={held_out!r} must be the category of one of at least two sources; the sources' are {categories}."
            raise ValueError(msg)
        self.target = resolved.pop(categories.index(held_out))
        self.training = resolved
        self.category = held_out

    @property
    def name(self) -> str:
        """Name of the held-out source, under which results are filed."""
        return self.target.name

    @property
    def class_name(self) -> str | None:
        """The held-out source's noun for prompts, if it has one."""
        return _noun(self.target)

    def prepare_data(self) -> None:
        """Download the sources' data if they do so."""
        for source in (*self.training, self.target):
            source.prepare_data()

    def train_dataloader(self) -> DataLoader:
        """Return a loader of batches from one source each, reshuffled every epoch."""
        return train_loader(self.train_data, self.train_batch_size, self.seed, self.num_workers)

    def _setup(self, _stage: str | None = None) -> None:
        for source in (*self.training, self.target):
            _set_up_source(source, self.seed)
        self.train_data = ConcatDataset([_whole(source.test_data, _noun(source)) for source in self.training])
        self.val_data = ConcatDataset([_whole(source.val_data, _noun(source)) for source in self.training])
        self.test_data = _whole(self.target.test_data, _noun(self.target))


def _whole(dataset: AnomalibDataset, class_name: str | None) -> SampleDataset:
    return SampleDataset.of(dataset, dataset.samples, class_name)


def _noun(source: AnomalibDataModule) -> str | None:
    return getattr(source, "class_name", None) or source.category.replace("_", " ") or None


def _resolve(source: Source) -> AnomalibDataModule:
    if isinstance(source, AnomalibDataModule):
        return source
    if isinstance(source, Mapping) and "class_path" in source:
        return get_datamodule(dict(source))
    msg = f"source={source!r} must be an anomalib datamodule, or a mapping with class_path and init_args."
    raise ValueError(msg)


def _set_up_source(source: AnomalibDataModule, seed: int) -> None:
    """Set a source up, with validation images of its own."""
    if source.val_split_mode in {ValSplitMode.NONE, ValSplitMode.SAME_AS_TEST}:
        logger.info(
            "%s has no validation images of its own: %d %% of its test images become such, drawn with seed %d.",
            source.name,
            round(100 * source.val_split_ratio),
            seed,
        )
        source.val_split_mode = ValSplitMode.FROM_TEST
        source.seed = seed
    source.setup()


def _at_least(name: str, value: int, least: int) -> int:
    if value < least:
        msg = f"{name}={value} must be at least {least}."
        raise ValueError(msg)
    return value
