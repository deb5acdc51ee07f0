"""The protocol of methods that learn from all normal images, over any anomalib datamodule."""

import logging

from anomalib.data.utils import LabelName

from .base import Source
from .dataset import SampleDataset
from .few_shot import FewShot
from .support import without_copies, without_groups

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares


class FullNormal(FewShot):
    """All normal training images of a data set, for methods that learn from them alone (paper, Table 1).

    It validates and tests on the very images that :class:`~anomalib_mvfa.data.few_shot.FewShot` with the same arguments
    does, so that the two can be compared; the support that would draw is left out, and so are copies of tested images.
    Of the user's own images (FewShotFolder), all are the support, validated or tested on: the normal support images are
    then the training images.

    Args:
        source: The source, as for FewShot.
        kwargs: Arguments of FewShot; 32 images are in a training batch, where the model has no number of its own.

    Raises:
        ValueError: FewShot raises it, views=True is asked for, or the source has no normal training image of another
            group than it tests.
    """

    needs_train = True
    BATCH_SIZE = 32

    def __init__(self, source: Source, **kwargs) -> None:  # noqa: ANN003
        super().__init__(source, **kwargs)
        if self.views:
            msg = "views=True is not possible here: training images are as they are. Leave it out, or use FewShot."
            raise ValueError(msg)

    def _setup(self, _stage: str | None = None) -> None:
        super()._setup(_stage)
        del self.support  # a memory bank is built from the training images
        train = self.source.train_data
        samples = self._without(train.samples, self.test_data.samples)
        samples = without_groups(samples, self.val_data.samples, None)
        samples = samples[samples.label_index == LabelName.NORMAL]
        if not len(samples):
            msg = (
                f"{self.category or self.name} has no normal training image that is not of a tested group "
                f"(group_by={self.group_by!r}). Give a source with training images, or use FewShot."
            )
            raise ValueError(msg)
        samples = without_copies(samples, self.test_data.samples.image_path)
        self.train_data = SampleDataset.of(train, samples, self.class_name)
        logger.info("Training images of %s: %d normal ones, in place of the support.", self.category, len(samples))
