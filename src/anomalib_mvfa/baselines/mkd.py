"""MKD (Salehi et al., CVPR 2021): a small network copies a large one on normal images, and fails on others.

Axes: B images, H = W image size.
"""

import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule, GaussianBlur2d
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn
from torch.nn.functional import cosine_similarity, max_pool2d
from torchvision.models import get_model
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import pad

from ..arguments import DEFAULT_PRETRAINED, check_arguments, check_bounds, check_choice, documented
from ..model.weights import RANDOM_SEED, load_state, read_state
from .base import TrainedBaseline, checked_path, drawn_from, loading_weights

NARROW = 16  # channels of the student's convolutions that are not compared with the teacher's
SCORED = 3  # number of blocks, the last ones, that make up a score; in training the second one counts too
SIGMA = 4  # standard deviation of the blur of maps, in pixels
REACH = 4 * SIGMA  # of the blur, in pixels
TOP = 0.99  # quantile of an image's saliency at which it is cut
MIN_SIZE = 32  # smallest height and width of images, which five poolings halve


def discrepancy(student: torch.Tensor, teacher: torch.Tensor, value_weight: float) -> torch.Tensor:
    """``1 - cosine`` of activations ``(B, ...)`` plus weighted mean squared difference: ``(B,)``, in float32."""
    student, teacher = student.flatten(1).float(), teacher.flatten(1).float()
    direction = 1 - cosine_similarity(student, teacher, dim=1)
    return direction + value_weight * (student - teacher).square().mean(dim=1)


def scaled(saliency: torch.Tensor) -> torch.Tensor:
    """Cut each image's saliency ``(B, H, W)`` at its 99th percentile, and scale it to [0, 1]."""
    flat = saliency.flatten(1)
    low, high = flat.amin(dim=1), torch.stack([one.quantile(TOP) for one in flat])
    span = (high - low).clamp(min=torch.finfo(flat.dtype).tiny)
    return ((saliency - low[:, None, None]) / span[:, None, None]).clamp(0, 1)


def opening(maps: torch.Tensor) -> torch.Tensor:
    """Open maps ``(B, 1, H, W)`` by a cross of 3 x 3 pixels, which opens the regions above every threshold at once."""
    return _dilate(-_dilate(-maps))


