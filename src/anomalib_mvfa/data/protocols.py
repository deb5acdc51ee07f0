"""Protocols over any anomalib datamodule: which of its images train, validate and test."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from anomalib.data import AnomalibDataModule, get_datamodule
from anomalib.data.utils import LabelName, TestSplitMode, ValSplitMode
from pandas import DataFrame
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Transform

from ..contract import FEW_SHOT, LEAVE_ONE_OUT, ProtocolDefaults, class_name_of_data
from .dataset import ConcatDataset, SampleDataset, SupportViews
from .samplers import eval_loader, train_loader
from .support import KINDS, draw, group_of, pick, read_support_list, same_content, set_aside

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

Source = AnomalibDataModule | dict[str, Any]
"""A datamodule, or anomalib's mapping of one: ``class_path`` and ``init_args``."""


class _Protocol(AnomalibDataModule):
    """What protocols share: they split by themselves, and load in an order of their own.

    Args:
        train_batch_size: Images in a training batch.
        eval_batch_size: Images in a validation or test batch.
        num_workers: Processes that load images.
        train_augmentations: Applied to training images; in few-shot, before the views are taken.
        val_augmentations: Applied to validation images.
        test_augmentations: Applied to test images.
        augmentations: Applied where none of the three above is given.
        seed: Of draws, and of the order of training.
    """

    protocol: ProtocolDefaults
    seed: int

    def __init__(
        self,
        train_batch_size: int,
        eval_batch_size: int = 32,
        num_workers: int = 8,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        seed: int = 0,
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
            seed=_at_least("seed", seed, 0),
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
    validation images of its own has a part of its test images (its ``val_split_ratio``, a half by default) set aside
    as such first, drawn from the seed; ``support_list`` may then name any of the test images, which are taken out
    before.

    Args:
        source: Any anomalib datamodule, or a mapping with its ``class_path`` and ``init_args``.
        k_shot: K.
        abnormal_shots: Abnormal images, K by default; 0 gives methods that learn from normal images K of them, as they
            are.
        support_list: File that names the support, or folder with ``<category>/<K>-shot.txt``, in the published form;
            by default the support is drawn from the seed.
        group_by: Regular expression on image paths whose match (or first group) names a patient, say. No group is then
            in more than one of support, validation and test: validation images that share one with either are left out.
            By default, the source's ``group_by`` if it has one, as :class:`~anomalib_mvfa.data.scans.Scans` has.
        train_batch_size: Views in a training batch; the published code trains with 1, and larger batches did worse.
        kwargs: See :class:`_Protocol`: ``eval_batch_size``, ``num_workers``, augmentations and ``seed``.

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
        **kwargs,  # noqa: ANN003  # the protocols' common arguments
    ) -> None:
        super().__init__(train_batch_size, **kwargs)
        self.source = _resolve(source)
        self.k_shot = _at_least("k_shot", k_shot, 1)
        self.abnormal_shots = _at_least("abnormal_shots", k_shot if abnormal_shots is None else abnormal_shots, 0)
        self.support_list = support_list
        self.group_by = checked_pattern("group_by", group_by or getattr(self.source, "group_by", None))
        self.category = self.source.category
        self.support: SupportViews

    @property
    def name(self) -> str:
        """Name of the source, under which results are filed."""
        return self.source.name

    @property
    def class_name(self) -> str | None:
        """The source's noun for prompts, if it has one."""
        return class_name_of_data(self.source)

    def prepare_data(self) -> None:
        """Download the source's data if it does so."""
        self.source.prepare_data()

    def train_dataloader(self) -> DataLoader:
        """Return a loader of support views, reshuffled every epoch; they are kept in memory, so it needs no workers."""
        return train_loader(self.train_data, self.train_batch_size, self.seed, num_workers=0)

    def _setup(self, _stage: str | None = None) -> None:
        self._deal(_set_up(self.source, self.seed))

    def _deal(self, has_validation: bool) -> None:
        """Deal out the images of a source that is set up, with or without validation images of its own."""
        dataset = self.source.val_data if has_validation else self.source.test_data
        pool, test = dataset.samples, self.source.test_data.samples
        support = self._named(pool) if self.support_list else None
        if not has_validation:
            rest = pool if support is None else self._without(pool, self._groups(support))
            test, pool = _set_aside(self.source, rest, self.seed, self.group_by)
        pool = self._without(pool, self._groups(test))
        if support is None:
            support = self._drawn(pool)
        elif shared := self._groups(support) & self._groups(test):
            msg = (
                f"support_list={str(self.support_list)!r} names images of {sorted(shared)}, which are tested too "
                f"(group_by={self.group_by!r}). Name images of other groups."
            )
            raise ValueError(msg)
        val = self._without(pool, self._groups(support))
        if not self.abnormal_shots:  # a list may name abnormal images all the same, which are not learnt from
            support = support[support.label_index == LabelName.NORMAL]
        _check_disjoint(support, val, test)
        if not len(test):
            msg = (
                f"{self.category or self.name} has no test image left beside {len(support)} support and {len(val)} "
                f"validation images (group_by={self.group_by!r}). Give the source a smaller val_split_ratio, or more "
                "images."
            )
            raise ValueError(msg)

        self.support = SupportViews(SampleDataset.of(dataset, support, self.class_name))
        # Methods that learn from normal images augment by themselves; the views are MVFA's augmentation.
        self.train_data = self.support if self.abnormal_shots else SampleDataset.of(dataset, support, self.class_name)
        self.val_data = SampleDataset.of(dataset, val, self.class_name)
        self.test_data = SampleDataset.of(self.source.test_data, test, self.class_name)
        logger.info(
            "Support of %s: %s. Beside it, %d images validate and %d test.",
            self.category or self.name,
            ", ".join(Path(path).name for path in support.image_path),
            len(val),
            len(test),
        )

    def _update_augmentations(self) -> None:
        super()._update_augmentations()
        if hasattr(self, "support"):
            self.support.augmentations = self.train_data.augmentations

    def _named(self, pool: DataFrame) -> DataFrame:
        """Return the support that the list names: normal images, then abnormal ones."""
        names = read_support_list(str(self.support_list), self.category, self.k_shot)
        counts = {
            LabelName.NORMAL: self.k_shot,
            LabelName.ABNORMAL: self.abnormal_shots or len(names[LabelName.ABNORMAL]),
        }
        where = f"support_list={str(self.support_list)!r}"
        return pd.concat(
            [
                pick(pool[pool.label_index == kind], names[kind], count, f"{where} ({KINDS[kind][0]})")
                for kind, count in counts.items()
            ],
            ignore_index=True,
        )

    def _drawn(self, pool: DataFrame) -> DataFrame:
        """Return the support that the seed draws: normal images, then abnormal ones."""
        chosen = []
        for kind, count in ((LabelName.NORMAL, self.k_shot), (LabelName.ABNORMAL, self.abnormal_shots)):
            images = pool[pool.label_index == kind]
            if len(images) < count:
                argument = "k_shot" if kind == LabelName.NORMAL else "abnormal_shots"
                grouped = f" in groups of their own (group_by={self.group_by!r})" if self.group_by else ""
                msg = (
                    f"{argument}={count} is too large: {self.category or self.name} has {len(images)} "
                    f"{KINDS[kind][0]} validation images{grouped}. Choose at most {len(images)}, or give a source with "
                    "more, for instance by its val_split_mode='from_test' and val_split_ratio."
                )
                raise ValueError(msg)
            chosen.append(draw(images, count, self.seed))
        return pd.concat(chosen, ignore_index=True)

    def _groups(self, samples: DataFrame) -> set[str]:
        return {group_of(path, self.group_by) for path in samples.image_path}

    def _without(self, samples: DataFrame, groups: set[str]) -> DataFrame:
        return samples.loc[[group_of(path, self.group_by) not in groups for path in samples.image_path]]


