"""What the baselines share that train a network of timm or torchvision: epochs, seeds, weights, standardised images.

Axes: B images, H = W image size.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from anomalib.models.components import TimmFeatureExtractor
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.v2.functional import normalize

from ..contract import describe
from ..model.lightning_base import AnomalibMixin, plan_epochs
from ..model.weights import RANDOM_SEED, State, first_line, read_state

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares


class TrainedBaseline(AnomalibMixin):
    """A model that trains a network of its own; to be named before ``AnomalibModule``."""

    max_epochs: int
    seed: int
    normal_only_warning = ""  # what a warning says of training data without abnormal images

    def setup(self, stage: str) -> None:
        """Choose how long to train, and describe the training data."""
        super().setup(stage)
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
    backbone: str, layers: Sequence[str | int], pre_trained: bool | str, requires_grad: bool = False
) -> TimmFeatureExtractor:
    """Return anomalib's extractor of a convolutional network's features, at layers by timm's names or numbers."""
    with loading_weights(backbone):
        extractor = TimmFeatureExtractor(backbone, list(layers), pre_trained is True, requires_grad)
    check_layers(extractor, layers)
    if pre_trained is not True:
        fill_extractor(extractor, pre_trained or None)
    return extractor


def check_layers(extractor: TimmFeatureExtractor, layers: Sequence[str | int]) -> None:
    """Raise ValueError if an extractor lacks layers: anomalib leaves unknown ones out, with a warning."""
    if len(extractor.idx) != len(layers):
        names = [info["module"] for info in extractor.feature_extractor.feature_info.info]
        msg = f"layers={list(layers)} are not all layers of {extractor.backbone}, which has {', '.join(names)}."
        raise ValueError(msg)


def fill_extractor(extractor: TimmFeatureExtractor, path: str | None) -> None:
    """Give an extractor the weights of a file in timm's form, or seeded random ones where there is none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no state dict, or does not fit.
    """
    backbone = str(extractor.backbone)
    features: dict[str, Any] = {"features_only": True, "exportable": True, "out_indices": extractor.idx}
    arguments = {"dynamic_img_size": True} if extractor._uses_intermediates else features  # noqa: SLF001  # as built
    if path is None:
        with drawn_from(RANDOM_SEED):
            network = timm.create_model(backbone, **arguments)
    else:
        overlay = {"state_dict": _headless_state(backbone, path), "classifier": None, "num_classes": 0}
        try:
            # The whole network first: where only features are wanted, timm takes any file, and loads of it what fits.
            timm.create_model(backbone, pretrained=True, pretrained_cfg_overlay=overlay)
        except Exception as error:  # noqa: BLE001  # timm's converters raise whatever a strange file makes them
            msg = (
                f"The weights {path!r} do not fit the backbone {backbone} ({first_line(error)}). Name the "
                "backbone that the file was made for, or another file."
            )
            raise ValueError(msg) from None
        network = timm.create_model(backbone, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    extractor.feature_extractor.load_state_dict(network.state_dict(), strict=False)  # a classifier is not used


def _headless_state(backbone: str, path: str) -> State:
    """Read a state dict without its classifier, of which files may have another one or none."""
    state = read_state(checked_path(path))
    config = timm.get_pretrained_cfg(backbone)
    head = (config and config.classifier) or ()
    heads = tuple(f"{part}." for part in ((head,) if isinstance(head, str) else head))
    return {key: value for key, value in state.items() if not key.startswith(heads)}


def checked_path(path: str) -> Path:
    """Return a path; raise FileNotFoundError if there is no such file."""
    found = Path(path).expanduser()
    if not found.is_file():
        msg = (
            f"weights={path!r}: there is no such file. Give the path of a state dict (.pt, .pth, .safetensors); or, "
            "for random weights, null in a comparison and pre_trained=false in a model."
        )
        raise FileNotFoundError(msg)
    return found


@contextmanager
def loading_weights(backbone: str) -> Iterator[None]:
    """Turn a failed download into a RuntimeError that says what to do."""
    try:
        yield
    except OSError as error:
        msg = (
            f"The weights of {backbone} could not be loaded ({first_line(error)}). Options: run once with a network; "
            "give the path of a state dict as pre_trained; or pre_trained=false for random weights, to try it out."
        )
        raise RuntimeError(msg) from error


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Draw from a seed, and leave torch's and NumPy's own draws as they were."""
    state = np.random.get_state()  # noqa: NPY002  # SciPy draws rotations from it
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed GPUs too, and for good
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002
