"""What the baselines share that train a network of timm or torchvision: epochs, seeds, weights, standardised images.

Axes: B images, H = W image size.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from anomalib.models.components import TimmFeatureExtractor
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.v2.functional import normalize

from ..contract import describe
from ..model.lightning_base import AnomalibMixin, plan_epochs
from ..model.weights import first_line

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares


class TrainedBaseline(AnomalibMixin):
    """A model that trains a network of its own; to be named before ``AnomalibModule``."""

    max_epochs: int
    seed: int
    normal_only_warning = ""  # what a warning says of training data without abnormal images

    def setup(self, stage: str) -> None:
        """Choose how long to train, and describe the training data."""
        if stage == "fit":
            plan_epochs(self.trainer, self.max_epochs)
            self.facts = describe(self.datamodule, self.dataset("train"))
            if self.facts.normal_only and self.normal_only_warning:
                logger.warning("The training data hold no abnormal image: %s", self.normal_only_warning)

    @property
    def epochs(self) -> int:
        """Epochs over which the learning rate falls: the trainer's, unless it has no end."""
        epochs = self.trainer.max_epochs or 0
        return epochs if epochs > 0 else self.max_epochs

    def step_rng(self, batch_idx: int) -> np.random.Generator:
        """Return what a training step draws from, the same whether or not a run was interrupted before it."""
        return np.random.default_rng([self.seed, self.current_epoch, batch_idx, self.global_rank])


def standardise(image: torch.Tensor) -> torch.Tensor:
    """Return RGB images ``(B, 3, H, W)`` in [0, 1], by ImageNet's mean and deviation; overshoots are clamped."""
    return normalize(image.clamp(0, 1), list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD))


def timm_features(
    backbone: str, layers: Sequence[str | int], pre_trained: bool, requires_grad: bool = False
) -> TimmFeatureExtractor:
    """Return anomalib's extractor of a convolutional network's features, at layers by timm's names or numbers."""
    with loading_weights(backbone):
        extractor = TimmFeatureExtractor(backbone, list(layers), pre_trained, requires_grad)
    if len(extractor.idx) != len(layers):  # anomalib leaves the others out, with a warning
        names = [info["module"] for info in extractor.feature_extractor.feature_info.info]
        msg = f"layers={list(layers)} are not all layers of {backbone}, which has {', '.join(names)}."
        raise ValueError(msg)
    return extractor


@contextmanager
def loading_weights(backbone: str) -> Iterator[None]:
    """Turn a failed download into a RuntimeError that says what to do."""
    try:
        yield
    except OSError as error:
        msg = (
            f"The weights of {backbone} could not be loaded ({first_line(error)}). Options: run once with a network; "
            "name a file in the `weights` of a comparison; or pre_trained=false for random weights, to try it out."
        )
        raise RuntimeError(msg) from error


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Draw initial weights from a seed, and leave torch's own draws as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed GPUs too, and for good
        yield