class FullNormal(FewShot):
    """All normal training images of a data set, for methods that learn from them alone (paper, Table 1).

    It validates and tests on the very images that :class:`FewShot` with the same arguments does, so that the two can be
    compared; the support that would draw is left out.

    Args:
        source: As of :class:`FewShot`.
        train_batch_size: Images in a training batch.
        kwargs: The other arguments of :class:`FewShot`.

    Raises:
        ValueError: As :class:`FewShot`; or the source has no normal training image of another group than it tests.
    """

    def __init__(self, source: Source, train_batch_size: int = 32, **kwargs) -> None:  # noqa: ANN003
        super().__init__(source, train_batch_size=train_batch_size, **kwargs)

    def _setup(self, _stage: str | None = None) -> None:
        self._deal(_set_up(self.source, self.seed, with_train=True))
        del self.support  # a memory bank is built from the training images
        train = self.source.train_data
        samples = self._without(train.samples, self._groups(self.test_data.samples))
        samples = samples[samples.label_index == LabelName.NORMAL]
        if not len(samples):
            msg = (
                f"{self.category or self.name} has no normal training image that is not of a tested group "
                f"(group_by={self.group_by!r}). Give a source with training images, or learn from few by FewShot."
            )
            raise ValueError(msg)
        self.train_data = SampleDataset.of(train, samples, self.class_name)
        logger.info("Training images of %s: %d normal ones, in place of the support.", self.category, len(samples))

    def train_dataloader(self) -> DataLoader:
        """Return a loader of training images, reshuffled every epoch."""
        return train_loader(self.train_data, self.train_batch_size, self.seed, self.num_workers)