def _dilate(maps: torch.Tensor) -> torch.Tensor:
    column, row = (max_pool2d(maps, kernel, 1, [side // 2 for side in kernel]) for kernel in ([3, 1], [1, 3]))
    return torch.maximum(column, row)


class GuidedReLU(nn.ReLU):
    """A ReLU that, in eval mode, lets no negative gradient through: guided backpropagation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what a ReLU returns."""
        x = super().forward(x)
        if x.requires_grad and not self.training:
            x.register_hook(lambda gradient: gradient.clamp(min=0))
        return x


class MkdModel(nn.Module):
    """A frozen VGG, given by its layers, and a narrow copy that learns to have the same activations after poolings."""

    def __init__(self, teacher: nn.Sequential, value_weight: float) -> None:
        super().__init__()
        self.value_weight = value_weight
        self.teacher = _blocks(teacher).requires_grad_(False)
        self.student = _student(self.teacher)
        self.blur = GaussianBlur2d(sigma=SIGMA)

    def forward(self, image: torch.Tensor) -> torch.Tensor | InferenceBatch:
        """Score RGB images in [0, 1], ``(B, 3, H, W)``; overshoots of the resize are clamped.

        Returns:
            In train mode the loss of every image; in eval mode ``pred_score`` ``(B,)`` and, but for exported graphs,
            which cannot take a gradient, ``anomaly_map`` ``(B, H, W)``.
        """
        if self.training:
            return torch.stack(self.losses(image.clamp(0, 1))).sum(dim=0)
        if torch.compiler.is_exporting():
            return InferenceBatch(pred_score=self.score(image.clamp(0, 1)))
        with torch.inference_mode(False), torch.enable_grad():  # Lightning tests without gradients
            image = image.detach().clamp(0, 1).requires_grad_()
            score = self.score(image)
            (gradient,) = torch.autograd.grad(score.sum(), image)  # (B, 3, H, W)
        saliency = scaled(gradient.abs().sum(dim=1)).unsqueeze(1)
        # SciPy's blur reflects at the border's edge, anomalib's at the middle of its pixels: it sees the padding alone.
        blurred = self.blur(pad(saliency, [REACH] * 4, padding_mode="symmetric"))[..., REACH:-REACH, REACH:-REACH]
        return InferenceBatch(pred_score=score.detach(), anomaly_map=opening(blurred).squeeze(1))

    def losses(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Return per block, from the second on, the loss ``(B,)`` of images in [0, 1]."""
        losses, x, y = [], image, image
        for number, (student, teacher) in enumerate(zip(self.student, self.teacher, strict=True)):
            x, y = student(x), teacher(y)
            if number:
                losses.append(discrepancy(x, y, self.value_weight))
        return losses

    def score(self, image: torch.Tensor) -> torch.Tensor:
        """Return scores ``(B,)`` of images in [0, 1]."""
        return torch.stack(self.losses(image)[-SCORED:]).sum(dim=0)


def _blocks(features: nn.Sequential) -> nn.ModuleList:
    """Cut a VGG after each pooling."""
    blocks, layers = nn.ModuleList(), []
    for layer in features:
        layers.append(layer)
        if isinstance(layer, nn.MaxPool2d):
            blocks.append(nn.Sequential(*layers))
            layers = []
    return blocks


def _student(teacher: nn.ModuleList) -> nn.ModuleList:
    """Return blocks with as many convolutions, of few channels but where a block is compared."""
    blocks, inputs = nn.ModuleList(), 3
    for number, block in enumerate(teacher):
        layers: list[nn.Module] = []
        *others, last = (layer.out_channels for layer in block.modules() if isinstance(layer, nn.Conv2d))
        for width in [*(NARROW for _ in others), last if number else NARROW]:
            convolution = nn.Conv2d(inputs, width, kernel_size=3, padding=1, bias=False)
            nn.init.xavier_uniform_(convolution.weight)
            layers += [convolution, nn.BatchNorm2d(width), GuidedReLU()]
            inputs = width
        del layers[-2]  # nothing is normalised before a pooling
        blocks.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
    return blocks


@documented
class Mkd(TrainedBaseline, AnomalibModule):
    """MKD: images on which a network and its copy, trained on normal images, disagree.

    The map is the gradient of the score by the pixels, guided through the student. Exported graphs (ONNX, OpenVINO)
    have the score alone.

    Args:
        backbone: Torchvision's name of the teacher: "vgg11", "vgg13", "vgg16" or "vgg19".
        image_size: Height and width in pixels to which images are resized, at least 32.
        value_weight: Weight of squared differences beside the cosine; the authors use 0.5 on MVTec AD, else 0.01.
        learning_rate: Learning rate of Adam.

    Raises:
        ValueError: An argument has no such value.
        RuntimeError: The weights could not be loaded.
    """

    IMAGE_SIZE = 128
    INTERPOLATION = InterpolationMode.BILINEAR
    BATCH_SIZE = 64
    model: MkdModel

    def __init__(
        self,
        backbone: str = "vgg16",
        pre_trained: bool | str = DEFAULT_PRETRAINED is not None,
        image_size: int = IMAGE_SIZE,
        value_weight: float = 0.01,
        learning_rate: float = 1e-3,
        max_epochs: int = 201,
        threshold: float | str | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_arguments(locals())
        check_bounds("image_size", image_size, MIN_SIZE)
        check_choice("backbone", backbone, ["vgg11", "vgg13", "vgg16", "vgg19"])
        super().__init__(image_size, pre_processor, post_processor, evaluator, visualizer, threshold)
        with loading_weights(backbone), drawn_from(RANDOM_SEED):
            teacher = get_model(backbone, weights="IMAGENET1K_V1" if pre_trained is True else None)
        if isinstance(pre_trained, str):
            load_state(teacher, read_state(checked_path(pre_trained)), backbone, pre_trained)
        self.model = MkdModel(teacher.features, value_weight)
        self.learning_rate = learning_rate
        self.max_epochs = max_epochs

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam over the student."""
        return torch.optim.Adam(self.model.student.parameters(), lr=self.learning_rate)

    def training_step(self, batch: ImageBatch, *args, **kwargs) -> STEP_OUTPUT:  # noqa: ANN002, ANN003
        """Return the mean loss of a batch."""
        del args, kwargs
        loss = self.model(batch.image).mean()
        self.log_loss(loss, batch)
        return loss
