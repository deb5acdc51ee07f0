"""What every model of ours is in anomalib: its defaults, how long it trains, and how it is exported."""

import logging
from pathlib import Path
from typing import Any

from anomalib import LearningType
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer, Visualizer
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn
from torchvision.transforms.v2 import InterpolationMode

from ..arguments import differences, storable
from ..callbacks import default_callbacks
from ..contract import dataset_of, datasets_of
from ..data.dataset import read_strictly
from ..data.reading import refuse_high_bit_depth
from ..io import save_atomically
from ..metrics.evaluator import default_evaluator
from ..results import ScoreVisualizer
from .export import AntialiasedPreProcessor, ExportMixin, OrderKeepingPostProcessor, ask_for_threshold

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

LIGHTNING_MAX_EPOCHS = 1000
"""What Lightning trains for when it is told nothing."""
NETWORK = {"backbone", "quick_gelu", "image_size", "adaptation", "layers", "condition_vector", "coupling_blocks"}
"""Arguments that trained weights depend on; levels and the backbone's weights are compared as they are in use."""


class AnomalibMixin(ExportMixin):  # no AnomalibModule itself: anomalib would list it as a model
    """Defaults that all models share; to be named before ``AnomalibModule``."""

    IMAGE_SIZE = 240
    """Default height and width in pixels."""
    INTERPOLATION = InterpolationMode.BICUBIC
    """How images are resized."""
    BATCH_SIZE: int | None = None
    """Images in a training batch where neither the user nor the protocol's datamodule says otherwise."""

    def __init__(
        self,
        image_size: int | None,
        pre_processor: nn.Module | bool,
        post_processor: nn.Module | bool,
        evaluator: Evaluator | bool,
        visualizer: Visualizer | bool,
        threshold: float | str | None = None,
    ) -> None:
        if pre_processor is True and image_size is not None:
            pre_processor = self.configure_pre_processor((image_size, image_size))
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        ask_for_threshold(self.post_processor, threshold)
        self.hparams.update(storable(self.hparams))  # which anomalib saves

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Log which arguments differ from the checkpoint's.

        Raises:
            RuntimeError: One of them makes another network.
        """
        super().on_load_checkpoint(checkpoint)
        differing = differences(self.hparams, checkpoint.get("hyper_parameters", {}))
        has_moved = str(self.hparams.get("backbone")).endswith(".json")
        if wrong := [
            differing[name] for name in sorted(NETWORK & differing.keys()) if name != "backbone" or not has_moved
        ]:
            msg = (
                f"The checkpoint does not fit: {', '.join(wrong)}. On the command line, leave these arguments out; in "
                f"Python, load the model by {type(self).__name__}.load_from_checkpoint(path)."
            )
            raise RuntimeError(msg)
        if differing:
            logger.info("Arguments that differ from the checkpoint's: %s.", ", ".join(differing.values()))

    # ------------------------------------------------------------------ data

    @property
    def datamodule(self) -> AnomalibDataModule | None:
        """Datamodule of the trainer, if there is one."""
        return getattr(self.trainer, "datamodule", None)

    def dataset(self, kind: str) -> Any:  # noqa: ANN401  # any dataset of anomalib items
        """Return the dataset "train", "val" or "test" of the datamodule or behind the trainer's loaders, or None."""
        return dataset_of(self.trainer, kind)

    def setup(self, stage: str) -> None:
        """Have the files of all datasets read as ours are."""
        del stage
        for dataset in datasets_of(self.trainer):
            read_strictly(dataset)

    def on_test_batch_start(self, batch: ImageBatch, *args, **kwargs) -> None:  # noqa: ANN002, ANN003
        """Refuse images of high bit depth, whose values anomalib's own data sets cut off."""
        del args, kwargs
        for path in [] if hasattr(batch, "is_8_bit") else batch.image_path or []:  # our own datasets refuse them
            refuse_high_bit_depth(path)

    on_train_batch_start = on_validation_batch_start = on_predict_batch_start = on_test_batch_start

    # ------------------------------------------------------------------ steps

    def validation_step(self, batch: ImageBatch, *args, **kwargs) -> STEP_OUTPUT:  # noqa: ANN002, ANN003
        """Score a batch."""
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())

    def log_loss(self, loss: Any, batch: ImageBatch) -> None:  # noqa: ANN401  # a scalar tensor
        """Log the training loss of a batch."""
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=batch.batch_size)

    # ------------------------------------------------------------------ anomalib's contract

    def configure_callbacks(self) -> list[Callback]:
        """Return anomalib's callbacks, and ours."""
        return default_callbacks(super().configure_callbacks())

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No sanity check: before training, there is nothing to score with."""
        return {"num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """One-class, since anomalib's engine trains no model of its few-shot and zero-shot types."""
        return LearningType.ONE_CLASS

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Return a pre-processor that resizes images to a square of ``image_size``, the method's by default."""
        return AntialiasedPreProcessor(image_size[0] if image_size else cls.IMAGE_SIZE, cls.INTERPOLATION)

    @staticmethod
    def configure_post_processor() -> PostProcessor:
        """Return a post-processor for scores of any range."""
        return OrderKeepingPostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Return image and pixel metrics, in constant memory."""
        return default_evaluator()

    @classmethod
    def configure_visualizer(cls) -> ImageVisualizer:
        """Return anomalib's visualizer, with scores in the pictures."""
        return ScoreVisualizer()


class AtomicCheckpointIO(AnomalibCheckpointIO):
    """Writes checkpoints atomically, so that a killed run leaves the last one that is complete.

    Lightning writes them to the folder for temporary files. Where that is on another file system, what follows is a
    copy over the last checkpoint, which a kill cuts off.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:  # noqa: ANN401
        """Save a checkpoint; one that is not for this machine's disks is saved as Lightning does it."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        save_atomically(checkpoint, Path(path))


def plan_epochs(trainer: Trainer, max_epochs: int) -> None:
    """Train for ``max_epochs`` unless the trainer is told otherwise, validate after the last, and save after each."""
    if type(trainer.strategy.checkpoint_io) is AnomalibCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO(trainer.strategy.checkpoint_io.extra_safe_globals)
    loop = trainer.fit_loop
    if loop.max_epochs == LIGHTNING_MAX_EPOCHS:
        loop.max_epochs = max_epochs
    monitored = any(getattr(callback, "monitor", None) for callback in trainer.checkpoint_callbacks)
    if trainer.check_val_every_n_epoch == 1 and (loop.max_epochs or 0) > 1 and not monitored:
        trainer.check_val_every_n_epoch = loop.max_epochs
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is None:
            callback._save_on_train_epoch_end = True  # noqa: SLF001  # there is no public way to change it