class LeaveOneOut(_Protocol):
    """Learn from the labelled test images of all sources but one, and test on that one, of which nothing is learnt.

    Every training batch comes from one source, with that source's noun and masks; validation shows the validation
    images of the training sources. Those of them without validation images of their own have a part of their test
    images (``val_split_ratio``, a half by default) set aside as such, drawn from the seed.

    Args:
        sources: Anomalib datamodules, or mappings with their ``class_path`` and ``init_args``.
        held_out: Category of the source that is tested, or its name if it has no category; the first one's by default.
        train_batch_size: Images in a training batch.
        kwargs: See :class:`_Protocol`: ``eval_batch_size``, ``num_workers``, augmentations and ``seed``.

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
        **kwargs,  # noqa: ANN003  # the protocols' common arguments
    ) -> None:
        super().__init__(train_batch_size, **kwargs)
        resolved = [_resolve(source) for source in sources]
        categories = [source.category or source.name for source in resolved]
        held_out = held_out or next(iter(categories), "")
        if len(resolved) < 2 or categories.count(held_out) != 1:
            msg = (
                f"held_out={held_out!r} must be the category of one of at least two sources; the sources' are "
                f"{categories}."
            )
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
        """The held-out source's noun for prompts, by default its category."""
        return class_name_of_data(self.target)

    def prepare_data(self) -> None:
        """Download the sources' data if they do so."""
        for source in (*self.training, self.target):
            source.prepare_data()

    def train_dataloader(self) -> DataLoader:
        """Return a loader of batches from one source each, reshuffled every epoch."""
        return train_loader(self.train_data, self.train_batch_size, self.seed, self.num_workers)

    def _setup(self, _stage: str | None = None) -> None:
        train, val = [], []
        for source in self.training:
            has_validation = _set_up(source, self.seed)
            dataset = source.val_data if has_validation else source.test_data
            learnt, validating = source.test_data.samples, dataset.samples
            if not has_validation:
                learnt, validating = _set_aside(source, learnt, self.seed, getattr(source, "group_by", None))
            train.append(SampleDataset.of(source.test_data, learnt, class_name_of_data(source) or source.name))
            val.append(SampleDataset.of(dataset, validating, class_name_of_data(source) or source.name))
        self.train_data, self.val_data = ConcatDataset(train), ConcatDataset(val)
        mode, self.target.val_split_mode = self.target.val_split_mode, ValSplitMode.NONE  # all of it is tested
        _set_up(self.target, self.seed)
        self.target.val_split_mode = mode  # another protocol may use the same source
        self.test_data = SampleDataset.of(
            self.target.test_data, self.target.test_data.samples, class_name_of_data(self.target)
        )


def _resolve(source: Source) -> AnomalibDataModule:
    if isinstance(source, AnomalibDataModule):
        return source
    if isinstance(source, Mapping) and "class_path" in source:
        return get_datamodule(dict(source))
    msg = f"source={source!r} must be an anomalib datamodule, or a mapping with class_path and init_args."
    raise ValueError(msg)


def _set_up(source: AnomalibDataModule, seed: int, with_train: bool = False) -> bool:
    """Set a source up; return whether it has validation images of its own, or else all its labelled ones in test."""
    if hasattr(source, "needs_train"):
        source.needs_train = with_train
    has_validation = source.val_split_mode not in {ValSplitMode.NONE, ValSplitMode.SAME_AS_TEST, ValSplitMode.FROM_TEST}
    if not has_validation:
        source.val_split_mode = ValSplitMode.NONE
    if source.seed is None:
        source.seed = seed  # else every process would split by itself
    source.setup()
    return has_validation


def _set_aside(
    source: AnomalibDataModule,
    test: DataFrame,
    seed: int,
    group_by: str | None = None,
) -> tuple[DataFrame, DataFrame]:
    """Split test images of a source into those that stay and those that validate."""
    logger.info(
        "%s has no validation images of its own: %.0f %% of its test images become such, drawn with seed %d.",
        source.category or source.name,
        100 * source.val_split_ratio,
        seed,
    )
    return set_aside(test, source.val_split_ratio, seed, group_by)


def _check_disjoint(support: DataFrame, val: DataFrame, test: DataFrame) -> None:
    twins = same_content(support.image_path, [*val.image_path, *test.image_path])
    if twins:
        shown = "; ".join(f"{one} = {other}" for one, other in twins[:3])
        msg = (
            f"{len(twins)} support images appear in validation or test again, under the same or another name: {shown}. "
            "Remove the duplicates, or choose another seed or support_list."
        )
        raise ValueError(msg)


def checked_pattern(name: str, pattern: str | None) -> str | None:
    """Return a pattern that is a regular expression, or None; else raise ValueError."""
    try:
        re.compile(pattern or "")
    except re.error as error:
        msg = f"{name}={pattern!r} is no regular expression ({error}). An example is 'patient[0-9]+'."
        raise ValueError(msg) from error
    return pattern


def _at_least(name: str, value: int, least: int) -> int:
    if value < least:
        msg = f"{name}={value} must be at least {least}."
        raise ValueError(msg)
    return value
