"""What baselines that train on features of timm's networks share in anomalib.

Axes: B images, H = W image size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib import LearningType
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule, TimmFeatureExtractor
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.v2.functional import normalize

from ..callbacks import default_callbacks
from ..contract import DataFacts, dataset_of, describe
from ..metrics.evaluator import default_evaluator
from ..model.lightning_mixin import ONNX_OPSET, plan_epochs
from ..model.processing import AntialiasedPreProcessor, OrderKeepingPostProcessor
from ..model.weights import first_line

if TYPE_CHECKING:
    _Host = AnomalibModule
else:
    _Host = object  # anomalib finds direct subclasses of AnomalibModule only, and would list the mixin as a model


def standardise(image: torch.Tensor) -> torch.Tensor:
    """Return RGB images ``(B, 3, H, W)`` in [0, 1], by ImageNet's mean and deviation; overshoots are clamped."""
    return normalize(image.clamp(0, 1), list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD))


def timm_features(
    backbone: str,
    layers: Sequence[str | int],
    pre_trained: bool,
    requires_grad: bool = False,
) -> TimmFeatureExtractor:
    """Return anomalib's extractor of features of a network.

    Args:
        backbone: Timm's name of a convolutional network.
        layers: Its layers, by timm's names or numbers.
        pre_trained: Use timm's weights in place of random ones.
        requires_grad: Whether the network is trained.

    Raises:
        ValueError: The network has no such layer.
        RuntimeError: There is no such network, or its weights could not be downloaded.
    """
    try:
        extractor = TimmFeatureExtractor(backbone, list(layers), pre_trained, requires_grad)
    except OSError as error:  # of the download
        msg = (
            f"The weights of {backbone} could not be had ({first_line(error)}). Run once with a network; or name a "
            "file for this method in the `weights` of a comparison; or pre_trained=false for random weights, to try "
            "the software out."
        )
        raise RuntimeError(msg) from error
    if len(extractor.idx) != len(layers):  # anomalib leaves the others out, with a warning
        names = [info["module"] for info in extractor.feature_extractor.feature_info.info]
        msg = f"layers={list(layers)} are not all layers of {backbone}, which has {', '.join(names)}."
        raise ValueError(msg)
    return extractor


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Draw initial weights from a seed, and leave torch's own draws as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed GPUs too, and for good
        yield


class TrainedMixin(_Host):
    """A model of anomalib but for its constructor and its training; to be named before ``AnomalibModule``.

    Of the constructor's arguments, ``max_epochs`` and ``seed`` are read here.
    """

    IMAGE_SIZE: int
    """Default height and width in pixels."""

    @classmethod
    def _sized(cls, pre_processor: Any, image_size: int) -> Any:  # noqa: ANN401  # anomalib's component, or whether
        """Return the default pre-processor for images of this size where the default one is asked for."""
        return cls.configure_pre_processor((image_size, image_size)) if pre_processor is True else pre_processor

    def setup(self, stage: str) -> None:
        """Settle how long to train, and look at what there is to learn from."""
        if stage == "fit":
            plan_epochs(self.trainer, self.hparams["max_epochs"])
            self._check_data(describe(getattr(self.trainer, "datamodule", None), dataset_of(self.trainer, "train")))

    def _check_data(self, facts: DataFacts) -> None:
        """Refuse data that cannot be learnt from, and warn of those that teach less."""

    @property
    def _epochs(self) -> int:
        """How many epochs the learning rate falls over: the trainer's, unless it has no end."""
        epochs = self.trainer.max_epochs or 0
        return epochs if epochs > 0 else self.hparams["max_epochs"]

    def _step_seed(self, batch_idx: int) -> list[int]:
        """Seed of what a training step draws, the same whether or not a run was interrupted before it."""
        return [self.hparams["seed"], self.current_epoch, batch_idx, self.global_rank]

    def validation_step(self, batch: ImageBatch, *args, **kwargs) -> STEP_OUTPUT:  # noqa: ANN002, ANN003
        """Score a batch."""
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())

    def to_torch(self, *args, **kwargs) -> Path:  # noqa: ANN002, ANN003
        """Export as anomalib does, with weights that ask for no gradient."""
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        try:
            self.requires_grad_(False)
            return super().to_torch(*args, **kwargs)
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)

    def to_onnx(self, *args, **kwargs) -> Path:  # noqa: ANN002, ANN003
        """Export as anomalib does, in the operator set that torch writes; OpenVINO's export passes through here too."""
        return super().to_onnx(*args, **{"opset_version": ONNX_OPSET, **kwargs})

    def configure_callbacks(self) -> list[Callback]:
        """Return anomalib's callbacks, and ours."""
        return default_callbacks(super().configure_callbacks())

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No sanity check: before training, there is nothing to score with."""
        return {"num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """One-class, since anomalib's engine trains no model of its few-shot type."""
        return LearningType.ONE_CLASS

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Return a pre-processor that squashes images to a square of ``image_size``, the authors' by default."""
        return AntialiasedPreProcessor(image_size[0] if image_size else cls.IMAGE_SIZE)

    @staticmethod
    def configure_post_processor() -> PostProcessor:
        """Return a post-processor for scores of any range."""
        return OrderKeepingPostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Return the metrics of :func:`anomalib_mvfa.metrics.evaluator.default_evaluator`."""
        return default_evaluator()

    @classmethod
    def configure_visualizer(cls) -> ImageVisualizer:
        """Return anomalib's visualizer, with colours that span each map, as MVFA's."""
        return ImageVisualizer(overlay_fields_config={"anomaly_map": {"colormap": True, "normalize": True}})
