"""The few-shot protocol over any anomalib datamodule."""

import logging
from pathlib import Path

import pandas as pd
from anomalib.data.utils import LabelName
from pandas import DataFrame, Series

from ..arguments import check_bounds
from ..contract import FEW_SHOT, has_label
from .base import Source, SplitDataModule, hold_out_validation, resolve_source, set_up_source
from .dataset import SampleDataset, SupportViewDataset, lacks_mask
from .support import (
    LABELS,
    check_pattern,
    draw,
    draw_groups,
    duplicates,
    groups_of,
    pick,
    read_support_list,
    warn_of_lookalikes,
    without_groups,
)

SHOWN = 40
"""Support images that the log names."""
ARGUMENTS = {"k_shot": LabelName.NORMAL, "abnormal_shots": LabelName.ABNORMAL}
"""Arguments that say how many images of a label are the support."""

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares


class FewShot(SplitDataModule):
    """K normal and K abnormal labelled images of a data set (the support), in 11 views or the model's own, to train on.

    The support is taken out of the source's validation images; test images stay as they are. If the source has no
    validation images of its own, a part of its test images (its ``val_split_ratio``, a half by default) is first held
    out as such, drawn from the seed; ``support_list`` may then name any of the test images, which are taken out before.

    Args:
        source: Any anomalib datamodule, or a mapping with its ``class_path`` and ``init_args``.
        k_shot: Number of normal support images K; None for all images that the support may be drawn from.
        abnormal_shots: Number of abnormal support images, K by default; with 0, methods that learn from normal images
            get K of them, without views.
        support_list: File that names the support, or folder with ``<category>/<K>-shot.txt``, in the published form;
            by default the support is drawn from the seed.
        group_by: Regular expression on image paths whose match (or first group) names a patient, say. No group is then
            in more than one of support, validation and test: validation images that share one with either are left out.
            By default, the source's ``group_by`` if it has one, as :class:`~anomalib_mvfa.data.scans.Scans` has.
        train_batch_size: Views in a training batch; by default the model's: 1 for MVFA, which does worse with more.
        views: Whether methods that learn from normal images alone get their views as well. Those that augment by
            themselves need none.
        kwargs: Further arguments of :class:`~anomalib_mvfa.data.base.SplitDataModule`.

    Attributes:
        support: Views of the support images.
        class_name: The source's class name for prompts.

    Raises:
        ValueError: K is too small or too large, the list does not fit, or a support image appears in validation or
            test again.
    """

    protocol = FEW_SHOT
    needs_train = False
    needs_test = True

    def __init__(
        self,
        source: Source,
        k_shot: int | None = 4,
        abnormal_shots: int | None = None,
        support_list: Path | str | None = None,
        group_by: str | None = None,
        train_batch_size: int | None = None,
        views: bool = False,
        **kwargs,  # noqa: ANN003  # the protocols' common arguments
    ) -> None:
        self.source = resolve_source(source)
        super().__init__(train_batch_size, **kwargs)
        self.sources, self.category = [self.source], self.source.category
        self.k_shot, self.abnormal_shots = k_shot, k_shot if abnormal_shots is None else abnormal_shots
        for name, low in (("k_shot", 1), ("abnormal_shots", 0)):
            if (value := getattr(self, name)) is not None:
                check_bounds(name, value, low)
        self.views = views
        self.support_list = support_list
        self.group_by = group_by or getattr(self.source, "group_by", None)
        check_pattern("group_by", self.group_by)
        self.support: SupportViewDataset

    def _setup(self, _stage: str | None = None) -> None:
        """Set the source up, and split its images into support, validation and test."""
        own = set_up_source(self.source, self.seed, self.partial_masks, self.needs_train)
        dataset = self.source.test_data if own is None else own
        pool, test = dataset.samples, self.source.test_data.samples
        undivided = getattr(self.source, "undivided", False)
        support = self._named(pool) if self.support_list else self._drawn_first(pool) if undivided else None
        if own is None:
            rest = pool if support is None else self._without(pool, support)
            test, pool = hold_out_validation(self.source, rest, self.seed, self.group_by)
        pool = self._without(pool, test)
        if support is None:
            support = self._drawn(pool)
        elif shared := set(groups_of(support, self.group_by)) & set(groups_of(test, self.group_by)):
            msg = (
                f"support_list={str(self.support_list)!r} names images of {sorted(shared)}, which are tested too "
                f"(group_by={self.group_by!r}). Name images of other groups."
            )
            raise ValueError(msg)
        val = self._without(pool, support)
        if self.abnormal_shots == 0:  # others are not learnt from, but left out of the test as where they are
            is_normal = support.label_index == LabelName.NORMAL
            others, support = support[~is_normal], support[is_normal]
            val = pd.concat([val, self._without(others, support)]) if undivided else val
        self._check(support, val, test)

        as_they_are = SampleDataset.of(dataset, support, self.class_name)
        self.support = SupportViewDataset(as_they_are)
        needs_views = self.views or has_label(as_they_are, LabelName.ABNORMAL)
        self.train_data = self.support if needs_views else as_they_are
        self.val_data = SampleDataset.of(dataset, val, self.class_name)
        self.test_data = SampleDataset.of(self.source.test_data, test, self.class_name)
        self._log(dataset.samples if own is None else pd.concat([dataset.samples, test]), undivided)

    def _update_augmentations(self) -> None:
        super()._update_augmentations()
        if hasattr(self, "support"):
            self.support.augmentations = self.train_data.augmentations

    def _named(self, pool: DataFrame) -> DataFrame:
        """Return the support that the list names: normal images, then abnormal ones."""
        names = read_support_list(str(self.support_list), self.category, self.k_shot)
        counts = {LabelName.NORMAL: self.k_shot, LabelName.ABNORMAL: self.abnormal_shots or None}
        chosen = []
        for label, count in counts.items():
            where = f"support_list={str(self.support_list)!r} ({LABELS[label][0]})"
            chosen.append(pick(pool[pool.label_index == label], names[label], count, where))
        return pd.concat(chosen, ignore_index=True)

    def _drawn(self, pool: DataFrame) -> DataFrame:
        """Return the support that the seed draws: normal images, then abnormal ones."""
        chosen = []
        for argument, label in ARGUMENTS.items():
            images = pool[pool.label_index == label]
            count = len(images) if getattr(self, argument) is None else getattr(self, argument)
            if len(images) < count:
                grouped = f" in groups of their own (group_by={self.group_by!r})" if self.group_by else ""
                msg = (
                    f"{argument}={count} is too large: {self.category or self.name} has {len(images)} "
                    f"{LABELS[label][0]} validation images{grouped}. Choose at most {len(images)}, or give a source "
                    "with more (val_split_mode='from_test', val_split_ratio)."
                )
                raise ValueError(msg)
            chosen.append(draw(images, count, self.seed))
        return pd.concat(chosen, ignore_index=True)

    def _drawn_first(self, samples: DataFrame) -> DataFrame:
        """Return the support that the seed draws from all images, as many as there are if there are fewer than asked.

        What is drawn depends on K alone: abnormal images that are not learnt from are drawn too, for the same test.
        """
        counts = {LabelName.NORMAL: self.k_shot, LabelName.ABNORMAL: self.abnormal_shots or self.k_shot}
        return draw_groups(samples, counts, self.seed, self.group_by)

    def _log(self, samples: DataFrame, undivided: bool) -> None:
        """Log the support, how many images of which kind go where, and what that leaves undone."""
        name, files = self.category or self.name, [Path(path).name for path in self.support.samples.image_path]
        parts = {"support": self.support, "validation": self.val_data, "test": self.test_data}
        table = DataFrame({part: _count(data.samples) for part, data in parts.items()}).T
        if (left := _count(samples) - table.sum()).any():
            table.loc["left out"] = left
        shown = ", ".join(files[:SHOWN]) + ", ..." * (len(files) > SHOWN)
        logger.info("Support of %s: %s. What its %d images are for:\n%s", name, shown, len(samples), table.to_string())
        if not undivided:
            return
        notes = []
        for argument, label in ARGUMENTS.items():
            kind, asked = LABELS[label][0], getattr(self, argument)
            if asked and table[kind].sum() and (learnt := table[kind]["support"]) != asked:
                name_of = "k_shot" if asked == self.k_shot else argument
                why = "in whole groups" if learnt > asked else "all that there are"
                notes.append(f"{name_of}={asked} has become {learnt} {kind} image{'' if learnt == 1 else 's'}, {why}")
            if len(self.test_data) and not table[kind]["test"]:
                notes.append(f"no {kind} image is left to test, without which most metrics are not defined (NaN)")
        if notes:
            logger.warning("%s: %s. More images help, or a smaller k_shot.", name, "; ".join(notes))

    def _without(self, samples: DataFrame, others: DataFrame) -> DataFrame:
        """Return the samples that share no group with others."""
        return without_groups(samples, others, self.group_by)

    def _check(self, support: DataFrame, val: DataFrame, test: DataFrame) -> None:
        """Raise ValueError where support images are evaluated too, or nothing is left to test."""
        if found := duplicates(support.image_path, [*val.image_path, *test.image_path]):
            shown = "; ".join(f"{one} = {other}" for one, other in found[:3])
            msg = (
                f"{len(found)} support images appear in validation or test again: {shown}. Remove the duplicates, or "
                "choose another seed or support_list."
            )
            raise ValueError(msg)
        lacking = lacks_mask(support)
        if lacking.any() and lacking.sum() == (support.label_index == LabelName.ABNORMAL).sum():
            msg = (
                f"No abnormal support image of {self.category or self.name} has a mask to learn from: "
                f"{support.image_path[lacking].tolist()[:5]}. Choose another seed, a larger k_shot or a support_list."
            )
            raise ValueError(msg)
        warn_of_lookalikes(support.image_path, test.image_path)
        if self.needs_test and not len(test):
            msg = (
                f"{self.category or self.name} has no test image left beside {len(support)} support and {len(val)} "
                f"validation images (group_by={self.group_by!r}). Lower k_shot or val_split_ratio, or add images."
            )
            raise ValueError(msg)


def _count(samples: DataFrame) -> Series:
    """Return the numbers of normal and of abnormal images, and of those with a mask."""
    is_abnormal = samples.label_index == LabelName.ABNORMAL
    with_mask = is_abnormal & (samples.mask_path.fillna("") != "") if "mask_path" in samples else is_abnormal & False
    return Series({"normal": (~is_abnormal).sum(), "abnormal": is_abnormal.sum(), "with mask": with_mask.sum()})
