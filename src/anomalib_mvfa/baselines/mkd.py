"""MKD (Salehi et al., CVPR 2021): a small network copies a large one on normal images, and fails on others.

Axes: B images, H = W image size.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule, GaussianBlur2d
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn
from torch.nn.functional import cosine_similarity, max_pool2d
from torchvision.models import get_model

from ..callbacks import default_callbacks
from ..metrics.evaluator import default_evaluator
from ..model.lightning_mixin import DEFAULT_PRETRAINED, ONNX_OPSET, check_numbers, plan_epochs
from ..model.processing import AntialiasedPreProcessor, OrderKeepingPostProcessor
from ..model.torch_model import check_choice

BACKBONES = ("vgg11", "vgg13", "vgg16", "vgg19")
NARROW = 16
"""Channels of the student's convolutions that are not compared with the teacher's."""
SCORED = 3
"""Blocks, the last ones, that make up a score; in training the second one counts too."""
SIGMA = 4
"""Of the blur of maps, in pixels."""
MIN_SIZE = 32
"""Of images, which five poolings halve."""


def discrepancy(student: torch.Tensor, teacher: torch.Tensor, value_weight: float) -> torch.Tensor:
    """How far the student is from the teacher: ``1 - cosine`` of all activations, and their mean squared difference.

    Args:
        student: Activations ``(B, ...)``.
        teacher: Activations of the same shape.
        value_weight: Weight of the squared difference.

    Returns:
        Losses ``(B,)``, float32.
    """
    student, teacher = student.flatten(1).float(), teacher.flatten(1).float()
    direction = 1 - cosine_similarity(student, teacher, dim=1)
    return direction + value_weight * (student - teacher).square().mean(dim=1)


def opening(maps: torch.Tensor) -> torch.Tensor:
    """Take off what is smaller than a cross of 3 x 3 pixels from maps ``(B, 1, H, W)``, as from each of their levels.

    Opening the map is opening the regions above every threshold at once.
    """
    return _dilate(-_dilate(-maps))


def _dilate(maps: torch.Tensor) -> torch.Tensor:
    column, row = (max_pool2d(maps, kernel, 1, [side // 2 for side in kernel]) for kernel in ([3, 1], [1, 3]))
    return torch.maximum(column, row)


class MkdModel(nn.Module):
    """A frozen VGG, and a narrow copy of it that learns to have the same activations after its poolings.

    In train mode ``forward`` returns losses ``(B,)``, in eval mode anomalib's ``InferenceBatch``.

    Args:
        backbone: Torchvision's name of a VGG without batch normalisation.
        pre_trained: Use torchvision's weights in place of random ones.
        value_weight: Weight of the squared difference beside the cosine.

    Attributes:
        localises: Whether there is a map beside the score; it takes a gradient, which exported graphs cannot.
    """

    def __init__(self, backbone: str = "vgg16", pre_trained: bool = True, value_weight: float = 0.01) -> None:
        super().__init__()
        check_choice("backbone", backbone, BACKBONES)
        self.value_weight = value_weight
        self.localises = True
        self.teacher = _blocks(_features(backbone, pre_trained)).requires_grad_(False)
        self.student = _student(self.teacher)
        self.blur = GaussianBlur2d(sigma=SIGMA)

    def train(self, mode: bool = True) -> "MkdModel":
        """Set the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, image: torch.Tensor) -> torch.Tensor | InferenceBatch:
        """Score images.

        Args:
            image: RGB in [0, 1], ``(B, 3, H, W)``; overshoots of the resize are clamped.

        Returns:
            In train mode the loss of every image; in eval mode ``pred_score`` ``(B,)`` and ``anomaly_map``
            ``(B, H, W)``.
        """
        if self.training:
            return torch.stack(self.losses(image.clamp(0, 1))).sum(dim=0)
        if not self.localises:
            return InferenceBatch(pred_score=self.score(image.clamp(0, 1)))
        with torch.inference_mode(False), torch.enable_grad():  # Lightning tests without gradients
            image = image.detach().clamp(0, 1).requires_grad_()
            score = self.score(image)
            (gradient,) = torch.autograd.grad(score.sum(), image)  # (B, 3, H, W)
        saliency = gradient.abs().sum(dim=1, keepdim=True)
        anomaly_map = opening(self.blur(saliency)).squeeze(1)
        return InferenceBatch(pred_score=score.detach(), anomaly_map=anomaly_map)

    def losses(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Return per block, from the second on, the loss ``(B,)`` of images in [0, 1]."""
        pairs = zip(_outputs(self.student, image)[1:], _outputs(self.teacher, image)[1:], strict=True)
        return [discrepancy(student, teacher, self.value_weight) for student, teacher in pairs]

    def score(self, image: torch.Tensor) -> torch.Tensor:
        """Return scores ``(B,)`` of images in [0, 1]."""
        return torch.stack(self.losses(image)[-SCORED:]).sum(dim=0)


def _features(backbone: str, pre_trained: bool) -> nn.Sequential:
    try:
        return get_model(backbone, weights="DEFAULT" if pre_trained else None).features
    except OSError as error:  # of the download
        msg = (
            f"The weights of {backbone} could not be had ({error}). Run once with a network; or name torchvision's "
            "file for this method in the `weights` of a comparison; or pre_trained=false for random weights, to try "
            "the software out."
        )
        raise RuntimeError(msg) from error


def _blocks(features: nn.Sequential) -> nn.ModuleList:
    """Cut a VGG after each pooling."""
    blocks, layers = nn.ModuleList(), []
    for layer in features:
        layers.append(layer)
        if isinstance(layer, nn.MaxPool2d):
            blocks.append(nn.Sequential(*layers))
            layers = []
    return blocks


def _student(teacher: Iterable[nn.Module]) -> nn.ModuleList:
    """Return blocks with as many convolutions, of few channels but where a block is compared."""
    blocks, inputs = nn.ModuleList(), 3
    for number, block in enumerate(teacher):
        widths = [layer.out_channels for layer in block.modules() if isinstance(layer, nn.Conv2d)]
        widths = [NARROW] * (len(widths) - 1) + [widths[-1] if number else NARROW]
        layers: list[nn.Module] = []
        for position, width in enumerate(widths, 1):
            convolution = nn.Conv2d(inputs, width, kernel_size=3, padding=1, bias=False)
            nn.init.xavier_uniform_(convolution.weight)
            layers.append(convolution)
            if position < len(widths):
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU())
            inputs = width
        blocks.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
    return blocks


def _outputs(blocks: Iterable[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    outputs = []
    for block in blocks:
        x = block(x)
        outputs.append(x)
    return outputs


class Mkd(AnomalibModule):
    """MKD: images on which a network and its copy, trained on normal images, disagree.

    The map is the gradient of the score by the pixels. Exported graphs (ONNX, OpenVINO) have the score alone.

    Args:
        backbone: Torchvision's name of the teacher: "vgg11", "vgg13", "vgg16" or "vgg19".
        pre_trained: Use torchvision's weights of the teacher in place of random ones; the default is True unless the
            environment variable ``ANOMALIB_MVFA_PRETRAINED`` is "null".
        image_size: Height and width in pixels to which images are squashed, at least 32.
        value_weight: Weight of activations' values beside their directions. The authors use 0.5 on MVTec AD and 0.01
            elsewhere.
        learning_rate: Of Adam.
        max_epochs: Epochs to train, unless the trainer is told otherwise.
        pre_processor: Anomalib's component, or whether to use the default one.
        post_processor: Anomalib's component, or whether to use the default one.
        evaluator: Anomalib's component, or whether to use the default one.
        visualizer: Anomalib's component, or whether to use the default one.

    Raises:
        ValueError: An argument has no such value.
        RuntimeError: The weights could not be downloaded.
    """

    model: MkdModel

    def __init__(
        self,
        backbone: str = "vgg16",
        pre_trained: bool = DEFAULT_PRETRAINED is not None,
        image_size: int = 128,
        value_weight: float = 0.01,
        learning_rate: float = 1e-3,
        max_epochs: int = 50,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_numbers(value_weight=value_weight, learning_rate=learning_rate, max_epochs=max_epochs)
        if image_size < MIN_SIZE:
            msg = f"image_size={image_size} must be at least {MIN_SIZE}: the network halves images five times."
            raise ValueError(msg)
        if pre_processor is True:
            pre_processor = self.configure_pre_processor((image_size, image_size))
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self.model = MkdModel(backbone, pre_trained, value_weight)
        self.learning_rate = learning_rate

    def setup(self, stage: str) -> None:
        """Settle how long to train."""
        if stage == "fit":
            plan_epochs(self.trainer, self.hparams["max_epochs"])

    def configure_callbacks(self) -> list[Callback]:
        """Return anomalib's callbacks, and ours."""
        return default_callbacks(super().configure_callbacks())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam over the student."""
        return torch.optim.Adam(self.model.student.parameters(), lr=self.learning_rate)

    def training_step(self, batch: ImageBatch, *args, **kwargs) -> STEP_OUTPUT:  # noqa: ANN002, ANN003
        """Return the mean loss of a batch."""
        del args, kwargs
        loss = self.model(batch.image).mean()
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=batch.batch_size)
        return loss

    def validation_step(self, batch: ImageBatch, *args, **kwargs) -> STEP_OUTPUT:  # noqa: ANN002, ANN003
        """Score a batch."""
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())

    def to_onnx(self, *args, **kwargs) -> Path:  # noqa: ANN002, ANN003
        """Export as anomalib does, without the map; OpenVINO's export passes through here too."""
        self.model.localises = False
        try:
            return super().to_onnx(*args, **{"opset_version": ONNX_OPSET, **kwargs})
        finally:
            self.model.localises = True

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No sanity check."""
        return {"num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """One-class."""
        return LearningType.ONE_CLASS

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Return a pre-processor that squashes images to a square of ``image_size``, 128 by default."""
        return AntialiasedPreProcessor(image_size[0] if image_size else 128)

    @staticmethod
    def configure_post_processor() -> PostProcessor:
        """Return a post-processor for scores of any range."""
        return OrderKeepingPostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Return the metrics of :func:`anomalib_mvfa.metrics.evaluator.default_evaluator`."""
        return default_evaluator()
