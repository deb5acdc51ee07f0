"""The leave-one-out protocol over anomalib datamodules."""

from collections.abc import Sequence

from anomalib.data.utils import ValSplitMode

from ..contract import LEAVE_ONE_OUT, class_name_of_data
from .base import Source, SplitDataModule, hold_out_validation, resolve_source, set_up_source
from .dataset import ConcatDataset, SampleDataset
from .support import check_pattern, without_copies, without_groups


class LeaveOneOut(SplitDataModule):
    """Learn from the labelled test images of all sources but one, and test on that one, of which nothing is learnt.

    Every training batch comes from one source, with that source's class name and masks; validation shows the validation
    images of the training sources. Of a training source without validation images of its own, a part of the test images
    (its ``val_split_ratio``, a half by default) is held out as such, drawn from the seed. Copies of tested images are
    not learnt from.

    Args:
        sources: Anomalib datamodules, or mappings with their ``class_path`` and ``init_args``.
        held_out: Category of the source that is tested, or its name if it has no category; the first one's by default.
        train_batch_size: Images in a training batch; by default the model's: 1 for MVFA, as published.
        group_by: Regular expression on the training sources' image paths, as for
            :class:`~anomalib_mvfa.data.few_shot.FewShot`: no group is both learnt from and validated on. By default,
            each source's own ``group_by`` if it has one.
        kwargs: Further arguments of :class:`~anomalib_mvfa.data.base.SplitDataModule`.

    Attributes:
        target: The held-out source.
        training: The other sources.
        support: None: the held-out source has no known images.
        class_name: Class name of the held-out source, for prompts.

    Raises:
        ValueError: There are fewer than two sources, or none is called ``held_out``.
    """

    protocol = LEAVE_ONE_OUT
    support = None

    def __init__(
        self,
        sources: Sequence[Source],
        held_out: str | None = None,
        train_batch_size: int | None = None,
        group_by: str | None = None,
        **kwargs,  # noqa: ANN003  # the protocols' common arguments
    ) -> None:
        check_pattern("group_by", group_by)
        self.group_by = group_by
        resolved = [resolve_source(source) for source in sources]
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
        super().__init__(train_batch_size, **kwargs)
        self.sources, self.category = [self.target, *self.training], held_out

    def _setup(self, _stage: str | None = None) -> None:
        mode, self.target.val_split_mode = self.target.val_split_mode, ValSplitMode.NONE  # all of it is tested
        set_up_source(self.target, self.seed, self.partial_masks)
        self.target.val_split_mode = mode  # another protocol may use the same source
        self.test_data = SampleDataset.of(self.target.test_data, self.target.test_data.samples, self.class_name)
        train, val = [], []
        for source in self.training:
            own, learnt = set_up_source(source, self.seed, self.partial_masks), source.test_data.samples
            group_by = self.group_by or getattr(source, "group_by", None)
            if own is None:
                learnt, validating = hold_out_validation(source, learnt, self.seed, group_by)
            else:
                validating = without_groups(own.samples, learnt, group_by)
            learnt = without_copies(learnt, self.test_data.samples.image_path)
            class_name = class_name_of_data(source) or source.name
            train.append(SampleDataset.of(source.test_data, learnt, class_name))
            val.append(SampleDataset.of(source.test_data if own is None else own, validating, class_name))
        self.train_data, self.val_data = ConcatDataset(train), ConcatDataset(val)
